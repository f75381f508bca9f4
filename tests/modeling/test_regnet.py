"""Tests of RegNet against torchvision with converted weights, and against the widths in the paper."""

import re

import pytest
import torch
import torchvision
from torch import nn

from detlib.layers import FrozenBatchNorm2d
from detlib.modeling.backbone import RegNet
from detlib.modeling.backbone.regnet import (
    AnyNet,
    ResBasicBlock,
    ResBottleneckBlock,
    ResStem,
    SimpleStem,
    VanillaBlock,
    regnet_stages,
)

# (w_a, w_0, w_m, depth, group width), and the depths and widths of the paper (figures 17 and 18).
LINES = {
    "x_400mf": ((24.48, 24, 2.54, 22, 16), [1, 2, 7, 12], [32, 64, 160, 384]),
    "x_800mf": ((35.73, 56, 2.28, 16, 16), [1, 3, 7, 5], [64, 128, 288, 672]),
    "x_1_6gf": ((34.01, 80, 2.25, 18, 24), [2, 4, 10, 2], [72, 168, 408, 912]),
    "x_3_2gf": ((26.31, 88, 2.25, 25, 48), [2, 6, 15, 2], [96, 192, 432, 1008]),
    "x_4gf": ((38.65, 96, 2.43, 23, 40), [2, 5, 14, 2], [80, 240, 560, 1360]),
    "x_8gf": ((49.56, 80, 2.88, 23, 120), [2, 5, 15, 1], [80, 240, 720, 1920]),
    "x_16gf": ((55.59, 216, 2.1, 22, 128), [2, 6, 13, 1], [256, 512, 896, 2048]),
    "x_32gf": ((69.86, 320, 2.0, 23, 168), [2, 7, 13, 1], [336, 672, 1344, 2520]),
    "y_400mf": ((27.89, 48, 2.09, 16, 8), [1, 3, 6, 6], [48, 104, 208, 440]),
    "y_800mf": ((38.84, 56, 2.4, 14, 16), [1, 3, 8, 2], [64, 128, 320, 768]),
    "y_1_6gf": ((20.71, 48, 2.65, 27, 24), [2, 6, 17, 2], [48, 120, 336, 888]),
    "y_3_2gf": ((42.63, 80, 2.66, 21, 24), [2, 5, 13, 1], [72, 216, 576, 1512]),
    "y_4gf": ((31.41, 96, 2.24, 22, 64), [2, 6, 12, 2], [128, 192, 512, 1088]),
    "y_8gf": ((76.82, 192, 2.19, 17, 56), [2, 4, 10, 1], [168, 448, 896, 2016]),
    "y_16gf": ((106.23, 200, 2.48, 18, 112), [2, 4, 11, 1], [224, 448, 1232, 3024]),
    "y_32gf": ((115.89, 232, 2.53, 20, 232), [2, 5, 12, 1], [232, 696, 1392, 3712]),
}
ALL = ["stem", "s1", "s2", "s3", "s4"]


def regnet(name="x_400mf", **kwargs):
    w_a, w_0, w_m, depth, group_width = LINES[name][0]
    arguments = {
        "stem_class": SimpleStem,
        "stem_width": 32,
        "block_class": ResBottleneckBlock,
        "depth": depth,
        "w_a": w_a,
        "w_0": w_0,
        "w_m": w_m,
        "group_width": group_width,
        "se_ratio": 0.25 if name[0] == "y" else 0.0,
    }
    return RegNet(**arguments | kwargs)


def anynet(**kwargs):
    arguments = {
        "stem_class": ResStem,
        "stem_width": 8,
        "block_class": ResBottleneckBlock,
        "depths": [1, 2],
        "widths": [16, 24],
        "group_widths": [8, 8],
        "strides": [1, 2],
        "bottleneck_ratios": [1, 1],
        "se_ratio": 0,
        "activation_class": nn.ReLU,
    }
    return AnyNet(**arguments | kwargs)


def from_torchvision(state):
    """Convert a state dict of torchvision's RegNet."""
    out = {}
    for name, value in state.items():
        name = name.replace("stem.0.", "stem.conv.").replace("stem.1.", "stem.bn.")
        name = re.sub(r"trunk_output\.block(\d)\.block\d-(\d+)", lambda m: f"s{m[1]}.b{int(m[2]) + 1}", name)
        name = name.replace("proj.0.", "proj.").replace("proj.1.", "bn.")
        name = re.sub(r"\.f\.([abc])\.0\.", r".f.\1.", name)
        name = re.sub(r"\.f\.([abc])\.1\.", r".f.\1_bn.", name)
        out[name.replace("se.fc1.", "se.f_ex.0.").replace("se.fc2.", "se.f_ex.2.")] = value
    return {k: v for k, v in out.items() if not k.startswith("fc.")}


