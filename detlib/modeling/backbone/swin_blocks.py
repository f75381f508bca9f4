"""Window attention and the blocks of Swin Transformer (arXiv:2103.14030).

Shape legend: B pictures, H and W of a feature map, C channels, w side of a window, N = w * w tokens of a
window, nW windows of a picture.
"""

import torch
from torch import nn
from torch.nn import functional as F

from detlib.modeling.backbone.transformer_parts import DropPath

__all__ = [
    "Mlp",
    "SwinTransformerBlock",
    "WindowAttention",
    "pair",
    "shifted_window_mask",
    "whole_windows",
    "window_partition",
    "window_reverse",
]

# What is added to the logit of two tokens that are no neighbours; as published, not minus infinity.
_APART = -100.0


def pair(value) -> tuple:
    """A height and a width, which may have been given as one number."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def whole_windows(length, window_size):
    """`length` rounded up to a multiple of `window_size`; shapes that are traced need to see it as one."""
    return (length + window_size - 1) // window_size * window_size


def window_partition(x, window_size):
    """Cut maps into windows.

    Args:
        x: (B, H, W, C), with H and W multiples of `window_size`.
        window_size: side w of a window.

    Returns:
        (B * nW, w, w, C): the windows of the first picture row by row, then those of the second, ...
    """
    B, H, W, C = x.shape
    x = x.reshape(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.transpose(2, 3).reshape(-1, window_size, window_size, C)


def window_reverse(windows, window_size, H, W):
    """Put the windows of `window_partition` together again.

    Args:
        windows: (B * nW, w, w, C).
        window_size: side w of a window.
        H, W: size of the maps.

    Returns:
        (B, H, W, C).
    """
    C = windows.shape[-1]
    x = windows.reshape(-1, H // window_size, W // window_size, window_size, window_size, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)


def shifted_window_mask(H, W, window_size, shift, like):
    """What to add to the logits of shifted windows, so that only true neighbours attend to each other.

    Rolling the map by `shift` brings its first rows below its last ones, and its columns likewise; windows
    at the seam hold parts that lie apart in the picture.

    Returns:
        (nW, N, N) of the dtype and device of `like`.
    """

    def parts(length):
        position = torch.arange(length, device=like.device)
        return (position >= length - window_size).int() + (position >= length - shift).int()

    part = parts(H)[:, None] * 3 + parts(W)
    part = window_partition(part[None, :, :, None], window_size).flatten(1)
    apart = part[:, None, :] != part[:, :, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill_(apart, _APART)


class Mlp(nn.Module):
    """Two linear layers with an activation in between, `fc1` and `fc2`."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        """
        Args:
            in_features: channels that go in.
            hidden_features: channels in between, by default `in_features`.
            out_features: channels that come out, by default `in_features`.
            act_layer: makes the activation, called without arguments.
            drop: dropout after each linear layer.
        """
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        """Map (..., in_features) to (..., out_features)."""
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias for each relative position."""

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0
    ):
        """
        Args:
            dim: channels C.
            window_size: (height, width) of a window, or one side.
            num_heads: number of heads, which divides `dim`.
            qkv_bias: whether queries, keys and values have a bias.
            qk_scale: factor of the logits, by default `(dim / num_heads) ** -0.5`.
            attn_drop: dropout of the attention weights.
            proj_drop: dropout of the output.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")
        self.dim = dim
        self.window_size = height, width = pair(window_size)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        num_offsets = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        # Entry (i, j) is the row of the table for the offset of token j from token i.
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        dy, dx = rows[:, None] - rows + height - 1, columns[:, None] - columns + width - 1
        self.register_buffer("relative_position_index", dy * (2 * width - 1) + dx)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, mask=None):
        """Attend within each window.

        Args:
            x: (B * nW, N, C).
            mask: (nW, N, N) to add to the logits, or None.

        Returns:
            (B * nW, N, C).
        """
        num_windows, N, C = x.shape
        q, k, v = self.qkv(x).reshape(num_windows, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
        bias = bias.permute(2, 0, 1).unsqueeze(0).to(q.dtype)
        if mask is not None:
            bias = bias + mask.unsqueeze(1).to(q.dtype)
            bias = bias.repeat(num_windows // mask.shape[0], 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(num_windows, N, C)))


class SwinTransformerBlock(nn.Module):
    """Window attention and an MLP, each with a norm before and a shortcut around."""

    def __init__(
        self,
        dim,
        num_heads,
        window_size=7,
        shift_size=0,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        """
        Args:
            dim: channels C.
            num_heads, qkv_bias, qk_scale, attn_drop: as for `WindowAttention`.
            window_size: side of a window.
            shift_size: how far the windows are shifted against the map's origin, below `window_size`.
            mlp_ratio: hidden channels of the MLP by `dim`.
            drop: dropout after linear layers.
            drop_path: probability of leaving out each branch, see `DropPath`.
            act_layer: makes the MLP's activation, called without arguments.
            norm_layer: makes a norm, called with the number of channels.

        Raises:
            ValueError: a shift that is no part of a window.
        """
        super().__init__()
        if not 0 <= shift_size < window_size:
            raise ValueError(f"shift_size must be in [0, {window_size}), the window_size, got {shift_size}")
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x, mask_matrix):
        """Compute the block.

        Args:
            x: (B, H, W, C) of any size; it is padded to whole windows with zeros, which take part.
            mask_matrix: (nW, N, N) to add to the logits of the padded map's shifted windows; not used without
                a shift.

        Returns:
            (B, H, W, C).
        """
        _, H, W, C = x.shape
        w, shift = self.window_size, self.shift_size
        padded_height, padded_width = whole_windows(H, w), whole_windows(W, w)
        y = F.pad(self.norm1(x), (0, 0, 0, padded_width - W, 0, padded_height - H))
        if shift:
            y = torch.roll(y, (-shift, -shift), dims=(1, 2))
        windows = window_partition(y, w).flatten(1, 2)
        windows = self.attn(windows, mask_matrix if shift else None).unflatten(1, (w, w))
        y = window_reverse(windows, w, padded_height, padded_width)
        if shift:
            y = torch.roll(y, (shift, shift), dims=(1, 2))
        x = x + self.drop_path(y[:, :H, :W])
        return x + self.drop_path(self.mlp(self.norm2(x)))
