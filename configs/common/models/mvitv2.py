"""MViTv2 backbones, from tiny to huge."""

from functools import partial

from torch import nn

from detlib.config import LazyCall as L
from detlib.modeling import MViT

_SIZES = {
    "T": dict(embed_dim=96, depth=10, num_heads=1, last_block_indexes=(0, 2, 7, 9), drop_path_rate=0.2),
    "S": dict(embed_dim=96, depth=16, num_heads=1, last_block_indexes=(0, 2, 13, 15), drop_path_rate=0.2),
    "B": dict(embed_dim=96, depth=24, num_heads=1, last_block_indexes=(1, 4, 20, 23), drop_path_rate=0.4),
    "L": dict(embed_dim=144, depth=48, num_heads=2, last_block_indexes=(1, 7, 43, 47), drop_path_rate=0.5),
    "H": dict(
        embed_dim=192,
        depth=80,
        num_heads=3,
        last_block_indexes=(3, 11, 71, 79),
        drop_path_rate=0.6,
        use_act_checkpoint=True,
    ),
}


def mvitv2(size):
    """Return the node of a backbone. `size` is T, S, B, L or H."""
    return L(MViT)(
        **_SIZES[size],
        residual_pooling=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_features=("scale2", "scale3", "scale4", "scale5"),
    )
