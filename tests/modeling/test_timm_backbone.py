"""Tests of TimmBackbone against torchvision's networks and timm's own features."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from detlib.layers import FrozenBatchNorm2d
from detlib.modeling.backbone import TimmBackbone
from tests.modeling.torchvision_reference import random_input, randomize_norms, shapes, torchvision_maps

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def torchvision_resnet():
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    randomize_norms(net)
    return net.eval()


@pytest.mark.parametrize("norm_layer", [None, FrozenBatchNorm2d, "FrozenBN"])
def test_resnet_features_match_torchvision(torchvision_resnet, norm_layer, tmp_path):
    """The weights are loaded from a file; timm has torchvision's parameter names for this network."""
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet.state_dict(), path)
    backbone = TimmBackbone(
        "resnet18", checkpoint_path=str(path), out_indices=(0, 2, 3, 4), norm_layer=norm_layer
    )
    assert shapes(backbone) == {"p0": (64, 2), "p2": (128, 8), "p3": (256, 16), "p4": (512, 32)}
    assert backbone.size_divisibility == 0
    x = random_input(97, 130)
    with torch.no_grad():
        got = backbone.eval()(x)
        want = torchvision_maps(torchvision_resnet, x)
    assert list(got) == ["p0", "p2", "p3", "p4"]
    for name in got:
        torch.testing.assert_close(got[name], want[int(name[1])], rtol=1e-4, atol=1e-4)
    frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    trained = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(frozen), len(trained)) == ((0, 20) if norm_layer is None else (20, 0))
    # Converted norms keep their parameter names.
    names = {k for k in torchvision_resnet.state_dict() if not k.startswith("fc.")}
    assert set(backbone.state_dict()) == {f"timm_model.{name}" for name in names}


