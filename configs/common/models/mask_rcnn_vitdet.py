"""Mask R-CNN with a plain ViT-B and a simple feature pyramid (ViTDet)."""

from functools import partial

from torch import nn

from detlib.config import LazyCall as L
from detlib.modeling import SimpleFeaturePyramid, ViT
from detlib.modeling.backbone.fpn import LastLevelMaxPool

from ..data.constants import constants
from .edits import deepen_heads, use_rgb
from .mask_rcnn_fpn import model

use_rgb(model)
deepen_heads(model, norm="LN")

model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        # Every third block has global attention.
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        residual_block_indexes=[],
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=1024,
)
