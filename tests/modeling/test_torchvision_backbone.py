"""Tests of TorchvisionBackbone against torchvision's networks, run layer by layer."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from detlib.modeling.backbone import TorchvisionBackbone
from tests.modeling.torchvision_reference import random_input, randomize_norms, shapes, torchvision_maps

NODES = {"layer2": "res3", "layer3": "res4", "layer4": "res5"}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    backbone = TorchvisionBackbone("resnet18", return_nodes=NODES)
    randomize_norms(backbone.model)
    return backbone


def test_features_match_torchvision(backbone):
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(backbone.model.state_dict())
    assert shapes(backbone) == {"res3": (128, 8), "res4": (256, 16), "res5": (512, 32)}
    x = random_input(97, 130)
    with torch.no_grad():
        for mode in (False, True):  # in training, norms use the statistics of the batch
            got = copy.deepcopy(backbone).train(mode)(x)
            want = torchvision_maps(theirs.train(mode), x)[2:]
            assert list(got) == ["res3", "res4", "res5"]
            for ours, their in zip(got.values(), want, strict=True):
                torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-4)


def test_both_names_of_a_parameter_share_a_tensor(backbone):
    state = backbone.state_dict()
    shared = [name.removeprefix("feature_extractor.") for name in state if name.startswith("feature_ex")]
    assert len(shared) == 120 and not any(name.startswith("fc") for name in shared)
    full = torchvision.models.resnet18().state_dict()
    assert set(state) == {f"model.{k}" for k in full} | {f"feature_extractor.{k}" for k in shared}
    assert set(shared) <= set(full)
    for module in (backbone, copy.deepcopy(backbone)):
        state = module.state_dict(keep_vars=True)
        assert all(state[f"model.{name}"] is state[f"feature_extractor.{name}"] for name in shared)


def test_all_but_the_classifier_trains(backbone):
    """Batch norms are trained; the classifier, which no feature map depends on, is frozen."""
    module = copy.deepcopy(backbone).train()
    sum(y.square().sum() for y in module(random_input(64, 64)).values()).backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in module.named_parameters() if p.grad is not None}
    assert {"model.bn1.weight", "model.layer4.1.bn2.bias"} <= trained
    assert {name for name, p in module.named_parameters() if name not in trained} == {
        "model.fc.weight",
        "model.fc.bias",
    }
    assert isinstance(module.model.bn1, nn.BatchNorm2d) and module.model.bn1.num_batches_tracked > 0


@pytest.mark.parametrize(
    "name, nodes, want",
    [
        ("swin_t", {"features.1": "a", "features.7": "b"}, {"a": (96, 4), "b": (768, 32)}),
        ("convnext_tiny", {"features.1": "a", "features.7": "b"}, {"a": (96, 4), "b": (768, 32)}),
        ("mobilenet_v3_small", {"features.0": "a", "features.12": "b"}, {"a": (16, 2), "b": (576, 32)}),
    ],
)
def test_other_networks_have_channels_first_feature_maps(name, nodes, want):
    """Swin's nodes are (N, H, W, C) tensors, which are permuted."""
    with torch.device("meta"):
        backbone = TorchvisionBackbone(name, return_nodes=nodes).eval()
        maps = backbone(torch.empty(2, 3, 64, 96))
    assert shapes(backbone) == want
    assert {k: y.shape for k, y in maps.items()} == {
        k: (2, channels, 64 // stride, 96 // stride) for k, (channels, stride) in want.items()
    }


@pytest.mark.parametrize("is_training", [True, False])
def test_deepcopy_keeps_training_mode(is_training):
    nodes = {"train_return_nodes": {"layer1": "p"}, "eval_return_nodes": {"layer2": "p"}}
    net = TorchvisionBackbone("resnet18", **nodes).train(is_training)
    net.model.bn1.train(not is_training)  # parts may differ
    twin = copy.deepcopy(net)
    modes = {name: module.training for name, module in net.named_modules()}
    assert {name: module.training for name, module in twin.named_modules()} == modes
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    x = random_input(64, 96)
    torch.testing.assert_close(twin(x)["p"], net(x)["p"], rtol=0, atol=0)


def test_nodes_of_training_and_inference_may_differ():
    with torch.device("meta"):
        backbone = TorchvisionBackbone(
            "resnet18", train_return_nodes={"layer2.1.relu": "x"}, eval_return_nodes={"layer3": "x"}
        )
        x = torch.empty(1, 3, 64, 64)
        assert backbone.train()(x)["x"].shape[1] == 128 and backbone.eval()(x)["x"].shape[1] == 256
    for wrong in ({"train_return_nodes": {"layer2": "x"}}, {"eval_return_nodes": {"layer2": "x"}}):
        with pytest.raises(ValueError, match="train_return_nodes and eval_return_nodes together"):
            TorchvisionBackbone("resnet18", **wrong)
    with pytest.raises(ValueError, match=r"names \['x'\].*\['y'\]: they must be the same"):
        TorchvisionBackbone("resnet18", train_return_nodes={"layer2": "x"}, eval_return_nodes={"layer2": "y"})


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"model_name": "resnet5"}, "no classifier 'resnet5'.*Did you mean 'resnet50'"),
        ({"return_nodes": {"layer5": "x"}}, r"no node 'layer5'.*Did you mean 'layer4'"),
        ({"return_nodes": {"layer2.conv1": "x"}}, "no node 'layer2.conv1'.*Did you mean 'layer2.1.conv1'"),
        ({"return_nodes": {}}, "at least one node"),
        ({"return_nodes": {"layer2": "x", "layer3": "x"}}, "a name for two nodes"),
        ({"return_nodes": {"fc": "x"}}, "returns 'x' as a .1, 1000. tensor.*not a feature map"),
        ({"model_name": "vit_b_32", "return_nodes": {"encoder.ln": "x"}}, "images of other sizes"),
    ],
)
def test_illegal_arguments_are_rejected(kwargs, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        TorchvisionBackbone(**{"model_name": "resnet18", **kwargs})


def test_missing_weights_are_reported_with_their_locations(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match="'resnet18'.*not known.*resnet18-f37072fd.pth.*init_check"):
        TorchvisionBackbone("resnet18", pretrained=True)
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", pytest.fail)
    with pytest.raises(FileNotFoundError, match="DETLIB_OFFLINE forbids"):
        TorchvisionBackbone("resnet18", pretrained=True)


def test_cached_weights_are_loaded_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    source = torchvision.models.resnet18()
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    backbone = TorchvisionBackbone("resnet18", pretrained=True)
    assert torch.equal(backbone.model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
