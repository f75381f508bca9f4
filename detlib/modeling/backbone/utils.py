"""Shared building blocks of the ViT backbones: windows, position embeddings, attention and MLPs.

Feature maps are channels-last here. Shape legend: B feature maps (images, or images x heads), H and W height
and width in tokens, C channels, S the side length of a square window, L the length of a table of relative
positions.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "add_decomposed_rel_pos",
    "decomposed_attention",
    "drop_path_rates",
    "get_abs_pos",
    "get_rel_pos",
    "init_transformer_weights",
    "run_block",
    "window_partition",
    "window_unpartition",
]

# From this many attention weights on (32 MB in float32), folding the bias into queries and keys is faster on
# a CPU than materializing it, and saves a relevant amount of memory.
_FOLD_FROM = 2**23


def window_partition(x, window_size):
    """Partition feature maps into non-overlapping windows, with zero padding at the bottom and at the right.

    Args:
        x: (B, H, W, C).
        window_size: the side length S.

    Returns:
        The windows, (B * ceil(H/S) * ceil(W/S), S, S, C), in row-major order for each feature map, and the
        padded (height, width).
    """
    batch, height, width, channels = x.shape
    pad_h, pad_w = -height % window_size, -width % window_size
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // window_size, (width + pad_w) // window_size
    x = x.reshape(batch, rows, window_size, columns, window_size, channels).transpose(2, 3)
    windows = x.reshape(-1, window_size, window_size, channels)
    return windows, (height + pad_h, width + pad_w)


def window_unpartition(windows, window_size, pad_hw, hw):
    """Reverse `window_partition` and remove the padding.

    Args:
        windows: (B * number of windows, S, S, C).
        window_size: the side length S.
        pad_hw: padded (height, width), as `window_partition` returned it.
        hw: (height, width) of the original feature maps.

    Returns:
        (B, H, W, C).
    """
    rows, columns = pad_hw[0] // window_size, pad_hw[1] // window_size
    x = windows.reshape(-1, rows, columns, window_size, window_size, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, pad_hw[0], pad_hw[1], windows.shape[-1])
    return x[:, : hw[0], : hw[1]].contiguous()


def _resize(table, size, mode):
    """Interpolate a (1, C, ...) table; half precision is resized in float32."""
    dtype = table.dtype
    if dtype in (torch.float16, torch.bfloat16):
        table = table.float()
    align_corners = False if mode == "bicubic" else None
    return F.interpolate(table, size=size, mode=mode, align_corners=align_corners).to(dtype)


def get_rel_pos(q_size, k_size, rel_pos):
    """Look up the embedding of the relative position of every query and key along one axis.

    The table spans the distances of the longer side; coordinates of the shorter side are scaled to it. A
    table whose length is not 2 * max(q_size, k_size) - 1 is resized linearly.

    Args:
        q_size: number of queries along the axis.
        k_size: number of keys along the axis.
        rel_pos: (L, C) table, from the most negative to the most positive distance.

    Returns:
        (q_size, k_size, C).
    """
    length = 2 * max(q_size, k_size) - 1
    if rel_pos.shape[0] != length:
        rel_pos = _resize(rel_pos.t()[None], length, "linear")[0].t()
    stretch_q, stretch_k = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    q_at = torch.arange(q_size, dtype=torch.float32, device=rel_pos.device)[:, None] * stretch_q
    k_at = torch.arange(k_size, dtype=torch.float32, device=rel_pos.device)[None] * stretch_k
    return rel_pos[(q_at - k_at + (k_size - 1) * stretch_k).long()]


def _rel_pos_terms(q, rel_pos_h, rel_pos_w, q_size, k_size):
    """Return the position terms of the logits for each axis: q times the embeddings of key rows and columns.

    Args:
        q: (B, q_h * q_w, C).
        rel_pos_h, rel_pos_w, q_size, k_size: see `add_decomposed_rel_pos`.

    Returns:
        (B, q_h, q_w, k_h) and (B, q_h, q_w, k_w).
    """
    q = q.reshape(-1, *q_size, q.shape[-1])
    table_h = get_rel_pos(q_size[0], k_size[0], rel_pos_h)
    table_w = get_rel_pos(q_size[1], k_size[1], rel_pos_w)
    return torch.einsum("bhwc,hkc->bhwk", q, table_h), torch.einsum("bhwc,wkc->bhwk", q, table_w)


def add_decomposed_rel_pos(attn, q, rel_pos_h, rel_pos_w, q_size, k_size):
    """Add the decomposed relative position embeddings of MViTv2 (arXiv:2112.01526, equation 4) to logits.

    Args:
        attn: (B, q_h * q_w, k_h * k_w) attention logits.
        q: (B, q_h * q_w, C) unscaled queries.
        rel_pos_h, rel_pos_w: (L, C) tables of the two axes, see `get_rel_pos`.
        q_size, k_size: (height, width) of the feature maps of queries and keys.

    Returns:
        The sum, with the shape of `attn`.
    """
    rel_h, rel_w = _rel_pos_terms(q, rel_pos_h, rel_pos_w, q_size, k_size)
    grid = attn.reshape(-1, *q_size, *k_size)
    return (grid + rel_h[..., :, None] + rel_w[..., None, :]).reshape(attn.shape)


def decomposed_attention(q, k, v, rel_pos_h, rel_pos_w, q_size, k_size):
    """Compute attention with decomposed relative positions: softmax(q k^T / sqrt(C) + bias) v.

    It is equivalent to `add_decomposed_rel_pos` before the softmax, but does not materialize all logits if
    there are many: the bias of query i and key j is rel_h[i, row of j] + rel_w[i, column of j]. It becomes
    part of the product if the queries are extended by the two terms, and the keys by one-hot encodings of
    their row and column.

    Args:
        q: (B, heads, q_h * q_w, C).
        k, v: (B, heads, k_h * k_w, C).
        rel_pos_h, rel_pos_w: (L, C) tables, see `get_rel_pos`; both None for attention without positions.
        q_size, k_size: (height, width) of the feature maps of queries and keys.

    Returns:
        (B, heads, q_h * q_w, C).
    """
    if rel_pos_h is None:
        return F.scaled_dot_product_attention(q, k, v)
    batch_and_heads, num_queries, channels = q.shape[:2], q.shape[2], q.shape[3]
    rel_h, rel_w = _rel_pos_terms(q.flatten(0, 1), rel_pos_h, rel_pos_w, q_size, k_size)
    if q.shape[0] * q.shape[1] * num_queries * k.shape[2] < _FOLD_FROM:
        bias = rel_h[..., :, None] + rel_w[..., None, :]
        bias = bias.reshape(*batch_and_heads, num_queries, k.shape[2])
        if q.is_cpu and torch.is_grad_enabled() and bias.requires_grad:
            # The fused CPU kernel has no gradient of the mask, and its fallback is slower than the formula.
            return (q * channels**-0.5 @ k.mT + bias).softmax(dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    terms = torch.cat([rel_h, rel_w], dim=-1).reshape(*batch_and_heads, num_queries, -1)
    scale = channels**-0.5
    q = torch.cat([q * scale, terms], dim=-1)
    rows = torch.eye(k_size[0], dtype=k.dtype, device=k.device).repeat_interleave(k_size[1], dim=0)
    columns = torch.eye(k_size[1], dtype=k.dtype, device=k.device).repeat(k_size[0], 1)
    codes = torch.cat([rows, columns], dim=1)
    k = torch.cat([k, codes.expand(*batch_and_heads, -1, -1)], dim=-1)
    # The fused kernels need values with as many channels as keys.
    v = F.pad(v, (0, sum(k_size)))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :channels]


def get_abs_pos(abs_pos, has_cls_token, hw):
    """Resize absolute position embeddings of a square feature map by bicubic interpolation.

    Args:
        abs_pos: (1, n * n, C), or (1, 1 + n * n, C) with `has_cls_token`.
        has_cls_token: whether the first position belongs to a class token; it is removed.
        hw: (height, width) of the feature map.

    Returns:
        (1, height, width, C).

    Raises:
        ValueError: the number of positions is not a square.
    """
    if has_cls_token:
        abs_pos = abs_pos[:, 1:]
    side = round(abs_pos.shape[1] ** 0.5)
    if side * side != abs_pos.shape[1]:
        raise ValueError(
            f"Absolute position embeddings must form a square feature map, got {abs_pos.shape[1]} positions "
            f"(has_cls_token={has_cls_token})"
        )
    abs_pos = abs_pos.reshape(1, side, side, -1)
    if (side, side) == tuple(hw):
        return abs_pos
    return _resize(abs_pos.permute(0, 3, 1, 2), tuple(hw), "bicubic").permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Patch embedding: map images to tokens with one convolution."""

    def __init__(self, kernel_size=(16, 16), stride=(16, 16), padding=(0, 0), in_chans=3, embed_dim=768):
        """
        Args:
            kernel_size: (height, width) of a patch, in pixels.
            stride: (vertical, horizontal) distance of the patches, in pixels.
            padding: (vertical, horizontal) zero padding of the image, in pixels.
            in_chans: number of image channels.
            embed_dim: channels C of the tokens.
        """
        super().__init__()
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=tuple(kernel_size), stride=tuple(stride), padding=tuple(padding)
        )

    def forward(self, x):
        """Map (N, in_chans, H, W) to (N, H', W', embed_dim)."""
        return self.proj(x).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drop a residual branch for some of the images.

    The kept branches are divided by the probability of keeping them, so that the mean does not change.
    """

    def __init__(self, drop_prob=0.0):
        """
        Args:
            drop_prob: probability that an image's branch is dropped, in [0, 1].

        Raises:
            ValueError: `drop_prob` is out of range.
        """
        super().__init__()
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x):
        """Map (N, ...) to the same shape; each of the N images is dropped independently."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0 else mask)

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """A multilayer perceptron: two linear layers with an activation in between."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU):
        """
        Args:
            in_features: input and output channels.
            hidden_features: hidden channels.
            act_layer: callable without arguments that creates the activation.
        """
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        """Map (..., in_features) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the stochastic depth rates of `depth` blocks, which rise linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def init_transformer_weights(module: nn.Module) -> None:
    """Initialize a linear layer or layer norm; other modules are ignored. For use with `nn.Module.apply`.

    Linear weights are drawn from a truncated normal distribution with standard deviation 0.02; biases are 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def run_block(block: nn.Module, x: torch.Tensor, use_act_checkpoint: bool) -> torch.Tensor:
    """Apply a block, with activation checkpointing if `use_act_checkpoint`."""
    if use_act_checkpoint and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)
