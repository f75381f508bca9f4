"""Multiscale vision transformers, version 2 (MViTv2, arXiv:2112.01526), as detection backbones.

Shape legend: N images, H and W height and width of a feature map in tokens, C channels, D channels per head.
"""

from typing import cast

import torch
from torch import nn

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

__all__ = ["MViT"]


def attention_pool(x: torch.Tensor, pool: nn.Module, norm: nn.Module | None = None) -> torch.Tensor:
    """Apply a channels-first pooling layer, and then a norm, to an (N, H, W, C) feature map."""
    x = pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x if norm is None else norm(x)


class MultiScaleAttention(nn.Module):
    """Pooling attention: queries, keys and values are pooled, each with its own convolution and norm."""

    def __init__(
        self,
        dim,
        dim_out,
        num_heads,
        qkv_bias=True,
        norm_layer=nn.LayerNorm,
        pool_kernel=(3, 3),
        stride_q=1,
        stride_kv=1,
        residual_pooling=True,
        window_size=0,
        use_rel_pos=False,
        rel_pos_zero_init=True,
        input_size=None,
    ):
        """
        Args:
            dim: input channels.
            dim_out: output channels.
            num_heads: number of attention heads, of D = dim_out / num_heads channels.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            norm_layer: callable that creates a norm from D, used after pooling.
            pool_kernel: (height, width) of the pooling convolutions.
            stride_q: stride of the pooling of queries, and so of the block.
            stride_kv: stride of the pooling of keys and values.
            residual_pooling: whether to add the pooled queries to the output of the attention.
            window_size: side length of the windows, in tokens before pooling; 0 for global attention.
            use_rel_pos: whether to learn relative position embeddings.
            rel_pos_zero_init: whether to initialize these with zeros instead of small random values.
            input_size: (height, width), equal, of the feature map for which the position tables are created;
                used only without windows.

        Raises:
            ValueError: `num_heads` does not divide `dim_out`.
        """
        super().__init__()
        if dim_out % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {dim_out} channels of a block")
        head_dim = dim_out // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim_out * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            pool = nn.Conv2d(
                head_dim,
                head_dim,
                tuple(pool_kernel),
                stride=stride,
                padding=tuple(length // 2 for length in pool_kernel),
                groups=head_dim,
                bias=False,
            )
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", norm_layer(head_dim))
        self.window_size = window_size
        self.q_window, self.kv_window = window_size // stride_q, window_size // stride_kv
        self.residual_pooling = residual_pooling
        self.rel_pos_h = self.rel_pos_w = None
        if use_rel_pos:
            size = window_size or input_size[0]
            length = 2 * max(size // stride_q, size // stride_kv) - 1
            self.rel_pos_h = nn.Parameter(torch.zeros(length, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(length, head_dim))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x):
        """Map (N, H, W, dim) to (N, ceil(H / stride_q), ceil(W / stride_q), dim_out)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.reshape(3, batch * self.num_heads, height, width, -1)
        pooled_q = attention_pool(q, self.pool_q, self.norm_q)  # (N * heads, H', W', D), like k and v
        k = attention_pool(k, self.pool_k, self.norm_k)
        v = attention_pool(v, self.pool_v, self.norm_v)

        # Pooling comes before the partition, so it crosses the borders of windows.
        q = pooled_q
        if self.window_size:
            q, padded = window_partition(q, self.q_window)
            k, v = (window_partition(t, self.kv_window)[0] for t in (k, v))
            if len(q) != len(k):
                raise ValueError(
                    f"The window size {self.window_size} is not a multiple of the pooling strides: "
                    f"windows would be {self.q_window} tokens wide for queries and {self.kv_window} for "
                    "keys; change adaptive_window_size or adaptive_kv_stride"
                )
        q_size, k_size = q.shape[1:3], k.shape[1:3]
        # The heads are part of the batch dimension here, so every entry has one head.
        q, k, v = (t.flatten(1, 2)[:, None] for t in (q, k, v))
        x = decomposed_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, q_size, k_size)
        x = x.reshape(-1, *q_size, x.shape[-1])
        if self.window_size:
            x = window_unpartition(x, self.q_window, padded, pooled_q.shape[1:3])

        if self.residual_pooling:
            x = x + pooled_q
        x = x.unflatten(0, (batch, self.num_heads)).permute(0, 2, 3, 1, 4)
        return self.proj(x.flatten(3))


class MultiScaleBlock(nn.Module):
    """A pre-norm transformer block that may change the resolution and the channels."""

    def __init__(
        self,
        dim,
        dim_out,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path=0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        qkv_pool_kernel=(3, 3),
        stride_q=1,
        stride_kv=1,
        residual_pooling=True,
        window_size=0,
        use_rel_pos=False,
        rel_pos_zero_init=True,
        input_size=None,
    ):
        """
        Args:
            dim, dim_out, num_heads, qkv_bias, norm_layer, stride_q, stride_kv, residual_pooling, window_size,
                use_rel_pos, rel_pos_zero_init, input_size: see `MultiScaleAttention`.
            mlp_ratio: hidden channels of the MLP, as a multiple of `dim_out`.
            drop_path: probability of dropping each branch in training.
            act_layer: callable without arguments that creates an activation.
            qkv_pool_kernel: see `pool_kernel` of `MultiScaleAttention`.
        """
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = MultiScaleAttention(
            dim,
            dim_out,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            pool_kernel=qkv_pool_kernel,
            stride_q=stride_q,
            stride_kv=stride_kv,
            residual_pooling=residual_pooling,
            window_size=window_size,
            use_rel_pos=use_rel_pos,
            rel_pos_zero_init=rel_pos_zero_init,
            input_size=input_size,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), act_layer)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        kernel = stride_q + 1
        self.pool_skip = nn.MaxPool2d(kernel, stride_q, padding=kernel // 2) if stride_q > 1 else None

    def forward(self, x):
        """Map (N, H, W, dim) to (N, ceil(H / stride_q), ceil(W / stride_q), dim_out)."""
        normed = self.norm1(x)
        if self.proj is not None:
            x = self.proj(normed)
        if self.pool_skip is not None:
            x = attention_pool(x, self.pool_skip)
        x = x + self.drop_path(self.attn(normed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MViT(Backbone):
    """MViTv2 with hybrid window attention: four stages "scale2" to "scale5" of strides 4 to 32.

    Attention is restricted to windows, except in the last block of each of the last three stages. The first
    block of a stage halves the resolution by pooling its queries. Channels and heads double from stage to
    stage; windows and the strides of key and value pooling shrink with the resolution.
    """

    def __init__(
        self,
        img_size=224,
        patch_kernel=(7, 7),
        patch_stride=(4, 4),
        patch_padding=(3, 3),
        in_chans=3,
        embed_dim=96,
        depth=16,
        num_heads=1,
        last_block_indexes=(0, 2, 11, 15),
        qkv_pool_kernel=(3, 3),
        adaptive_kv_stride=4,
        adaptive_window_size=56,
        residual_pooling=True,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        use_abs_pos=False,
        use_rel_pos=True,
        rel_pos_zero_init=True,
        use_act_checkpoint=False,
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        out_features=("scale2", "scale3", "scale4", "scale5"),
    ):
        """
        Args:
            img_size: side length in pixels of the square image for which the tables of relative positions are
                created. They are interpolated for images of other sizes.
            patch_kernel, patch_stride, patch_padding: (height, width) of the first convolution.
            in_chans: number of image channels.
            embed_dim: channels of the first stage.
            depth: number of blocks.
            num_heads: number of attention heads of the first stage.
            last_block_indexes: index of the last block of each stage.
            qkv_pool_kernel: (height, width) of the pooling convolutions.
            adaptive_kv_stride: stride of the pooling of keys and values in the first stage.
            adaptive_window_size: side length of the windows in the first stage, in tokens.
            residual_pooling: whether to add the pooled queries to the output of the attention.
            mlp_ratio: hidden channels of each MLP, as a multiple of its output channels.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: callable that creates a norm from a number of channels.
            act_layer: callable without arguments that creates an activation.
            use_abs_pos: whether to add absolute position embeddings.
            use_rel_pos: whether attention has relative position embeddings.
            rel_pos_zero_init: whether to initialize the relative position embeddings with zeros.
            use_act_checkpoint: whether to use activation checkpointing, which saves memory.
            pretrain_img_size: side length of the pretraining images, which determines the number of absolute
                position embeddings.
            pretrain_use_cls_token: whether the first absolute position embedding is that of a class token.
            out_features: names of the stages to return.

        Raises:
            ValueError: `out_features` names a stage that does not exist with this `last_block_indexes` and
                `depth`.
        """
        super().__init__()
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.use_act_checkpoint = use_act_checkpoint
        self.patch_embed = PatchEmbed(patch_kernel, patch_stride, patch_padding, in_chans, embed_dim)
        self.pos_embed = None
        if use_abs_pos:
            grid = [pretrain_img_size // stride for stride in patch_stride]
            num_positions = grid[0] * grid[1] + bool(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.blocks = nn.ModuleList()
        plan = _plan_blocks(
            depth,
            tuple(last_block_indexes),
            dim=embed_dim,
            num_heads=num_heads,
            stride_kv=adaptive_kv_stride,
            window_size=adaptive_window_size,
            input_size=tuple(img_size // stride for stride in patch_stride),
        )
        for spec, rate in zip(plan, drop_path_rates(drop_path_rate, depth)):
            block = MultiScaleBlock(
                **spec,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                qkv_pool_kernel=qkv_pool_kernel,
                residual_pooling=residual_pooling,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
            )
            self.blocks.append(block)

        stages = [i for i in last_block_indexes if i < depth]
        self._stage_of_block = {i: f"scale{stage}" for stage, i in enumerate(stages, start=2)}
        names = list(self._stage_of_block.values())
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(
                f"MViT out_features {list(out_features)}: with depth {depth} and last_block_indexes "
                f"{list(last_block_indexes)} there are {names}"
            )
        self._out_features = tuple(out_features)
        self._out_feature_channels, self._out_feature_strides = {}, {}
        for level, (i, name) in enumerate(self._stage_of_block.items()):
            if name in self._out_features:
                channels = plan[i]["dim_out"]
                self._out_feature_channels[name] = channels
                self._out_feature_strides[name] = patch_stride[0] * 2**level
                self.add_module(f"{name}_norm", norm_layer(channels))
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_transformer_weights)

    def forward(self, x):
        """Compute the feature maps.

        Args:
            x: (N, in_chans, H, W) images.

        Returns:
            dict[str, Tensor]: name to (N, C_f, ceil(H/stride), ceil(W/stride)) feature map.
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + get_abs_pos(self.pos_embed, self.pretrain_use_cls_token, x.shape[1:3])
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, self.use_act_checkpoint)
            name = self._stage_of_block.get(i)
            if name in self._out_features:
                norm = getattr(self, f"{name}_norm")
                outputs[name] = norm(x).permute(0, 3, 1, 2).contiguous()
        return outputs


