"""Plain vision transformers as detection backbones: ViTDet (arXiv:2203.16527).

Shape legend: N images, H and W height and width of a feature map in tokens, C channels.
"""

from typing import Any

import torch
from torch import nn

from detlib.layers import Conv2d, get_norm
from detlib.layers.blocks import CNNBlockBase
from detlib.layers.fvcore_nn import weight_init
from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.utils import (
    DropPath,
    Mlp,
    PatchEmbed,
    decomposed_attention,
    drop_path_rates,
    get_abs_pos,
    init_transformer_weights,
    run_block,
    window_partition,
    window_unpartition,
)

__all__ = ["SimpleFeaturePyramid", "ViT", "get_vit_lr_decay_rate"]


class Attention(nn.Module):
    """Multi-head self-attention over a feature map, optionally with decomposed relative positions."""

    def __init__(
        self, dim, num_heads=8, qkv_bias=True, use_rel_pos=False, rel_pos_zero_init=True, input_size=None
    ):
        """
        Args:
            dim: channels C.
            num_heads: number of attention heads; must divide `dim`.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            use_rel_pos: whether to learn relative position embeddings.
            rel_pos_zero_init: whether to initialize these with zeros instead of small random values.
            input_size: (height, width) of the feature map for which the position tables are created; they are
                interpolated for other sizes.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {dim} channels (embed_dim)")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = self.rel_pos_w = None
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, dim // num_heads))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x):
        """Map (N, H, W, C) to the same shape; every token attends to all tokens of its feature map."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        size = (height, width)
        x = decomposed_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, size, size)
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, channels))


class ResBottleneckBlock(CNNBlockBase):
    """The convolutional propagation block: 1x1, 3x3 and 1x1 convolutions with an identity shortcut.

    Its last norm is initialized to zero, so that a new block is the identity.
    """

    def __init__(self, in_channels, out_channels, bottleneck_channels, norm="LN", act_layer=nn.GELU):
        """
        Args:
            in_channels: input channels.
            out_channels: output channels; must equal `in_channels`.
            bottleneck_channels: channels of the 3x3 convolution.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            act_layer: callable without arguments that creates an activation.
        """
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(in_channels, bottleneck_channels, 1, bias=False)
        self.norm1: Any = get_norm(norm, bottleneck_channels)
        self.act1 = act_layer()
        self.conv2 = Conv2d(bottleneck_channels, bottleneck_channels, 3, padding=1, bias=False)
        self.norm2: Any = get_norm(norm, bottleneck_channels)
        self.act2 = act_layer()
        self.conv3 = Conv2d(bottleneck_channels, out_channels, 1, bias=False)
        self.norm3: Any = get_norm(norm, out_channels)
        for conv in (self.conv1, self.conv2, self.conv3):
            weight_init.c2_msra_fill(conv)
        nn.init.zeros_(self.norm3.weight)  # type: ignore[union-attr]
        nn.init.zeros_(self.norm3.bias)  # type: ignore[union-attr]

    def forward(self, x):
        """Map (N, C, H, W) to the same shape."""
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.act2(self.norm2(self.conv2(out)))
        return x + self.norm3(self.conv3(out))


class Block(nn.Module):
    """A pre-norm transformer block with global or window attention."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path=0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        use_rel_pos=False,
        rel_pos_zero_init=True,
        window_size=0,
        use_residual_block=False,
        input_size=None,
    ):
        """
        Args:
            dim: channels C.
            num_heads, qkv_bias, use_rel_pos, rel_pos_zero_init: see `Attention`.
            mlp_ratio: hidden channels of the MLP, as a multiple of C.
            drop_path: probability of dropping each branch in training.
            norm_layer: callable that creates a norm from C.
            act_layer: callable without arguments that creates an activation.
            window_size: side length of the windows in tokens; 0 for global attention.
            use_residual_block: whether a `ResBottleneckBlock` follows.
            input_size: (height, width) of the feature map for which the position tables are created; used
                only without windows.
        """
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            use_rel_pos=use_rel_pos,
            rel_pos_zero_init=rel_pos_zero_init,
            input_size=(window_size, window_size) if window_size else input_size,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.window_size = window_size
        self.use_residual_block = use_residual_block
        if use_residual_block:
            self.residual = ResBottleneckBlock(dim, dim, dim // 2, norm="LN", act_layer=act_layer)

    def forward(self, x):
        """Map (N, H, W, C) to the same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.use_residual_block:
            x = self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x

    def _attend(self, x):
        if not self.window_size:
            return self.attn(x)
        windows, padded = window_partition(x, self.window_size)
        return window_unpartition(self.attn(windows), self.window_size, padded, x.shape[1:3])


