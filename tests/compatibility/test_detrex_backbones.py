"""The code blocks of detrex's page "Using Pretrained Backbones".

In each block, `detrex` and `detectron2` are replaced by `detlib`, and `pretrained` is False.
"""

import shutil

import pytest
import torch
from torch import nn

from detlib.config import LazyConfig, instantiate
from detlib.config._lazy_text import as_plain_data
from detlib.layers import FrozenBatchNorm2d, ShapeSpec
from detlib.modeling.backbone import ResNet, TimmBackbone, TorchvisionBackbone
from tests.shipped_configs.published_lazy import CONFIGS

RESNET = """
# config.py

from detrex.modeling.backbone import ResNet, BasicStem

from detectron2.config import LazyCall as L

backbone=L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(
        depth=50,
        stride_in_1x1=False,
        norm="FrozenBN",
    ),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=1,
)
"""

RESNET_DC5 = """
from detrex.modeling.backbone import ResNet, BasicStem, make_stage

from detectron2.config import LazyCall as L

backbone=L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(make_stage)(
        depth=50,
        stride_in_1x1=False,
        norm="FrozenBN",
        res5_dilation=2,
    ),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=1,
)
"""

TIMM = """
from detectron2.config import LazyCall as L
from detectron2.modeling import ShapeSpec
from detectron2.layers import FrozenBatchNorm2d

# inherit configs from "dino_r50_4scale_12ep"
from .dino_r50_4scale_12ep import (
    train,
    dataloader,
    optimizer,
    lr_multiplier,
)
from .models.dino_r50 import model

from detrex.modeling.backbone import TimmBackbone

# modify backbone configs
model.backbone = L(TimmBackbone)(
    model_name="resnet152d",  # name in timm
    features_only=True,
    pretrained=True,
    in_channels=3,
    out_indices=(1, 2, 3),
    norm_layer=FrozenBatchNorm2d,
)

# modify neck configs
model.neck.input_shapes = {
    "p1": ShapeSpec(channels=256),
    "p2": ShapeSpec(channels=512),
    "p3": ShapeSpec(channels=1024),
}
model.neck.in_features = ["p1", "p2", "p3"]

# modify training configs
train.init_checkpoint = ""
"""

TORCHVISION = """
from detectron2.config import LazyCall as L
from detectron2.modeling import ShapeSpec

# inherit configs from "dino_r50_4scale_12ep"
from .dino_r50_4scale_12ep import (
    train,
    dataloader,
    optimizer,
    lr_multiplier,
)
from .models.dino_r50 import model

from detrex.modeling.backbone import TorchvisionBackbone

# modify backbone configs
model.backbone = L(TorchvisionBackbone)(
    model_name="resnet50",
    pretrained=True,
    # specify the return nodes
    return_nodes = {
        "layer2": "res3",
        "layer3": "res4",
        "layer4": "res5",
    },
)

# modify neck configs
model.neck.input_shapes = {
    "res3": ShapeSpec(channels=512),
    "res4": ShapeSpec(channels=1024),
    "res5": ShapeSpec(channels=2048),
}
model.neck.in_features = ["res3", "res4", "res5"]

# modify training configs
train.init_checkpoint = ""
"""


def adapted(block):
    for name in ("detrex", "detectron2"):
        block = block.replace(name, "detlib")
    return block.replace("pretrained=True", "pretrained=False")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Copy the shipped configs. Return the folder of DINO's, in which the code blocks are saved."""
    folder = tmp_path_factory.mktemp("zoo") / "configs"
    shutil.copytree(CONFIGS, folder)
    return folder / "DINO"


def load(block, folder, tmp_path):
    """Load a code block as a config. Return the config, and a copy that was saved and loaded."""
    file = folder / "saved_by_a_user.py"
    file.write_text(adapted(block))
    cfg = LazyConfig.load(str(file))
    LazyConfig.save(cfg, str(tmp_path / "cfg.yaml"))
    return cfg, LazyConfig.load(str(tmp_path / "cfg.yaml"))


@pytest.mark.parametrize("block, stride", [(RESNET, 32), (RESNET_DC5, 16)])
def test_resnet_block(folder, tmp_path, block, stride):
    for cfg in load(block, folder, tmp_path):
        backbone = instantiate(cfg.backbone)
        assert isinstance(backbone, ResNet)
        assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
            "res2": (256, 4),
            "res3": (512, 8),
            "res4": (1024, 16),
            "res5": (2048, stride),
        }
        assert {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad} == {"stem"}
        assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
        with torch.no_grad():
            assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape[2:] == (64 // stride, 64 // stride)


@pytest.mark.parametrize(
    "block, kind, names",
    [
        (TIMM, TimmBackbone, {"p1": (256, 4), "p2": (512, 8), "p3": (1024, 16)}),
        (TORCHVISION, TorchvisionBackbone, {"res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}),
    ],
)
def test_dino_block(folder, tmp_path, block, kind, names):
    if kind is TimmBackbone:
        pytest.importorskip("timm")
    cfg, saved = load(block, folder, tmp_path)
    assert set(cfg) == {"train", "dataloader", "optimizer", "lr_multiplier", "model"}
    assert cfg.train.init_checkpoint == "" and cfg.train.max_iter == 90000 and cfg.optimizer.lr == 1e-4
    assert as_plain_data(cfg) == as_plain_data(saved)
    with torch.device("meta"):
        model = instantiate(saved.model)
        scales = model.neck(model.backbone(torch.empty(1, 3, 128, 192)))
    assert type(model.backbone) is kind
    shapes = model.backbone.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == names
    strides = [stride for _, stride in names.values()]
    strides.append(2 * strides[-1])
    assert [tuple(s.shape) for s in scales] == [(1, 256, 128 // s, 192 // s) for s in strides]
    frozen = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert bool(frozen) == (kind is TimmBackbone)


def test_init_checkpoint_loads_weights_of_the_backbone(folder, tmp_path):
    """The page sets pretrained=False and train.init_checkpoint = "path/to/your/own/pretrained_weight/"."""
    from detlib.checkpoint import DetectionCheckpointer

    cfg, _ = load(TORCHVISION, folder, tmp_path)
    cfg.model.backbone.model_name = "resnet18"
    cfg.model.neck.input_shapes = {
        name: ShapeSpec(channels=c) for name, c in (("res3", 128), ("res4", 256), ("res5", 512))
    }
    cfg.model.num_queries = 10
    model, source = instantiate(cfg.model), TorchvisionBackbone("resnet18")
    path = tmp_path / "own.pth"
    torch.save(source.model.state_dict(), path)
    cfg.train.init_checkpoint = str(path)
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    for key, value in source.model.state_dict().items():
        assert torch.equal(model.backbone.model.state_dict()[key], value)
