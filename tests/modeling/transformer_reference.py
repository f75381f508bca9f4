"""Reference formulas for tests of the transformer backbones: loops over images, heads and positions."""

import torch


def rel_pos_row(table, q_at, k_at, q_size, k_size):
    """Return the embedding of query `q_at` and key `k_at` along one axis; one size must divide the other."""
    size = max(q_size, k_size)
    assert size % q_size == 0 and size % k_size == 0 and len(table) == 2 * size - 1
    distance = q_at * (size // q_size) - k_at * (size // k_size)
    return table[distance + (k_size - 1) * (size // k_size)]


def attention_weights(q, k, table_h, table_w):
    """Return the attention weights of one head with relative positions, (q_h, q_w, k_h, k_w).

    `q` is (q_h, q_w, C) and `k` is (k_h, k_w, C).
    """
    logits = q.new_zeros(*q.shape[:2], *k.shape[:2])
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            for m in range(k.shape[0]):
                for n in range(k.shape[1]):
                    logits[i, j, m, n] = q[i, j] @ k[m, n] / q.shape[-1] ** 0.5
                    if table_h is not None:
                        logits[i, j, m, n] += q[i, j] @ rel_pos_row(table_h, i, m, q.shape[0], k.shape[0])
                        logits[i, j, m, n] += q[i, j] @ rel_pos_row(table_w, j, n, q.shape[1], k.shape[1])
    return logits.flatten(2).softmax(dim=-1).reshape(logits.shape)


def pad_to_multiple(x, size):
    """Pad (H, W, C) with zeros at the bottom and at the right to multiples of `size`."""
    rows, columns = -(-x.shape[0] // size) * size, -(-x.shape[1] // size) * size
    padded = x.new_zeros(rows, columns, x.shape[2])
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def randomize(module, seed=0):
    """Fill every parameter with random values of standard deviation 0.5, and return the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module
