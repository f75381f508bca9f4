"""Transformer backbones for DINO."""

from functools import partial

from torch import nn

from detlib.config import LazyCall as L
from detlib.layers import ShapeSpec
from detlib.modeling import SimpleFeaturePyramid, SwinTransformer, ViT
from detlib.modeling.backbone.fpn import LastLevelMaxPool


def use_swin(model, embed_dim, depths, num_heads, window_size, pretrain_img_size, drop_path_rate):
    """Set the backbone to a Swin transformer, with outputs from its second stage (stride 8) on."""
    model.backbone = L(SwinTransformer)(
        pretrain_img_size=pretrain_img_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        window_size=window_size,
        out_indices=(1, 2, 3),
    )
    model.neck.input_shapes = {f"p{i}": ShapeSpec(channels=embed_dim * 2**i) for i in (1, 2, 3)}
    model.neck.in_features = ["p1", "p2", "p3"]


def use_vit(model, embed_dim, depth, num_heads, drop_path_rate):
    """Set the backbone to a plain ViT with a simple feature pyramid of all four scales."""
    model.backbone = L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=1024,
            patch_size=16,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            window_size=14,
            mlp_ratio=4,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            # The last block of each quarter has global attention.
            window_block_indexes=[i for i in range(depth) if (i + 1) % (depth // 4)],
            residual_block_indexes=[],
            use_rel_pos=True,
            out_feature="last_feat",
        ),
        in_feature="${.net.out_feature}",
        out_channels=256,
        scale_factors=(2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(),
        norm="LN",
        square_pad=1024,
    )
    model.neck.input_shapes = {f"p{i}": ShapeSpec(channels=256) for i in (3, 4, 5, 6)}
    model.neck.in_features = ["p3", "p4", "p5", "p6"]
