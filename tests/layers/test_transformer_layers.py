"""Attention, feed-forward and transformer layers against slow formulas."""

import math

import pytest
import torch
from torch import nn

from detlib.layers import (
    FFN,
    MLP,
    BaseTransformerLayer,
    MultiheadAttention,
    MultiScaleDeformableAttention,
    TransformerLayerSequence,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def slow_attention(attn, query, key, value, blocked):
    """Attend query by query and head by head: (Q, C), (K, C), (K, C), and which (Q, K) pairs are masked."""
    dim, heads = attn.embed_dim, attn.num_heads
    size = dim // heads
    w, b = attn.in_proj_weight, attn.in_proj_bias
    q = query @ w[:dim].T + b[:dim]
    k = key @ w[dim : 2 * dim].T + b[dim : 2 * dim]
    v = value @ w[2 * dim :].T + b[2 * dim :]
    rows = []
    for i in range(len(q)):
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = torch.stack([q[i, own] @ k[j, own] / math.sqrt(size) for j in range(len(k))])
            scores[blocked[i]] = -math.inf
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[j] * v[j, own] for j in range(len(k))))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ attn.out_proj.weight.T + attn.out_proj.bias


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_matches_slow_formula(batch_first):
    module = MultiheadAttention(8, 2, batch_first=batch_first).double()
    nn.init.normal_(module.attn.in_proj_bias)
    nn.init.normal_(module.attn.out_proj.bias)
    query, query_pos = torch.rand(2, 2, 3, 8, dtype=torch.float64)
    key, key_pos, value = torch.rand(3, 2, 5, 8, dtype=torch.float64)
    attn_mask = torch.rand(3, 5) < 0.3
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    attn_mask[:, 0] = False
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value, query_pos, key_pos)]
    found = module(
        *inputs[:3],
        query_pos=inputs[3],
        key_pos=inputs[4],
        attn_mask=attn_mask,
        key_padding_mask=padding,
    )
    found = found if batch_first else found.transpose(0, 1)
    for i in range(2):
        blocked = attn_mask | padding[i]
        want = slow_attention(module.attn, query[i] + query_pos[i], key[i] + key_pos[i], value[i], blocked)
        torch.testing.assert_close(found[i], query[i] + want)


def test_self_attention_uses_query_pos_for_keys():
    module = MultiheadAttention(8, 2, batch_first=True).double()
    x, pos, identity = torch.rand(3, 1, 4, 8, dtype=torch.float64)
    want = slow_attention(module.attn, (x + pos)[0], (x + pos)[0], x[0], torch.zeros(4, 4, dtype=torch.bool))
    found = module(x, x, x, identity, query_pos=pos)
    torch.testing.assert_close(found[0], identity[0] + want)