class ViT(Backbone):
    """A plain vision transformer with one feature map, whose stride is the patch size."""

    def __init__(
        self,
        img_size=1024,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        use_abs_pos=True,
        use_rel_pos=False,
        rel_pos_zero_init=True,
        window_size=0,
        window_block_indexes=(),
        residual_block_indexes=(),
        use_act_checkpoint=False,
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        out_feature="last_feat",
    ):
        """
        Args:
            img_size: side length in pixels of the square image for which the tables of relative positions are
                created. They are interpolated for images of other sizes.
            patch_size: side length of a patch, in pixels.
            in_chans: number of image channels.
            embed_dim: channels C of the tokens.
            depth: number of blocks.
            num_heads: number of attention heads.
            mlp_ratio: hidden channels of each MLP, as a multiple of C.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: callable that creates a norm from C.
            act_layer: callable without arguments that creates an activation.
            use_abs_pos: whether to add absolute position embeddings.
            use_rel_pos: whether attention has relative position embeddings.
            rel_pos_zero_init: whether to initialize the relative position embeddings with zeros.
            window_size: side length of the attention windows, in tokens.
            window_block_indexes: indices of the blocks with window attention.
            residual_block_indexes: indices of the blocks that are followed by a `ResBottleneckBlock`.
            use_act_checkpoint: whether to use activation checkpointing, which saves memory.
            pretrain_img_size: side length of the pretraining images, which determines the number of absolute
                position embeddings.
            pretrain_use_cls_token: whether the first absolute position embedding is that of a class token.
            out_feature: name of the feature map.
        """
        super().__init__()
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.use_act_checkpoint = use_act_checkpoint
        self.patch_embed = PatchEmbed(
            (patch_size, patch_size), (patch_size, patch_size), in_chans=in_chans, embed_dim=embed_dim
        )
        self.pos_embed = None
        if use_abs_pos:
            num_positions = (pretrain_img_size // patch_size) ** 2 + bool(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                window_size=window_size if i in window_block_indexes else 0,
                use_residual_block=i in residual_block_indexes,
                input_size=(img_size // patch_size, img_size // patch_size),
            )
            for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_transformer_weights)

    def forward(self, x):
        """Compute the feature map.

        Args:
            x: (N, in_chans, H, W) images; pixels beyond the last full patch are ignored.

        Returns:
            dict[str, Tensor]: `out_feature` to (N, C, H // patch_size, W // patch_size) feature map.
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + get_abs_pos(self.pos_embed, self.pretrain_use_cls_token, x.shape[1:3])
        for block in self.blocks:
            x = run_block(block, x, self.use_act_checkpoint)
        return {self._out_features[0]: x.permute(0, 3, 1, 2)}


def _rescale(scale: float, dim: int, norm) -> tuple[list[nn.Module], int]:
    """Return layers that resize a feature map of `dim` channels by `scale`, and their output channels."""
    if scale == 4.0:
        # Without a norm, an identity keeps the positions in the sequence, and so the parameter names.
        between = get_norm(norm, dim // 2) or nn.Identity()
        up = nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2)
        return [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2), between, nn.GELU(), up], dim // 4
    if scale == 2.0:
        return [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)], dim // 2
    if scale == 1.0:
        return [], dim
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2)], dim
    raise ValueError(f"SimpleFeaturePyramid scale_factors must be among 4.0, 2.0, 1.0 and 0.5; got {scale}")


def _project(in_channels: int, out_channels: int, norm) -> list[nn.Module]:
    """Return a 1x1 and a 3x3 convolution with `out_channels`, each with a norm."""

    def conv(channels, kernel_size):
        return Conv2d(
            channels,
            out_channels,
            kernel_size=kernel_size,
            padding=kernel_size // 2,
            bias=not norm,
            norm=get_norm(norm, out_channels),
        )

    return [conv(in_channels, 1), conv(out_channels, 3)]


class SimpleFeaturePyramid(Backbone):
    """A feature pyramid whose levels are all computed from one feature map.

    The features are named by their level: "p2" has stride 2**2, "p6" has stride 2**6.
    """

    def __init__(self, net, in_feature, out_channels, scale_factors, top_block=None, norm="LN", square_pad=0):
        """
        Args:
            net: the `Backbone` below the pyramid.
            in_feature: name of its feature to use.
            out_channels: channels of every level.
            scale_factors: sizes of the levels as multiples of the feature's size, from high to low
                resolution; each must be 4, 2, 1 or 0.5, and half the previous one.
            top_block: a module that computes additional, coarser levels, see `FPN`.
            norm: norm of the convolutions, see `detlib.layers.get_norm`; convolutions with a norm have no
                bias.
            square_pad: if above 0, images are padded to squares of this side length, in pixels.

        Raises:
            ValueError: the feature is unknown, the scale factors are illegal, or the strides are not powers
                of two.
        """
        super().__init__()
        shapes = net.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"SimpleFeaturePyramid in_feature {in_feature!r}: the network has {list(shapes)}"
            )
        dim, stride = shapes[in_feature].channels, shapes[in_feature].stride
        strides = [int(stride / scale) for scale in scale_factors]
        if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise ValueError(
                "SimpleFeaturePyramid scale_factors must go from high to low resolution, each half the "
                f"previous one; got {list(scale_factors)}"
            )
        if strides[0] < 1 or strides[0] & (strides[0] - 1):
            raise ValueError(
                f"SimpleFeaturePyramid needs strides that are powers of two; {in_feature!r} of stride "
                f"{stride} and scale_factors {list(scale_factors)} give {strides}"
            )

        levels = [stride.bit_length() - 1 for stride in strides]
        self.stages = []
        for level, scale in zip(levels, scale_factors):
            layers, channels = _rescale(scale, dim, norm)
            stage = nn.Sequential(*layers, *_project(channels, out_channels, norm))
            self.add_module(f"simfp_{level}", stage)
            self.stages.append(stage)
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        if top_block is not None:
            levels += range(levels[-1] + 1, levels[-1] + 1 + top_block.num_levels)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._square_pad = square_pad

    def layers_above(self, name: str) -> int:
        """Return the number of ViT blocks above a parameter of this backbone, for layer-wise decay."""
        return _layers_above(f".{name}", len(self.net.blocks))

    @property
    def padding_constraints(self) -> dict[str, int]:
        """{"square_size": side length in pixels, 0 for none}.

        Without a square, images are not padded, as in the published models: pixels beyond the last full patch
        are ignored.
        """
        return {"square_size": self._square_pad}

    def forward(self, x):
        """Compute the feature pyramid.

        Args:
            x: input of `net`, (N, C, H, W) images.

        Returns:
            dict[str, Tensor]: name to (N, out_channels, H/stride, W/stride) feature map, from high to low
            resolution.
        """
        features = self.net(x)
        results = [stage(features[self.in_feature]) for stage in self.stages]
        if self.top_block is not None:
            source = features.get(self.top_block.in_feature)
            if source is None:
                source = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


def get_vit_lr_decay_rate(name, lr_decay_rate=1.0, num_layers=12):
    """Return the learning rate factor of a parameter of a ViT detector, with layer-wise decay.

    Args:
        name: full name of the parameter in the model, such as "backbone.net.blocks.3.mlp.fc1.weight".
        lr_decay_rate: ratio of the learning rates of a block and the block above it.
        num_layers: number of blocks of the ViT.

    Returns:
        float: `lr_decay_rate` to the power of the number of blocks above the parameter. Embeddings count as
        below the first block. Parameters outside of blocks (the pyramid, the heads, the propagation blocks)
        have the factor 1.
    """
    return lr_decay_rate ** _layers_above(name, num_layers) if name.startswith("backbone") else 1.0


def _layers_above(name: str, num_layers: int) -> int:
    """Return the number of blocks above a parameter of a ViT; 0 for parameters outside of blocks."""
    if ".pos_embed" in name or ".patch_embed" in name:
        return num_layers + 1
    if ".blocks." in name and ".residual." not in name:
        return num_layers - int(name.partition(".blocks.")[2].partition(".")[0])
    return 0
