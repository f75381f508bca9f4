"""Loading of plain timm and torchvision weights into the part of a model that they belong to."""

import logging

import pytest
import torch
import torchvision
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.checkpoint.key_matching import match_part
from detlib.modeling.backbone import TimmBackbone, TorchvisionBackbone


def randomized(module, seed):
    g = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=g))
        else:
            value.fill_(seed)
    return module


class Detector(nn.Module):
    """A backbone, and a neck with the same name suffixes as a classifier."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "bn1": nn.BatchNorm2d(64)})


def load(model, state, tmp_path, ending="pth"):
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    checkpointer = DetectionCheckpointer(model)
    checkpointer.load(str(path))
    return checkpointer.report


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvision_file_into_torchvision_backbone(tmp_path, ending, caplog):
    theirs = randomized(torchvision.models.resnet18(), 1)
    model = Detector(TorchvisionBackbone("resnet18", return_nodes={"layer3": "res4", "layer4": "res5"}))
    with caplog.at_level(logging.INFO, "detlib"):
        report = load(model, theirs.state_dict(), tmp_path, ending)
    assert "its weights are loaded into 'backbone.model'" in caplog.text
    for key, value in theirs.state_dict().items():
        assert torch.equal(model.backbone.model.state_dict()[key], value), key
    # Only the neck has missing names, although parameters of the backbone have two names each.
    assert {name.split(".")[0] for name in report.missing_keys} == {"neck"}
    assert report.unexpected_keys == [] and report.incorrect_shapes == []
    assert len(report.loaded) == 122 + 120


@pytest.mark.parametrize(
    "name, indices, module",
    [
        ("resnet18", (2, 3), "backbone.timm_model"),
        ("convnext_atto", (0, 3), "backbone.timm_model"),
        ("vit_tiny_patch16_224", (3, 11), "backbone.timm_model.model"),
    ],
)
def test_timm_file_into_timm_backbone(tmp_path, caplog, name, indices, module):
    """Names must match even if timm's extractor has "stages_0" where the file has "stages.0"."""
    timm = pytest.importorskip("timm")
    theirs = randomized(timm.create_model(name, pretrained=False), 2)
    model = Detector(TimmBackbone(name, out_indices=indices))
    before = {k: v.clone() for k, v in model.neck.state_dict().items()}
    with caplog.at_level(logging.INFO, "detlib"):
        report = load(model, theirs.state_dict(), tmp_path)
    assert f"its weights are loaded into '{module}'" in caplog.text
    assert {key.split(".")[0] for key in report.missing_keys} == {"neck"}
    # Only the classifier and the stages after the last feature map are unused.
    allowed = ("fc.", "head.", "norm.", "fc_norm.", "layer4.")
    assert report.unexpected_keys and all(key.startswith(allowed) for key in report.unexpected_keys)
    assert all(torch.equal(v, before[k]) for k, v in model.neck.state_dict().items())
    ours = [v for k, v in model.backbone.state_dict().items() if k.endswith("weight")]
    values = {v.double().sum().item() for v in theirs.state_dict().values()}
    assert all(v.double().sum().item() in values for v in ours)


def test_checkpoint_of_the_full_model_is_not_renamed(tmp_path):
    model = randomized(Detector(TorchvisionBackbone("resnet18", return_nodes={"layer4": "res5"})), 3)
    state = {k: v.clone() for k, v in model.state_dict().items() if "feature_extractor" not in k}
    other = Detector(TorchvisionBackbone("resnet18", return_nodes={"layer4": "res5"}))
    report = load(other, {"model": state}, tmp_path)
    assert report.missing_keys == report.unexpected_keys == []
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


class TestMatching:
    SHAPES = {"a.net.conv1.weight": (2,), "a.net.layer.0.weight": (3,), "b.conv1.weight": (2,), "b.x": (1,)}

    @staticmethod
    def arrays(**shapes):
        return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}

    def test_module_with_most_matches_is_found(self):
        state = self.arrays(conv1__weight=2, layer__0__weight=3, fc__weight=4)
        matched, module = match_part(self.SHAPES, state)
        assert module == "a.net"
        assert set(matched) == {"a.net.conv1.weight", "a.net.layer.0.weight", "fc.weight"}
        assert matched["a.net.layer.0.weight"] is state["layer.0.weight"]

    def test_other_shapes_do_not_match(self):
        assert match_part(self.SHAPES, self.arrays(conv1__weight=5, layer__0__weight=7)) is None

    def test_file_with_a_name_in_the_model_does_not_match(self):
        state = self.arrays(a__net__conv1__weight=2, layer__0__weight=3)
        assert match_part(self.SHAPES, state) is None

    def test_too_few_matches_do_not_match(self):
        state = self.arrays(x=1, y__weight=2, z__weight=3, u__weight=4, v__weight=4)
        shapes = {**self.SHAPES, "b.q": (1,), "b.r": (1,)}
        assert match_part(shapes, state) is None
        assert match_part(shapes, {}) is None