def _plan_blocks(
    depth: int,
    last_block_indexes: tuple[int, ...],
    *,
    dim: int,
    num_heads: int,
    stride_kv: int,
    window_size: int,
    input_size: tuple[int, int],
) -> list[dict]:
    """Return the arguments of `MultiScaleBlock` that differ between the blocks, for each block.

    `dim`, `num_heads`, `stride_kv`, `window_size` and `input_size` (in tokens) are those of the first stage.
    """
    plan, dim_out = [], dim
    for i in range(depth):
        starts_stage = i - 1 in last_block_indexes
        plan.append(
            dict(
                dim=dim,
                dim_out=dim_out,
                num_heads=num_heads,
                stride_q=2 if starts_stage else 1,
                # Blocks with global attention over a large feature map pool twice as much.
                stride_kv=stride_kv * 2 if i in last_block_indexes[1:3] else stride_kv,
                window_size=0 if i in last_block_indexes[1:] else window_size,
                input_size=cast(tuple[int, int], input_size),
            )
        )
        dim = dim_out
        if i in last_block_indexes:
            dim_out, num_heads = dim_out * 2, num_heads * 2
            stride_kv = max(stride_kv // 2, 1)
        if starts_stage:
            window_size, input_size = window_size // 2, tuple(length // 2 for length in input_size)
    return plan
