"""Swin Transformer (arXiv:2103.14030) as a detection backbone: window attention at any image size.

Parameter names match the published detection models.

Shape legend: B images, H and W height and width of a feature map in tokens, C channels, nW windows per image,
N tokens per window.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.utils import DropPath, drop_path_rates, init_transformer_weights

__all__ = [
    "BasicLayer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformer",
    "SwinTransformerBlock",
    "WindowAttention",
    "window_partition",
    "window_reverse",
]

# The mask value for tokens that are not neighbors: -100 as published, not minus infinity.
_APART = -100.0


def pair(value) -> tuple:
    """Return a (height, width) pair, from a pair or one number for both."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def whole_windows(length, window_size):
    """Round `length` up to a multiple of `window_size`, which symbolic shapes recognize as a multiple."""
    return (length + window_size - 1) // window_size * window_size


def window_partition(x, window_size):
    """Partition feature maps into windows.

    Args:
        x: (B, H, W, C), with H and W multiples of `window_size`.
        window_size: side length w of a window.

    Returns:
        (B * nW, w, w, C): the windows of the first image in row-major order, then those of the second, ...
    """
    B, H, W, C = x.shape
    x = x.reshape(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.transpose(2, 3).reshape(-1, window_size, window_size, C)


def window_reverse(windows, window_size, H, W):
    """Reverse `window_partition`.

    Args:
        windows: (B * nW, w, w, C).
        window_size: side length w of a window.
        H, W: size of the feature maps.

    Returns:
        (B, H, W, C).
    """
    C = windows.shape[-1]
    x = windows.reshape(-1, H // window_size, W // window_size, window_size, window_size, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)


def shifted_window_mask(H, W, window_size, shift, like):
    """Return the attention mask of shifted windows, which separates tokens that are not adjacent.

    Rolling the feature map by `shift` moves its first rows below the last ones, and likewise its columns.
    Windows across this seam contain regions that are not adjacent in the image.

    Returns:
        (nW, N, N) with the dtype and device of `like`, to be added to the logits.
    """

    def parts(length):
        position = torch.arange(length, device=like.device)
        return (position >= length - window_size).int() + (position >= length - shift).int()

    part = parts(H)[:, None] * 3 + parts(W)
    part = window_partition(part[None, :, :, None], window_size).flatten(1)
    apart = part[:, None, :] != part[:, :, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill_(apart, _APART)


class Mlp(nn.Module):
    """A multilayer perceptron: two linear layers, `fc1` and `fc2`, with an activation in between."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        """
        Args:
            in_features: input channels.
            hidden_features: hidden channels; `in_features` by default.
            out_features: output channels; `in_features` by default.
            act_layer: callable without arguments that creates the activation.
            drop: dropout probability after each linear layer.
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
    """Multi-head self-attention within windows, with a learned bias for each relative position."""

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0
    ):
        """
        Args:
            dim: channels C.
            window_size: (height, width) of a window, or the side length of a square window.
            num_heads: number of attention heads; must divide `dim`.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            qk_scale: scale of the logits; `(dim / num_heads) ** -0.5` by default.
            attn_drop: dropout probability of the attention weights.
            proj_drop: dropout probability of the output.

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
        # Entry (i, j) is the row of the table for the offset between tokens i and j.
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
            mask: (nW, N, N), added to the logits; or None.

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
    """A pre-norm transformer block: window attention and an MLP, each with a shortcut."""

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
            num_heads, qkv_bias, qk_scale, attn_drop: see `WindowAttention`.
            window_size: side length of a window.
            shift_size: shift of the windows from the origin, less than `window_size`.
            mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
            drop: dropout probability after linear layers.
            drop_path: probability of dropping each branch, see `DropPath`.
            act_layer: callable without arguments that creates the activation of the MLP.
            norm_layer: callable that creates a norm from a number of channels.

        Raises:
            ValueError: `shift_size` is not less than `window_size`.
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
        """Apply the block.

        Args:
            x: (B, H, W, C) of any size; it is padded with zeros to whole windows, and the zeros are attended
                to.
            mask_matrix: (nW, N, N), added to the logits of the shifted windows of the padded feature map;
                unused without a shift.

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


class PatchMerging(nn.Module):
    """Patch merging: concatenate the tokens of each 2x2 square and project them to twice the channels."""

    def __init__(self, dim, norm_layer=nn.LayerNorm):
        """
        Args:
            dim: input channels C.
            norm_layer: callable that creates a norm from a number of channels.
        """
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x, H, W):
        """Map (B, H * W, C) to (B, ceil(H/2) * ceil(W/2), 2 * C).

        Raises:
            ValueError: `x` does not have H * W tokens.
        """
        if x.shape[1] != H * W:
            raise ValueError(f"PatchMerging got {x.shape[1]} tokens for a feature map of {H} x {W}")
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, W % 2, 0, H % 2))
        corners = [x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]  # column-major order
        return self.reduction(self.norm(torch.cat(corners, dim=-1).flatten(1, 2)))


