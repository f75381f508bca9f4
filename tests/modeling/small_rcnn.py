"""R-CNN models small enough for a test, and batches for them."""

import pathlib

import numpy as np
import torch

from detlib.config import CfgNode, get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling import FCOS, Backbone, build_backbone
from detlib.modeling.meta_arch.fcos import FCOSHead
from detlib.structures import Boxes, Instances, PolygonMasks, RotatedBoxes, pairwise_iou

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
NUM_CLASSES = 3
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
FAST_RCNN = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
# A narrow ResNet with bottlenecks, as C4, DC5 and deformable convolutions need them.
BOTTLENECKS = {
    "MODEL__RESNETS__DEPTH": 50,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
}


def small_config(name: str = MASK_RCNN, **overrides) -> CfgNode:
    """A shipped config with ResNet-18 and narrow heads; `overrides` by key with __ for the dots."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
        "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
        "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.005,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "TEST.DETECTIONS_PER_IMAGE": 20,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    cfg.merge_from_list([x for pair in values.items() for x in pair])
    return cfg


def picture(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """(3, H, W) uint8 of smooth blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].to(torch.uint8)


def truth(height: int = 64, width: int = 96, boxes=((8, 8, 40, 40), (30, 20, 90, 60))) -> Instances:
    """Objects whose masks are their boxes; classes 0, 1, 2, 0, ..."""
    out = Instances((height, width), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    out.gt_classes = torch.arange(len(boxes)) % NUM_CLASSES
    corners = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], np.float64) for x0, y0, x1, y1 in boxes]
    out.gt_masks = PolygonMasks([[x] for x in corners])
    return out


def training_batch(empty: tuple[bool, ...] = (False, False)) -> list[dict]:
    """One dict an image; images marked empty have no objects."""
    return [
        {"image": picture(seed=i), "instances": truth(boxes=()) if is_empty else truth()}
        for i, is_empty in enumerate(empty)
    ]


ROTATED = {
    "MODEL__PROPOSAL_GENERATOR__NAME": "RRPN",
    "MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator",
    "MODEL__ANCHOR_GENERATOR__ANGLES": [[-90, -45, 0, 45]],
    "MODEL__RPN__BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0, 1.0),
    "MODEL__ROI_HEADS__NAME": "RROIHeads",
    "MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignRotated",
    "MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0, 1.0),
}


def rotated_config(**overrides) -> CfgNode:
    """`small_config` of a Faster R-CNN of rotated boxes."""
    return small_config(FASTER_RCNN, **{**ROTATED, **overrides})


def rotated_truth(boxes=((30, 30, 40, 20, 30), (60, 40, 30, 50, -70))) -> Instances:
    """Rotated objects in a picture of `picture`'s size."""
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    classes = torch.arange(len(boxes)) % NUM_CLASSES
    return Instances((64, 96), gt_boxes=RotatedBoxes(tensor), gt_classes=classes)


def rotated_batch(empty: tuple[bool, ...] = (False, False)) -> list[dict]:
    """As `training_batch`, with rotated boxes."""
    return [
        {"image": picture(seed=i), "instances": rotated_truth(boxes=()) if is_empty else rotated_truth()}
        for i, is_empty in enumerate(empty)
    ]


def small_fcos(**overrides) -> FCOS:
    """FCOS on a narrow ResNet-18 with a pyramid of five levels; `overrides` are arguments of `FCOS`."""
    backbone = build_backbone(small_config(RETINANET))
    names = ["p3", "p4", "p5", "p6", "p7"]
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=32)] * 5, conv_dims=[32], num_classes=NUM_CLASSES, norm="GN"
    )
    values = {
        "backbone": backbone,
        "head": head,
        "head_in_features": names,
        "num_classes": NUM_CLASSES,
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [57.375, 57.12, 58.395],
        "test_score_thresh": 0.02,
    }
    return FCOS(**values | overrides)


class TinyPyramid(Backbone):
    """Three levels p3, p4 and p5 of 16 channels, to overfit in a second."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 8, stride=8), torch.nn.GroupNorm(4, 16), torch.nn.ReLU()
        )

    def forward(self, x):
        p3 = self.stem(x)
        p4 = torch.nn.functional.avg_pool2d(p3, 2)
        return {"p3": p3, "p4": p4, "p5": torch.nn.functional.avg_pool2d(p4, 2)}

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in (3, 4, 5)}

    @property
    def size_divisibility(self):
        return 32


def finds_what_it_trained_on(model, num_steps: int, lr: float = 1e-3) -> bool:
    """Overfit `training_batch` and see whether each object is found, with its class."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    for _ in range(num_steps):
        losses = model(training_batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    want, found = truth(), [x["instances"] for x in model.eval()(training_batch())]
    iou = [pairwise_iou(want.gt_boxes, x.pred_boxes) for x in found]
    return all(
        (iou[i][j][found[i].pred_classes == k] > 0.6).any()
        for i in range(len(found))
        for j, k in enumerate(want.gt_classes.tolist())
    )
