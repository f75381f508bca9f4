"""Builders and comparisons that the tests share: boxes, images, batches, small models and configs.

Every builder is deterministic: the same arguments give the same values. Sizes are (height, width), boxes are
absolute xyxy pixels, rotated boxes (center x, center y, width, height, degrees counter-clockwise).
"""

from pathlib import Path

import numpy as np
import torch

from detlib.config import CfgNode, LazyConfig, get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling import FCOS, Backbone, build_backbone
from detlib.modeling.meta_arch.fcos import FCOSHead
from detlib.structures import Boxes, Instances, PolygonMasks, RotatedBoxes, pairwise_iou

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
NUM_CLASSES = 3
IMAGE_SIZE = (64, 96)  # of `random_image` and `ground_truth`

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
FAST_RCNN = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
# Overrides for a narrow ResNet with bottlenecks, which C4, DC5 and deformable convolutions need.
BOTTLENECKS = {
    "MODEL__RESNETS__DEPTH": 50,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
}
# Overrides that turn a Faster R-CNN into one of rotated boxes.
ROTATED = {
    "MODEL__PROPOSAL_GENERATOR__NAME": "RRPN",
    "MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator",
    "MODEL__ANCHOR_GENERATOR__ANGLES": [[-90, -45, 0, 45]],
    "MODEL__RPN__BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0, 1.0),
    "MODEL__ROI_HEADS__NAME": "RROIHeads",
    "MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignRotated",
    "MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0, 1.0),
}
# The file and the overrides of `tiny_lazy_config`.
TINY_LAZY_FILE = CONFIGS / "Quickstart/fcos_R_18_FPN_shapes.py"
TINY_LAZY_OVERRIDES = [
    "model.head.conv_dims=[16]",
    "model.head.norm=''",
    "dataloader.train.dataset.names=shapes:train?num=8&size=64",
    "dataloader.test.dataset.names=shapes:val?num=4&size=64",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.device=cpu",
    "train.max_iter=4",
]


# Boxes, scores and masks


