"""Backbones of timm and torchvision in YAML configs: plain, with FPN, in RetinaNet and in Mask R-CNN."""

import re
from pathlib import Path

import pytest
import torch

from detlib import model_zoo
from detlib.modeling import build_backbone, build_model
from detlib.modeling.backbone import BACKBONE_REGISTRY
from detlib.utils.events import EventStorage
from tests.shipped_configs.published_lazy import training_items

pytest.importorskip("timm")

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
TIMM = ["MODEL.TIMM.MODEL_NAME", "resnet18", "MODEL.FPN.IN_FEATURES", ["p1", "p2", "p3", "p4"]]
SMALL = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 10]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
TORCHVISION = ["MODEL.TORCHVISION.MODEL_NAME", "resnet18"]


def config(name, builder, *options):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.NAME = "cpu", "", builder
    cfg.merge_from_list([*SMALL, *options])
    return cfg


@pytest.mark.parametrize(
    "name, builder, options",
    [
        (MASK_RCNN, "build_timm_fpn_backbone", TIMM),
        (MASK_RCNN, "build_torchvision_fpn_backbone", TORCHVISION),
        (RETINANET, "build_retinanet_timm_fpn_backbone", [*TIMM[:3], ["p2", "p3", "p4"]]),
        (
            RETINANET,
            "build_retinanet_torchvision_fpn_backbone",
            [*TORCHVISION, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]],
        ),
    ],
)
def test_detectors_train_and_predict(name, builder, options):
    torch.manual_seed(0)
    model = build_model(config(name, builder, *options))
    items = training_items(model)
    with EventStorage():
        losses = model(items)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # The mask head gets gradients only from positive proposals. All other parameters must have one.
    assert [key for key in without if "backbone" in key] == []
    wanted = ["p3", "p4", "p5", "p6", "p7"] if "retinanet" in builder else ["p2", "p3", "p4", "p5", "p6"]
    shapes = model.backbone.output_shape()
    assert list(shapes) == wanted and {s.channels for s in shapes.values()} == {256}
    assert [s.stride for s in shapes.values()] == [2 ** int(n[1]) for n in wanted]
    with torch.no_grad():
        assert "instances" in model.eval()(items[:1])[0]


def test_backbones_without_fpn_are_built():
    cfg = config(MASK_RCNN, "build_timm_backbone", *TIMM[:2], "MODEL.TIMM.NORM", "FrozenBN")
    cfg.MODEL.TIMM.OUT_INDICES = [2, 3]
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        assert {k: s.stride for k, s in backbone.output_shape().items()} == {"p2": 8, "p3": 16}
        assert not any("bn1" in name for name, _ in backbone.named_parameters())
        cfg = config(MASK_RCNN, "build_torchvision_backbone", *TORCHVISION)
        assert list(build_backbone(cfg).output_shape()) == ["res2", "res3", "res4", "res5"]


def test_last_fpn_level_is_computed_from_the_fpn_output_of_that_name():
    """The backbone VGG has a feature "p5" too, but "p6" is computed from the "p5" of FPN."""
    cfg = config(MASK_RCNN, "build_timm_fpn_backbone", "MODEL.TIMM.MODEL_NAME", "vgg11_bn")
    cfg.MODEL.TIMM.OUT_INDICES = [2, 3, 4, 5]
    cfg.MODEL.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    with torch.device("meta"):
        features = build_backbone(cfg)(torch.empty(1, 3, 64, 64))
    assert features["p6"].shape == (1, 256, 1, 1)


def test_documentation_example_builds(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "model_zoo.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "custom.yaml").write_text(example.replace("PRETRAINED: True", "PRETRAINED: False"))
    cfg = model_zoo.get_config(MASK_RCNN)
    cfg.merge_from_file(str(tmp_path / "custom.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert {n: s.stride for n, s in model.backbone.bottom_up.output_shape().items()} == {
        "p0": 4,
        "p1": 8,
        "p2": 16,
        "p3": 32,
    }
    assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(
    "builder, options, words",
    [
        ("timm", ["MODEL.TIMM.MODEL_NAME", "resnot18"], "MODEL.TIMM: .*no model 'resnot18'.*resnet18"),
        ("timm", ["MODEL.TIMM.OUT_INDICES", [1, 2, 3, 9]], "MODEL.TIMM: .*has 5 features"),
        ("timm_fpn", [], r"FPN.IN_FEATURES is \['res2'.*MODEL.TIMM.OUT_INDICES. gives \['p1', 'p2'"),
        ("torchvision", ["MODEL.TORCHVISION.RETURN_NODES", ["a"]], "OUT_FEATURES must have a name for each"),
        ("torchvision", ["MODEL.PIXEL_MEAN", [1.0]], "3 channels, but MODEL.PIXEL_MEAN has 1"),
        (
            "torchvision_fpn",
            ["MODEL.FPN.IN_FEATURES", ["res7"]],
            r"FPN.IN_FEATURES is \['res7'\].*TORCHVISION.OUT_FEATURES. gives \['res2'",
        ),
    ],
)
def test_wrong_values_raise_with_their_key(builder, options, words):
    name = f"build_{builder}_backbone"
    assert name in BACKBONE_REGISTRY
    cfg = config(MASK_RCNN, name, *TIMM[:2], *TORCHVISION, *options)
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        build_backbone(cfg)