def test_all_parameters_get_gradients():
    backbone = TimmBackbone("resnet18", out_indices=(2, 3), norm_layer=FrozenBatchNorm2d)
    sum(y.sum() for y in backbone(random_input(64, 64)).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    names = [name for name, _ in backbone.named_parameters()]
    assert names[0] == "timm_model.conv1.weight"
    assert not any("bn" in name or "layer4" in name for name in names)


def test_frozen_norms_keep_eps_and_activation():
    """These norms have an unusual eps and a fused activation."""
    name = "tf_mobilenetv3_small_minimal_100"
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, pretrained=False, out_indices=(1, 3))
    randomize_norms(theirs)
    ours = TimmBackbone(name, out_indices=(1, 3), norm_layer=FrozenBatchNorm2d)
    ours.timm_model.load_state_dict(theirs.state_dict())
    x = random_input(70, 50)
    with torch.no_grad():
        got, want = ours(x), theirs.eval()(x)  # the mode must not matter to ours
    for ours_map, their_map in zip(got.values(), want, strict=True):
        torch.testing.assert_close(ours_map, their_map, rtol=1e-4, atol=1e-5)
    norms = [m for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize(
    "name, want",
    [
        ("swin_tiny_patch4_window7_224", {"p1": (192, 8), "p3": (768, 32)}),
        ("vit_tiny_patch16_224", {"p1": (192, 16), "p3": (192, 16)}),
        ("convnext_atto", {"p1": (80, 8), "p3": (320, 32)}),
        ("efficientnet_b0", {"p1": (24, 4), "p3": (112, 16)}),
    ],
)
def test_other_networks_accept_any_size(name, want):
    """Channels, strides and layouts are correct, and all trained parameters get gradients."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, out_indices=(1, 3))
    assert shapes(backbone) == want and backbone.size_divisibility == 0
    for height, width in ((64, 96), (75, 101)):
        maps = backbone(random_input(height, width))
        for key, y in maps.items():
            channels, stride = want[key]
            sizes = {side: {side // stride, -(-side // stride)} for side in (height, width)}
            assert y.shape[:2] == (2, channels)
            assert y.shape[2] in sizes[height] and y.shape[3] in sizes[width]
    sum(y.square().sum() for y in maps.values()).backward()
    trained = {key for key, p in backbone.named_parameters() if p.grad is not None}
    assert trained == {key for key, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(backbone.parameters())) or name == "efficientnet_b0"


def test_channels_last_feature_maps_are_permuted():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", out_indices=(0,)).eval()
    x = random_input(64, 96)
    with torch.no_grad():
        (theirs,) = backbone.timm_model(x)
        assert theirs.shape == (2, 16, 24, 96)
        assert torch.equal(backbone(x)["p0"][1, 5], theirs[1, :, :, 5])


def test_size_divisibility_is_detected():
    """The branches of this network have equal sizes only if no size was rounded."""
    with torch.device("meta"):
        backbone = TimmBackbone("dla34", out_indices=(2, 3))
        assert backbone.size_divisibility == 8
        assert backbone(torch.empty(1, 3, 96, 160))["p3"].shape[2:] == (12, 20)


def test_out_indices_and_out_features_select_feature_maps():
    with torch.device("meta"):
        last = TimmBackbone("resnet18", out_indices=(-1, 2))  # sorted and non-negative in the names
        chosen = TimmBackbone("resnet18", out_indices=(1, 2, 3), out_features=["p3", "p1"], in_channels=4)
    assert shapes(last) == {"p2": (128, 8), "p4": (512, 32)}
    assert shapes(chosen) == {"p1": (64, 4), "p3": (256, 16)}
    assert list(chosen(torch.empty(1, 4, 64, 64, device="meta"))) == ["p1", "p3"]


def test_norm_layer_replaces_norms():
    with torch.device("meta"):
        grouped = TimmBackbone("resnet18", norm_layer="GN")
        synchronized = TimmBackbone("resnet18", norm_layer=nn.SyncBatchNorm)
    assert isinstance(grouped.timm_model.bn1, nn.GroupNorm)
    assert isinstance(synchronized.timm_model.bn1, nn.SyncBatchNorm)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"model_name": "resnet5"}, r"no model 'resnet5'.*Did you mean 'resnet50'"),
        ({"model_name": "resnet18.a1"}, r"no weights 'resnet18.a1'.*Did you mean .*resnet18.a1_in1k"),
        (
            {"out_indices": (1, 5)},
            r"out_indices are \(1, 5\).*'resnet18' has 5 features, 0 to 4; out of range: 5",
        ),
        ({"out_indices": (1, -9)}, "out of range: -9"),
        ({"out_indices": ()}, "must be indices of features"),
        ({"out_indices": (1, 2.0)}, "must be indices of features"),
        ({"out_indices": (4, -1)}, "name a feature twice"),
        ({"out_features": ["p7"]}, r"out_features is \['p7'\].*gives \['p0', 'p1', 'p2', 'p3'\]"),
        ({"features_only": False}, "features_only=True"),
        ({"norm_layer": "FrozenBM"}, "Unknown norm 'FrozenBM'.*Did you mean 'FrozenBN'"),
        ({"model_name": "mixer_s32_224"}, "cannot be run on images of other sizes"),
    ],
)
def test_illegal_arguments_are_rejected(kwargs, words):
    with pytest.raises(ValueError, match=words):
        TimmBackbone(**{"model_name": "resnet18", **kwargs})


def test_missing_weights_are_reported_with_their_locations(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", no_network)
    with pytest.raises(FileNotFoundError) as error:
        TimmBackbone("resnet18", pretrained=True)
    text = str(error.value)
    for part in ("resnet18.a1_in1k", "Name or service", "model.safetensors", "checkpoint_path"):
        assert part in text, part
    assert str(Path("hub") / "models--timm--resnet18.a1_in1k") in text
    with pytest.raises(ValueError, match="out_indices"):
        TimmBackbone("vit_tiny_patch16_384", out_indices=(77,), pretrained=True)
    with pytest.raises(FileNotFoundError, match="checkpoint_path .*nowhere.pth' is not a file"):
        TimmBackbone("resnet18", checkpoint_path=str(tmp_path / "nowhere.pth"))


def test_missing_timm_is_reported_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'detlib\[timm\]'"):
        TimmBackbone("resnet18")