@pytest.mark.parametrize("name", LINES)
def test_depths_and_widths_match_the_paper(name):
    _, depths, widths = LINES[name]
    with torch.device("meta"):
        net = regnet(name, out_features=ALL)
    shapes = net.output_shape()
    assert [shapes[f].channels for f in ALL] == [32, *widths]
    assert [shapes[f].stride for f in ALL] == [2, 4, 8, 16, 32]
    assert [len(getattr(net, f)) for f in ALL[1:]] == depths
    if name[0] == "y":  # the width of the excitation depends on the block's input
        assert net.s4.b1.f.se.f_ex[0].out_channels == round(widths[2] / 4)
        assert net.s1.b1.f.se.f_ex[0].out_channels == 32 / 4


def test_widths_are_quantized_in_log_space():
    # The nearest 24 * 2**k to each 24 + 20 * j, rounded to a multiple of 8.
    assert regnet_stages(20, 24, 2.0, 5) == ([24, 48, 96], [1, 2, 2])
    assert regnet_stages(0, 16, 2.0, 3) == ([16], [3])


@pytest.mark.parametrize("name", ["x_800mf", "y_400mf"])
def test_features_match_torchvision(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"regnet_{name}")().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    ours = regnet(name, out_features=ALL).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    image = torch.randn(2, 3, 65, 98)
    with torch.no_grad():
        features = ours(image)
        x = theirs.stem(image)
        want = {"stem": x}
        for i in range(1, 5):
            x = want[f"s{i}"] = getattr(theirs.trunk_output, f"block{i}")(x)
    assert list(features) == ALL
    for key, value in want.items():
        torch.testing.assert_close(features[key], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


@pytest.mark.parametrize(
    "width, ratio, group, want",
    [(24, 1, 16, 32), (40, 1, 16, 32), (8, 1, 16, 8), (64, 0.25, 16, 64), (56, 0.5, 16, 64), (20, 4, 24, 18)],
)
def test_groups_divide_the_bottleneck(width, ratio, group, want):
    net = anynet(widths=[width] * 2, bottleneck_ratios=[ratio] * 2, group_widths=[group] * 2)
    block = net.s2.b1
    assert block.out_channels == want
    assert block.f.b.in_channels == want * ratio and block.f.b.weight.shape[1] == min(group, want * ratio)


@pytest.mark.parametrize("block_class", [ResBasicBlock, VanillaBlock, ResBottleneckBlock])
def test_blocks_match_their_formulas(block_class):
    torch.manual_seed(0)
    net = anynet(block_class=block_class, se_ratio=0.5, norm="GN", widths=[32, 64], stem_width=32)
    x = torch.randn(1, 3, 32, 64)
    out = net(x)
    assert out["s2"].shape == (1, 64, 4, 8) and list(out) == ["s2"]
    inside = net.stem(x)
    for block in [net.s1.b1, net.s2.b1, net.s2.b2]:
        f = block if block_class is VanillaBlock else block.f
        y = f.a_bn(f.a(inside)).relu()
        y = f.b_bn(f.b(y))
        if block_class is ResBottleneckBlock:
            y, ex = y.relu(), f.se.f_ex
            scale = ex[2](ex[0](y.mean((2, 3), keepdim=True)).relu()).sigmoid()
            y = f.c_bn(f.c(y * scale))
        if block_class is not VanillaBlock:
            y = y + (inside if block.proj is None else block.bn(block.proj(inside)))
        inside = y.relu()
    torch.testing.assert_close(out["s2"], inside)


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
def test_freeze_fixes_first_stages(freeze_at):
    net = regnet(freeze_at=freeze_at, out_features=["s3", "s4"])
    for i, name in enumerate(ALL, start=1):
        part, frozen = getattr(net, name), i <= freeze_at
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules()) == frozen


def test_initial_weights_use_all_output_channels():
    torch.manual_seed(0)
    net = regnet("y_800mf")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_networks_without_norm_and_in_other_dtypes_run():
    net = anynet(norm="", activation_class=nn.SiLU).double()
    assert net(torch.zeros(1, 3, 32, 32, dtype=torch.float64))["s2"].dtype == torch.float64
    net = regnet("y_400mf", norm="FrozenBN").bfloat16()
    assert net(torch.zeros(1, 3, 32, 32).bfloat16())["s4"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"depths": [1]}, r"depths is \[1\]; .* each of the 2 stages"),
        ({"strides": [1, 0]}, r"strides is \[1, 0\]"),
        ({"out_features": ["s3"]}, r"out_features \['s3'\] not among the features \['stem', 's1', 's2'\]"),
        ({"out_features": []}, r"out_features \[\]"),
    ],
)
def test_illegal_arguments_are_rejected(kwargs, words):
    with pytest.raises(ValueError, match=words):
        anynet(**kwargs)


def test_illegal_widths_and_inputs_are_rejected():
    with pytest.raises(ValueError, match="w_0 > 0 a multiple of 8, .* w_0=20"):
        regnet(w_0=20)
    with pytest.raises(ValueError, match="AnyNet takes an .* got .3, 8, 8"):
        anynet()(torch.zeros(3, 8, 8))