def test_mlp_and_ffn_match_their_formulas():
    mlp = MLP(3, 5, 2, 3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    x = torch.randn(4, 3)
    a, b, c = mlp.layers
    want = ((x @ a.weight.T + a.bias).clamp(min=0) @ b.weight.T + b.bias).clamp(min=0) @ c.weight.T + c.bias
    torch.testing.assert_close(mlp(x), want)

    ffn = FFN(4, 6, num_fcs=2, activation=nn.Tanh(), ffn_drop=0.5).eval()
    names = {"layers.0.0.weight", "layers.0.0.bias", "layers.1.weight", "layers.1.bias"}
    assert set(ffn.state_dict()) == names
    x, identity = torch.randn(2, 3, 4)
    first, last = ffn.layers[0][0], ffn.layers[1]
    want = (x @ first.weight.T + first.bias).tanh() @ last.weight.T + last.bias
    torch.testing.assert_close(ffn(x), x + want)
    torch.testing.assert_close(ffn(x, identity), identity + want)
    torch.testing.assert_close(FFN(4, 6, 2, add_identity=False)(x).shape, torch.Size([3, 2]))


ORDERS = {
    "post_norm": ("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
    "pre_norm": ("norm", "self_attn", "norm", "cross_attn", "norm", "ffn"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_layer_applies_the_operation_order(order):
    layer = BaseTransformerLayer(
        attn=MultiheadAttention(8, 2, batch_first=True),
        ffn=FFN(8, 16),
        norm=nn.LayerNorm(8),
        operation_order=ORDERS[order],
    )
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x, pos = torch.randn(2, 2, 3, 8)
    memory, memory_pos = torch.randn(2, 2, 5, 8)
    own, other = layer.attentions
    n, ffn = layer.norms, layer.ffns[0]

    def attend(attention, query, key, key_pos):  # without the residual connection
        return attention.attn(query + pos, key + key_pos, key)[0]

    if order == "post_norm":
        y = n[0](x + attend(own, x, x, pos))
        y = n[1](y + attend(other, y, memory, memory_pos))
        want = n[2](y + ffn.layers(y))
    else:
        z = n[0](x)
        y = x + attend(own, z, z, pos)
        y = y + attend(other, n[1](y), memory, memory_pos)
        want = y + ffn.layers(n[2](y))
    found = layer(x, memory, memory, query_pos=pos, key_pos=memory_pos)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_layer_passes_one_mask_to_each_attention():
    layer = BaseTransformerLayer(
        [MultiheadAttention(8, 2, batch_first=True) for _ in range(2)],
        FFN(8, 16),
        nn.LayerNorm(8),
        ORDERS["post_norm"],
    )
    x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    other_x, other_memory = x.clone(), memory.clone()
    other_x[:, 2] += 1
    other_memory[:, 4] += 1
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 2] = True
    padding = torch.tensor([[False] * 4 + [True]])
    a = layer(x, memory, memory, attn_masks=[mask, None], key_padding_mask=padding)
    b = layer(other_x, other_memory, other_memory, attn_masks=[mask, None], key_padding_mask=padding)
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert (a[:, 1] - b[:, 1]).abs().max() > 1e-4
    c = layer(other_x, memory, memory, query_key_padding_mask=torch.tensor([[False, False, True]]))
    d = layer(x, memory, memory, query_key_padding_mask=torch.tensor([[False, False, True]]))
    torch.testing.assert_close(c[:, :2], d[:, :2])


def test_layer_sequence_applies_all_layers():
    layer = BaseTransformerLayer(
        MultiheadAttention(8, 2, batch_first=True),
        FFN(8, 16),
        nn.LayerNorm(8),
        ("self_attn", "norm", "ffn", "norm"),
    )
    stack = TransformerLayerSequence(layer, 3)
    assert len({id(p) for p in stack.parameters()}) == 3 * len(list(layer.parameters()))
    stack.post_norm_layer = nn.LayerNorm(8)
    x = torch.randn(2, 4, 8)
    want = stack.post_norm_layer(stack.layers[2](stack.layers[1](stack.layers[0](x))))
    torch.testing.assert_close(stack(x), want)
    want.sum().backward()
    grads = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    stack.use_checkpoint = True
    stack(x).sum().backward()
    for p, grad in zip(stack.parameters(), grads):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiheadAttention(10, 4), "num_heads must divide embed_dim, got 4 and 10"),
        (lambda: MultiScaleDeformableAttention(10, 4), "num_heads must divide embed_dim, got 4 and 10"),
        (lambda: MLP(2, 2, 2, 0), "num_layers must be at least 1, got 0"),
        (lambda: FFN(4, 8, num_fcs=1), "num_fcs must be at least 2, got 1"),
        (lambda: FFN(4, 8, 3), "output_dim must be embed_dim = 4 with add_identity, got 3"),
        (lambda: BaseTransformerLayer([], FFN(4), nn.LayerNorm(4), ("ffn", "relu")), "operation_order.*relu"),
        (
            lambda: BaseTransformerLayer([], FFN(4), nn.LayerNorm(4), ("self_attn",)),
            "attn must be 1 modules.* got 0",
        ),
        (lambda: TransformerLayerSequence([nn.Linear(2, 2)], 2), "num_layers is 2, but there are 1"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
