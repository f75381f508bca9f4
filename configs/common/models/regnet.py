"""RegNets with 4 GFLOPs. Recipes set the norm."""

from detlib.config import LazyCall as L
from detlib.modeling.backbone import RegNet
from detlib.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

regnetx_4gf = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    out_features=["s1", "s2", "s3", "s4"],
)

regnety_4gf = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=22,
    w_a=31.41,
    w_0=96,
    w_m=2.24,
    group_width=64,
    se_ratio=0.25,
    out_features=["s1", "s2", "s3", "s4"],
)

# Standard deviation of ImageNet's BGR channels, for weights that are not from Caffe.
pixel_std = [57.375, 57.12, 58.395]
