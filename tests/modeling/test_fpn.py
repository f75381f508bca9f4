"""Tests of FPN against torchvision with converted weights."""

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool as TorchvisionMaxPool
from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TorchvisionP6P7

from detlib.config import get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling.backbone import FPN, Backbone, LastLevelMaxPool, LastLevelP6P7, build_backbone

CHANNELS, STRIDES = [6, 10, 12], [8, 16, 32]


class IdentityBackbone(Backbone):
    """A backbone that returns its inputs as "res3" to "res5"."""

    def __init__(self, strides=STRIDES):
        super().__init__()
        self._out_features = ["res3", "res4", "res5"]
        self._out_feature_channels = dict(zip(self._out_features, CHANNELS))
        self._out_feature_strides = dict(zip(self._out_features, strides))

    def forward(self, x):
        return dict(zip(self._out_features, x))


def random_features(height=64, width=96):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, -(-height // s), -(-width // s), generator=g) for c, s in zip(CHANNELS, STRIDES)
    ]


def pair(ours_top, theirs_top):
    torch.manual_seed(0)
    ours = FPN(IdentityBackbone(), ["res3", "res4", "res5"], 8, top_block=ours_top)
    theirs = FeaturePyramidNetwork(CHANNELS, 8, extra_blocks=theirs_top)
    for i in range(3):
        for kind, blocks in (("lateral", theirs.inner_blocks), ("output", theirs.layer_blocks)):
            conv = getattr(ours, f"fpn_{kind}{i + 3}")
            blocks[i][0].load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()})
            conv.load_state_dict(blocks[i][0].state_dict())
    if isinstance(ours_top, LastLevelP6P7):
        theirs_top.load_state_dict(ours_top.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "ours_top, theirs_top, names",
    [
        (None, None, ["p3", "p4", "p5"]),
        (LastLevelMaxPool(), TorchvisionMaxPool(), ["p3", "p4", "p5", "p6"]),
        (LastLevelP6P7(12, 8), TorchvisionP6P7(12, 8), ["p3", "p4", "p5", "p6", "p7"]),
        (LastLevelP6P7(8, 8, "p5"), TorchvisionP6P7(8, 8), ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_features_match_torchvision(ours_top, theirs_top, names):
    ours, theirs = pair(ours_top, theirs_top)
    features = random_features()
    if isinstance(theirs_top, TorchvisionP6P7):
        theirs_top.use_P5 = ours_top.in_feature == "p5"
    got, want = ours(features), theirs(dict(zip(["0", "1", "2"], features)))
    assert list(got) == list(ours.output_shape()) == names
    for (name, value), reference in zip(got.items(), want.values(), strict=True):
        torch.testing.assert_close(value, reference)
        shape = ours.output_shape()[name]
        assert shape.channels == 8 and shape.stride == 2 ** int(name[1:])


def test_fuse_type_avg_averages_levels():
    ours, theirs = pair(None, None)
    ours._fuse_type = "avg"
    got = ours(random_features())
    features = random_features()
    laterals = [block[0](x) for block, x in zip(theirs.inner_blocks, features)]
    top = laterals[2]
    for i in (1, 0):
        top = (laterals[i] + top.repeat_interleave(2, 2).repeat_interleave(2, 3)) / 2
    torch.testing.assert_close(got["p3"], theirs.layer_blocks[0](top))


def test_odd_sizes_are_cropped():
    out = FPN(IdentityBackbone(), ["res3", "res4", "res5"], 8)(random_features(70, 100))
    assert [tuple(v.shape[2:]) for v in out.values()] == [(9, 13), (5, 7), (3, 4)]


def test_convolutions_with_norm_have_no_bias():
    fpn = FPN(IdentityBackbone(), ["res4", "res5"], 32, norm="GN")
    assert list(fpn.output_shape()) == ["p4", "p5"]
    assert fpn.fpn_lateral4.bias is None and isinstance(fpn.fpn_output5.norm, nn.GroupNorm)
    fpn = FPN(IdentityBackbone(), ["res4", "res5"], 32)
    assert not fpn.fpn_output5.bias.any()
    bound = (3 / (32 * 9)) ** 0.5  # uniform weights of variance 1 / fan_in
    assert 0.95 * bound < fpn.fpn_output5.weight.abs().max() <= bound


def test_padding_constraints_have_stride_and_square():
    fpn = FPN(IdentityBackbone(), ["res3", "res4", "res5"], 8, square_pad=512, top_block=LastLevelMaxPool())
    assert fpn.size_divisibility == 32 and fpn.padding_constraints == {"square_size": 512}
    assert IdentityBackbone().size_divisibility == 0 and IdentityBackbone().padding_constraints == {}


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"in_features": ["res3", "res5"]}, r"must double in stride one by one, got \[8, 32\]"),
        ({"in_features": ["res2"]}, r"in_features \['res2'\].*\['res3', 'res4', 'res5'\]"),
        ({"in_features": []}, r"in_features \[\]"),
        ({"in_features": ["res5"], "fuse_type": "max"}, "fuse_type is 'max'"),
        ({"in_features": ["res5"], "bottom_up": IdentityBackbone([8, 16, 24])}, "'res5' has 24"),
    ],
)
def test_illegal_arguments_are_rejected(kwargs, words):
    with pytest.raises(ValueError, match=words):
        FPN(**{"bottom_up": IdentityBackbone(), "out_channels": 8, **kwargs})


def fpn_config(name):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


@pytest.mark.parametrize(
    "name, last, strides",
    [
        ("build_resnet_fpn_backbone", ["p6"], [8, 16, 32, 64]),
        ("build_retinanet_resnet_fpn_backbone", ["p6", "p7"], [8, 16, 32, 64, 128]),
    ],
)
def test_config_builds_all_levels(name, last, strides):
    fpn = build_backbone(fpn_config(name))
    assert list(fpn.output_shape()) == ["p3", "p4", "p5", *last]
    assert [s.stride for s in fpn.output_shape().values()] == strides
    assert fpn.output_shape()["p3"] == ShapeSpec(channels=16, stride=8)
    out = fpn(torch.zeros(1, 3, 128, 64))
    assert [tuple(v.shape[1:]) for v in out.values()] == [(16, 128 // s, -(-64 // s)) for s in strides]


def test_config_errors_name_the_key():
    cfg = fpn_config("build_resnet_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    with pytest.raises(ValueError, match=r"MODEL.FPN.IN_FEATURES is \['res2', 'res3'\].*'res5'"):
        build_backbone(cfg)
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    cfg.MODEL.FPN.FUSE_TYPE = "max"
    with pytest.raises(ValueError, match="MODEL.FPN.FUSE_TYPE is 'max'"):
        build_backbone(cfg)
    cfg = fpn_config("build_retinanet_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4"]
    with pytest.raises(ValueError, match="MODEL.RESNETS.OUT_FEATURES must contain 'res5'"):
        build_backbone(cfg)
