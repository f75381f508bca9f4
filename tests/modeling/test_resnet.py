"""Tests of ResNet against torchvision with converted weights."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from detlib.config import get_cfg
from detlib.layers import FrozenBatchNorm2d, ShapeSpec
from detlib.modeling.backbone import (
    BACKBONE_REGISTRY,
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    build_backbone,
    build_resnet_backbone,
    make_stage,
)
from tests.modeling.torchvision_reference import randomize_norms

STAGES = ["res2", "res3", "res4", "res5"]


def from_torchvision(state):
    """Convert a state dict of torchvision's ResNet."""
    out = {}
    for name, value in state.items():
        name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
        name = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        out[re.sub(r"^fc\.", "linear.", name)] = value
    return out


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_parameters_match_torchvision(depth):
    with torch.device("meta"):
        ours = ResNet(BasicStem(), ResNet.make_default_stages(depth), num_classes=1000)
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    want = {k: v.shape for k, v in from_torchvision(theirs.state_dict()).items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == want


@pytest.mark.parametrize(
    "name, config",
    [
        ("resnet18", {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        ("resnet50", {}),
        ("resnext50_32x4d", {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
    ],
)
def test_features_match_torchvision(name, config):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    randomize_norms(theirs)
    cfg = get_cfg()
    for key, value in {"OUT_FEATURES": ["stem", *STAGES], "STRIDE_IN_1X1": False, **config}.items():
        cfg.MODEL.RESNETS[key] = value
    ours = build_backbone(cfg).eval()
    state = {k: v for k, v in from_torchvision(theirs.state_dict()).items() if not k.startswith("linear")}
    ours.load_state_dict({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    image = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        features = ours(image)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        want = {"stem": x}
        for stage, layer in zip(STAGES, [theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]):
            x = want[stage] = layer(x)
    assert list(features) == list(want)
    shapes = ours.output_shape()
    for key, value in want.items():
        torch.testing.assert_close(features[key], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
        assert shapes[key].channels == value.shape[1]
        assert -(-97 // shapes[key].stride) == value.shape[3]


def test_classifier_matches_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    ours = ResNet(BasicStem(), ResNet.make_default_stages(18), num_classes=7).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out = ours(image)
        torch.testing.assert_close(out["linear"], theirs(image), rtol=1e-4, atol=1e-4)
    assert list(out) == ["linear"] and ours.output_shape()["linear"].channels == 7


def test_stride_in_1x1_and_dilation_select_convolutions():
    block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2, stride_in_1x1=True)
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2)
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    net = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert net.output_shape()["res5"].stride == 16
    assert net.res5[0].conv2.dilation == (2, 2) and net.res5[0].conv2.padding == (2, 2)
    assert net.res4[0].conv2.dilation == (1, 1)
    assert net(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 2048, 4, 4)


def test_dilated_block_equals_zero_stuffed_kernel():
    torch.manual_seed(0)
    block = BottleneckBlock(8, 8, bottleneck_channels=4, num_groups=2, dilation=2, norm="").double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    spread = torch.zeros(4, 2, 5, 5, dtype=torch.float64)
    spread[:, :, ::2, ::2] = block.conv2.weight
    out = F.conv2d(F.conv2d(x, block.conv1.weight).relu(), spread, padding=2, groups=2).relu()
    torch.testing.assert_close(block(x), F.relu(F.conv2d(out, block.conv3.weight) + x))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stride, in_1x1, dilation", [(2, False, 1), (2, True, 1), (1, False, 2)])
def test_deformable_block_matches_torchvision(modulated, stride, in_1x1, dilation):
    torch.manual_seed(0)
    kwargs = {
        "bottleneck_channels": 8,
        "stride": stride,
        "num_groups": 2,
        "norm": "",
        "stride_in_1x1": in_1x1,
        "dilation": dilation,
    }
    block = DeformBottleneckBlock(6, 16, **kwargs, deform_modulated=modulated, deform_num_groups=4)
    plain = BottleneckBlock(6, 16, **kwargs)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "offset" not in k})
    x = torch.randn(2, 6, 11, 14)
    if modulated:
        plain.conv2.weight.data *= 0.5
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-4)

    nn.init.normal_(block.conv2_offset.weight, std=0.1)
    nn.init.normal_(block.conv2_offset.bias)
    out = F.conv2d(x, block.conv1.weight, stride=stride if in_1x1 else 1).relu()
    geometry = {"stride": 1 if in_1x1 else stride, "padding": dilation, "dilation": dilation}
    offset = F.conv2d(out, block.conv2_offset.weight, block.conv2_offset.bias, **geometry)
    mask = offset[:, 72:].sigmoid() if modulated else None
    out = deform_conv2d(out, offset[:, :72], block.conv2.weight, mask=mask, **geometry).relu()
    out = F.conv2d(out, block.conv3.weight) + F.conv2d(x, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), out.relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_stages_from_config_train(modulated):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, False, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 2
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    net = build_backbone(cfg)
    block_types = {name: {type(block) for block in getattr(net, name)} for name in STAGES}
    assert block_types["res2"] == block_types["res4"] == {BottleneckBlock}
    assert block_types["res3"] == block_types["res5"] == {DeformBottleneckBlock}
    offset = net.res5[0].conv2_offset
    assert offset.out_channels == 2 * 9 * (3 if modulated else 2)
    assert not offset.weight.any() and not offset.bias.any() and net.res5[2].conv2.dilation == (2, 2)
    net(torch.randn(1, 3, 40, 50))["res5"].square().sum().backward()
    assert all(block.conv2_offset.weight.grad.abs().sum() > 0 for block in net.res5)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(1, 3, 40, 50))["res5"].isfinite().all()
    net.to(torch.bfloat16)
    assert net(torch.randn(1, 3, 40, 50).bfloat16())["res5"].dtype == torch.bfloat16


def test_unused_stages_are_not_built():
    net = build_backbone(get_cfg())
    assert list(net.output_shape()) == ["res4"] and not hasattr(net, "res5")
    net = ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["stem", "res3"])
    assert net.stage_names == ("res2", "res3")


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_fixes_first_stages(freeze_at):
    net = ResNet(BasicStem(), ResNet.make_default_stages(18), freeze_at=freeze_at)
    for i, name in enumerate(["stem", *STAGES], start=1):
        part, frozen = getattr(net, name), i <= freeze_at
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert any(isinstance(m, nn.BatchNorm2d) for m in part.modules()) != frozen
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules()) == frozen
    net.train()
    before = net.stem.conv1.norm.running_mean.clone()
    net(torch.randn(2, 3, 32, 32))
    assert torch.equal(before, net.stem.conv1.norm.running_mean) == (freeze_at > 0)


def test_initial_weights_have_msra_distribution():
    torch.manual_seed(0)
    net = ResNet(BasicStem(), ResNet.make_default_stages(50), num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] ** 2 / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert net.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_make_stage_applies_per_block_arguments():
    blocks = make_stage(BasicBlock, 3, in_channels=4, out_channels=32, norm="GN", stride_per_block=[2, 1, 1])
    assert [b.stride for b in blocks] == [2, 1, 1]
    assert [b.in_channels for b in blocks] == [4, 32, 32]
    assert isinstance(blocks[0].conv1.norm, nn.GroupNorm)
    with pytest.raises(ValueError, match="stride_per_block has 2 entries for 3 blocks"):
        make_stage(BasicBlock, 3, in_channels=4, out_channels=8, stride_per_block=[2, 1])
    with pytest.raises(ValueError, match="both stride and stride_per_block"):
        make_stage(BasicBlock, 1, in_channels=4, out_channels=8, stride=1, stride_per_block=[2])


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_make_stage_by_depth_equals_make_default_stages(depth):
    with torch.device("meta"):
        ours = ResNet(BasicStem(), make_stage(depth=depth, stride_in_1x1=False, norm="BN"))
        theirs = ResNet(BasicStem(), ResNet.make_default_stages(depth=depth, stride_in_1x1=False, norm="BN"))
    assert str(ours) == str(theirs)


def test_dc5_features_match_torchvision():
    """DC5 replaces the stride of the last stage by dilation."""
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    randomize_norms(theirs)
    for name, module in theirs.layer4[0].named_modules():
        if name == "conv2":  # torchvision dilates only the later blocks
            module.dilation, module.padding = (2, 2), (2, 2)
    stages = make_stage(depth=50, stride_in_1x1=False, norm="FrozenBN", res5_dilation=2)
    names = ["res2", "res3", "res4", "res5"]
    ours = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=names, freeze_at=1)
    ours.load_state_dict(from_torchvision(theirs.state_dict()), strict=False)
    assert {name: shape.stride for name, shape in ours.output_shape().items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 16,
    }
    x = torch.randn(1, 3, 65, 96, generator=torch.Generator().manual_seed(1))
    theirs.eval()
    with torch.no_grad():
        got = ours(x)["res5"]
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(theirs, part)(x)
    assert got.shape == (1, 2048, 5, 6)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_make_stage_builds_resnext_and_rejects_illegal_arguments():
    with torch.device("meta"):
        net = ResNet(BasicStem(), make_stage(101, "BN", 32, 8, deform_on_per_stage=[False, True, True, True]))
        theirs = torchvision.models.resnext101_32x8d()
    want = {k: v.shape for k, v in from_torchvision(theirs.state_dict()).items() if "linear" not in k}
    deformable = {k for k in net.state_dict() if "conv2_offset" in k}
    assert {k: v.shape for k, v in net.state_dict().items() if k not in deformable} == want
    assert len(deformable) == 2 * (4 + 23 + 3)
    assert make_stage(depth=18)[3][-1].out_channels == 512
    with pytest.raises(ValueError, match="res5_dilation is 2, but depth 34 needs 1"):
        make_stage(depth=34, res5_dilation=2)
    with pytest.raises(ValueError, match="out_channels is 256, but depth 18 needs 64"):
        make_stage(depth=18, out_channels=256)
    with pytest.raises(ValueError, match="depth is 77; legal are 18, 34, 50, 101, 152"):
        make_stage(depth=77)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"DEPTH": 20}, r"RESNETS.DEPTH is 20; legal are 18, 34, 50, 101, 152"),
        ({"DEPTH": 18}, r"RESNETS.RES2_OUT_CHANNELS is 256, but MODEL.RESNETS.DEPTH 18 needs 64"),
        ({"DEPTH": 34, "RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 2}, r"RESNETS.NUM_GROUPS is 2"),
        ({"DEPTH": 34, "RES2_OUT_CHANNELS": 64, "RES5_DILATION": 2}, r"RESNETS.RES5_DILATION is 2"),
        ({"RES5_DILATION": 3}, r"RESNETS.RES5_DILATION is 3; legal are 1, 2"),
        ({"OUT_FEATURES": ["res6"]}, r"RESNETS.OUT_FEATURES is \['res6'\]; a ResNet gives .*res5"),
        ({"OUT_FEATURES": []}, r"RESNETS.OUT_FEATURES is \[\]"),
        ({"DEFORM_ON_PER_STAGE": [False, True]}, r"RESNETS.DEFORM_ON_PER_STAGE is \[False, True\]; .*res5"),
        (
            {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "DEFORM_ON_PER_STAGE": [False, True, True, True]},
            "RESNETS.DEFORM_ON_PER_STAGE .*DEPTH 18 has no bottleneck",
        ),
    ],
)
def test_config_errors_name_the_key(changes, words):
    cfg = get_cfg()
    for key, value in changes.items():
        cfg.MODEL.RESNETS[key] = value
    with pytest.raises(ValueError, match=f"MODEL.{words}" if words.startswith("RES") else words):
        build_backbone(cfg)


def test_illegal_arguments_are_rejected():
    with pytest.raises(ValueError, match="depth is 33"):
        ResNet.make_default_stages(33)
    with pytest.raises(ValueError, match=r"out_features \['res9'\]"):
        ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res9"])
    with pytest.raises(ValueError, match="stages must be non-empty"):
        ResNet(BasicStem(), [])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) tensor, got the shape \(3, 8, 8\)"):
        ResNet(BasicStem(), ResNet.make_default_stages(18))(torch.zeros(3, 8, 8))


def test_builder_that_returns_no_backbone_is_rejected():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "torch.nn.Identity"
    with pytest.raises(TypeError, match="'torch.nn.Identity' built a Identity, not a Backbone"):
        build_backbone(cfg)
    assert "build_resnet_backbone" in BACKBONE_REGISTRY