class BasicLayer(nn.Module):
    """A stage of blocks, every second one with windows shifted by half their size, and patch merging."""

    def __init__(
        self,
        dim,
        depth,
        num_heads,
        window_size=7,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        norm_layer=nn.LayerNorm,
        downsample=None,
        use_checkpoint=False,
    ):
        """
        Args:
            dim: channels C.
            depth: number of blocks.
            drop_path: probability of dropping each branch: one number, or one for each block.
            downsample: a class such as `PatchMerging`, called with `dim` and `norm_layer`; or None.
            use_checkpoint: whether to use activation checkpointing in the blocks, which saves memory.
            num_heads, window_size, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, norm_layer: see
                `SwinTransformerBlock`.
        """
        super().__init__()
        rates = drop_path if isinstance(drop_path, (list, tuple)) else [drop_path] * depth
        self.window_size, self.shift_size = window_size, window_size // 2
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim,
                num_heads,
                window_size=window_size,
                shift_size=self.shift_size if i % 2 else 0,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=rates[i],
                norm_layer=norm_layer,
            )
            for i in range(depth)
        )
        self.downsample = downsample(dim=dim, norm_layer=norm_layer) if downsample is not None else None

    def forward(self, x, H, W):
        """Apply the stage.

        Args:
            x: (B, H * W, C).
            H, W: size of the feature map.

        Returns:
            tuple: the (B, H * W, C) output of the blocks, its H and W, and the input of the next stage, its
            height and width. The latter three equal the former without `downsample`.
        """
        x = x.unflatten(1, (H, W))
        w = self.window_size
        # All blocks of the stage share one mask. It is not cached between images: it costs far less than a
        # block, and a cache would depend on size, device and dtype and break compiled graphs.
        mask = None
        if self.shift_size and self.depth > 1:
            mask = shifted_window_mask(whole_windows(H, w), whole_windows(W, w), w, self.shift_size, x)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        x = x.flatten(1, 2)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2