def random_boxes(
    num_boxes: int,
    image_size: tuple[float, float] = (100, 100),
    min_side: float = 1.0,
    max_side: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return (N, 4) boxes inside the image.

    Args:
        num_boxes: N.
        image_size: (height, width).
        min_side: the shortest side.
        max_side: the longest side; by default the corners are uniform in the image.
        seed: seed of the random generator.
        dtype: dtype of the result; the values are drawn in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    if max_side is None:
        corners = torch.rand(2, num_boxes, 2, generator=generator) * (limits - min_side)
        return torch.cat([corners.amin(dim=0), corners.amax(dim=0) + min_side], dim=1).to(dtype)
    corner = torch.rand(num_boxes, 2, generator=generator) * (limits - max_side)
    sides = torch.rand(num_boxes, 2, generator=generator) * (max_side - min_side)
    return torch.cat([corner, corner + min_side + sides], dim=1).to(dtype)


def random_rotated_boxes(
    num_boxes: int,
    image_size: tuple[float, float] = (60, 60),
    max_angle: float = 400.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return (N, 5) rotated boxes with centers in the image, sides of 1 to 41, angles up to `max_angle`."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    center = torch.rand(num_boxes, 2, generator=generator) * limits
    sides = 1 + torch.rand(num_boxes, 2, generator=generator) * 40
    angle = torch.rand(num_boxes, 1, generator=generator) * 2 * max_angle - max_angle
    return torch.cat([center, sides, angle], dim=1).to(dtype)


def random_scores(num_scores: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return (N,) scores in [0, 1)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.rand(num_scores, generator=generator).to(dtype)


def make_proposals(boxes, image_size: tuple[int, int] = IMAGE_SIZE) -> Instances:
    """Return `Instances` with the boxes as `proposal_boxes` and zeros as `objectness_logits`."""
    tensor = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(image_size, proposal_boxes=Boxes(tensor), objectness_logits=torch.zeros(len(tensor)))


def slow_iou(a, b) -> float:
    """Return the IoU of two xyxy boxes given as four floats each; 0 for two empty boxes."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def slow_giou_loss(a, b) -> float:
    """Return 1 - GIoU of two non-empty xyxy boxes given as four floats each."""
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - inter / union + (hull - union) / hull


def circle_polygon(center_x: float, center_y: float, radius: float, num_corners: int = 24) -> np.ndarray:
    """Return a regular polygon as a flat float64 vector x0, y0, x1, y1, ..."""
    angles = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
    return np.stack([center_x + radius * np.cos(angles), center_y + radius * np.sin(angles)], axis=1).ravel()


def assert_instances_allclose(actual: Instances, expected: Instances, rtol: float = 1e-5, atol: float = 1e-5):
    """Assert the same image size, the same fields, and equal values (close ones for floating point)."""
    assert actual.image_size == expected.image_size
    assert actual.get_fields().keys() == expected.get_fields().keys()
    for name, value in expected.get_fields().items():
        other = actual.get(name)
        assert type(other) is type(value), name
        if isinstance(value, Boxes) or hasattr(value, "tensor"):
            value, other = value.tensor, other.tensor
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other, value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert list(other) == list(value), name


# Images, ground truth and batches


def random_image(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Return a (3, H, W) uint8 image of smooth blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].to(torch.uint8)


def ground_truth(height: int = 64, width: int = 96, boxes=((8, 8, 40, 40), (30, 20, 90, 60))) -> Instances:
    """Return objects of classes 0, 1, 2, 0, ... whose masks are their boxes."""
    out = Instances((height, width), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    out.gt_classes = torch.arange(len(boxes)) % NUM_CLASSES
    corners = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], np.float64) for x0, y0, x1, y1 in boxes]
    out.gt_masks = PolygonMasks([[x] for x in corners])
    return out


def training_batch(empty: tuple[bool, ...] = (False, False)) -> list[dict]:
    """Return one dict per image; images marked empty have no objects."""
    return [
        {"image": random_image(seed=i), "instances": ground_truth(boxes=()) if is_empty else ground_truth()}
        for i, is_empty in enumerate(empty)
    ]


def rotated_ground_truth(boxes=((30, 30, 40, 20, 30), (60, 40, 30, 50, -70))) -> Instances:
    """Return rotated objects of classes 0, 1, 2, 0, ... in an image of `IMAGE_SIZE`."""
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    classes = torch.arange(len(boxes)) % NUM_CLASSES
    return Instances(IMAGE_SIZE, gt_boxes=RotatedBoxes(tensor), gt_classes=classes)


def rotated_batch(empty: tuple[bool, ...] = (False, False)) -> list[dict]:
    """Return the batch of `training_batch` with rotated boxes."""
    return [
        {
            "image": random_image(seed=i),
            "instances": rotated_ground_truth(boxes=()) if is_empty else rotated_ground_truth(),
        }
        for i, is_empty in enumerate(empty)
    ]


# Configs and models


def small_config(name: str = MASK_RCNN, **overrides) -> CfgNode:
    """Return a shipped YAML config with ResNet-18 and narrow heads.

    Args:
        name: path below `configs/`.
        **overrides: config keys with "__" for the dots.
    """
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


def rotated_config(**overrides) -> CfgNode:
    """Return `small_config` of a Faster R-CNN with rotated boxes."""
    return small_config(FASTER_RCNN, **{**ROTATED, **overrides})


def tiny_cfg(output_dir, **overrides) -> CfgNode:
    """Return a Mask R-CNN on generated 64 x 64 images, batches of two: a step takes a fraction of a second.

    Args:
        output_dir: OUTPUT_DIR.
        **overrides: config keys with "__" for the dots.
    """
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "Quickstart/mask_rcnn_R_18_FPN_shapes.yaml"))
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SEED = 3
    cfg.VERSION = 2
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATASETS.TRAIN = ("shapes:train?num=8&size=64",)
    cfg.DATASETS.TEST = ("shapes:val?num=4&size=64",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 0
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def tiny_lazy_config(output_dir, *overrides: str):
    """Return an FCOS as a lazy config on generated 64 x 64 images, batches of two.

    Args:
        output_dir: `train.output_dir`.
        *overrides: "key=value" strings.
    """
    cfg = LazyConfig.load(str(TINY_LAZY_FILE))
    return LazyConfig.apply_overrides(
        cfg, [*TINY_LAZY_OVERRIDES, f"train.output_dir={output_dir}", *overrides]
    )


def small_fcos(**overrides) -> FCOS:
    """Return an FCOS on a narrow ResNet-18-FPN with five levels; `overrides` are arguments of `FCOS`."""
    backbone = build_backbone(small_config(RETINANET))
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=32)] * 5, conv_dims=[32], num_classes=NUM_CLASSES, norm="GN"
    )
    values = {
        "backbone": backbone,
        "head": head,
        "head_in_features": ["p3", "p4", "p5", "p6", "p7"],
        "num_classes": NUM_CLASSES,
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [57.375, 57.12, 58.395],
        "test_score_thresh": 0.02,
    }
    return FCOS(**values | overrides)


class TinyFPN(Backbone):
    """Feature maps p3, p4 and p5 with 16 channels, which overfit in a second."""

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


def overfits_training_batch(model, num_steps: int, lr: float = 1e-3) -> bool:
    """Train on `training_batch` and return whether each of its objects is then detected with its class."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    for _ in range(num_steps):
        losses = model(training_batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    want, found = ground_truth(), [x["instances"] for x in model.eval()(training_batch())]
    iou = [pairwise_iou(want.gt_boxes, x.pred_boxes) for x in found]
    return all(
        (iou[i][j][found[i].pred_classes == k] > 0.6).any()
        for i in range(len(found))
        for j, k in enumerate(want.gt_classes.tolist())
    )