class PatchEmbed(nn.Module):
    """Patch embedding: map each patch of the image to a token with a convolution, `proj`."""

    def __init__(self, patch_size=4, in_chans=3, embed_dim=96, norm_layer=None):
        """
        Args:
            patch_size: side length or (height, width) of a patch in pixels.
            in_chans: number of image channels.
            embed_dim: channels C of a token.
            norm_layer: callable that creates the norm of the tokens from a number of channels; None for no
                norm.
        """
        super().__init__()
        self.patch_size = pair(patch_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def forward(self, x):
        """Map (B, in_chans, H, W), padded to whole patches, to (B, C, ceil(H/patch), ceil(W/patch))."""
        height, width = self.patch_size
        x = self.proj(F.pad(x, (0, -x.shape[3] % width, 0, -x.shape[2] % height)))
        if self.norm is not None:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x


class SwinTransformer(Backbone):
    """Swin Transformer with feature maps "p0", "p1", ... of strides 4, 8, ..., each with its own norm."""

    def __init__(
        self,
        pretrain_img_size=224,
        patch_size=4,
        in_chans=3,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.2,
        norm_layer=nn.LayerNorm,
        ape=False,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        use_checkpoint=False,
    ):
        """
        Args:
            pretrain_img_size: side length or (height, width) of the pretraining images, which determines the
                size of the absolute position embedding.
            patch_size: side length or (height, width) of a patch in pixels.
            in_chans: number of image channels.
            embed_dim: channels of the first stage; they double from stage to stage.
            depths: number of blocks of each stage.
            num_heads: number of attention heads of each stage.
            window_size: side length of a window.
            mlp_ratio: hidden channels of each MLP, as a multiple of its block's channels.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            qk_scale: scale of the logits; `head_dim ** -0.5` by default.
            drop_rate: dropout probability after linear layers and after the position embedding.
            attn_drop_rate: dropout probability of the attention weights.
            drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: callable that creates a norm from a number of channels.
            ape: whether to add an absolute position embedding.
            patch_norm: whether a norm follows the patch embedding.
            out_indices: stages to return; stage i is named "p{i}".
            frozen_stages: number of the last frozen part: -1 for none, 0 for the patch embedding, 1 for the
                position embedding too, 2 for the first stage too, 3 for the second too, and so on.
            use_checkpoint: whether to use activation checkpointing, which saves memory.

        Raises:
            ValueError: `depths` and `num_heads` differ in length, or `out_indices` has an unknown stage.
        """
        super().__init__()
        num_stages = len(depths)
        if len(num_heads) != num_stages:
            raise ValueError(
                f"num_heads {list(num_heads)} and depths {list(depths)} must have the same length"
            )
        if not out_indices or any(i not in range(num_stages) for i in out_indices):
            raise ValueError(
                f"out_indices {list(out_indices)} must be among the stages 0 to {num_stages - 1}"
            )
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm_layer if patch_norm else None)
        self.ape = ape
        if ape:
            size = [s // p for s, p in zip(pair(pretrain_img_size), pair(patch_size))]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *size))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, sum(depths))
        for i in range(num_stages):
            layer = BasicLayer(
                embed_dim * 2**i,
                depths[i],
                num_heads[i],
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                norm_layer=norm_layer,
                downsample=PatchMerging if i < num_stages - 1 else None,
                use_checkpoint=use_checkpoint,
            )
            self.layers.append(layer)
        self.num_features = [embed_dim * 2**i for i in range(num_stages)]
        for i in self.out_indices:
            self.add_module(f"norm{i}", norm_layer(self.num_features[i]))
        self.apply(init_transformer_weights)

        stride = math.lcm(*pair(patch_size))
        self._size_divisibility = stride * 2 ** (num_stages - 1)
        self._out_features = [f"p{i}" for i in self.out_indices]
        self._out_feature_channels = {f"p{i}": self.num_features[i] for i in self.out_indices}
        self._out_feature_strides = {f"p{i}": stride * 2**i for i in self.out_indices}
        self._freeze_stages()

    @property
    def size_divisibility(self) -> int:
        """The stride of the last stage. Any size works; at multiples of this, feature maps halve exactly."""
        return self._size_divisibility

    def _freeze_stages(self):
        frozen: list[nn.Module] = []
        if self.frozen_stages >= 0:
            frozen.append(self.patch_embed)
        if self.frozen_stages >= 1 and self.ape:
            self.absolute_pos_embed.requires_grad = False
        if self.frozen_stages >= 2:
            frozen += [self.pos_drop, *self.layers[: self.frozen_stages - 1]]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode=True):
        """Set training mode; frozen parts stay in evaluation mode, without dropout."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, x):
        """Compute the features.

        Args:
            x: (B, in_chans, H, W) float tensor of normalized images of any size.

        Returns:
            dict[str, Tensor]: name to (B, C_i, ceil(H/stride), ceil(W/stride)) feature map, from high to low
            resolution.
        """
        x = self.patch_embed(x)
        H, W = x.shape[2:]
        if self.ape:
            position = F.interpolate(self.absolute_pos_embed.float(), size=(H, W), mode="bicubic")
            x = x + position.to(x.dtype)
        x = self.pos_drop(x.flatten(2).transpose(1, 2))
        outputs = {}
        for i, layer in enumerate(self.layers):
            out, out_H, out_W, x, H, W = layer(x, H, W)
            if i in self.out_indices:
                out = getattr(self, f"norm{i}")(out)
                outputs[f"p{i}"] = out.unflatten(1, (out_H, out_W)).permute(0, 3, 1, 2)
        return outputs
