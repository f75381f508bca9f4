"""Average recall of box proposals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes

from .coco_json import GroundTruth
from .rotated_iou import are_rotated, to_rotated

__all__ = ["evaluate_box_proposals"]

_THRESHOLDS = np.arange(0.5, 0.95 + 1e-5, 0.05)
_AREAS = {"": (0.0, 1e5**2), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e5**2)}


def evaluate_box_proposals(
    predictions: list[dict], ground_truth: GroundTruth, limits: Sequence[int] = (100, 1000)
) -> dict[str, float]:
    """Computes the average recall over the IoU thresholds 0.5, 0.55, ..., 0.95, classes aside.

    In each picture proposals and ground truth boxes are paired off one by one, the pair of highest IoU first.

    Args:
        predictions: dicts of `image_id` and `proposals`: Instances with `proposal_boxes` and
            `objectness_logits`.
        ground_truth: boxes of crowds are left out.
        limits: so many proposals of a picture count, the best first.

    Returns:
        "AR@100", "ARs@100", "ARm@100", "ARl@100" and so on for each limit, in percent; nan where there is
        no ground truth box of that size.
    """
    by_image: dict[int, list[dict]] = {}
    for annotation in ground_truth.coco["annotations"]:
        if not annotation["iscrowd"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)

    overlaps: dict[str, list[np.ndarray]] = {f"AR{a}@{limit}": [] for limit in limits for a in _AREAS}
    for prediction in predictions:
        annotations = by_image.get(ground_truth.image_numbers[prediction["image_id"]])
        if not annotations:
            continue
        areas = np.array([annotation["area"] for annotation in annotations])
        iou = _iou(prediction["proposals"], annotations)
        for limit in limits:
            for suffix, (low, high) in _AREAS.items():
                columns = (areas >= low) & (areas <= high)
                overlaps[f"AR{suffix}@{limit}"].append(_pair_off(iou[:limit, columns]))
    return {key: _average_recall(values) for key, values in overlaps.items()}


def _iou(proposals: Instances, annotations: list[dict]) -> np.ndarray:
    """Returns the IoU of the proposals, best first, with the ground truth boxes."""
    order = proposals.objectness_logits.argsort(descending=True)
    boxes = proposals.proposal_boxes[order]
    if isinstance(boxes, RotatedBoxes) or are_rotated(annotations):
        if not isinstance(boxes, RotatedBoxes):
            boxes = RotatedBoxes(BoxMode.convert(boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS))
        return boxes.pairwise_iou(RotatedBoxes(to_rotated([a["bbox"] for a in annotations]))).numpy()
    xywh = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    gt_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
    return boxes.pairwise_iou(gt_boxes).numpy()


def _pair_off(iou: np.ndarray) -> np.ndarray:
    """Returns, for each ground truth box, the IoU with the proposal that it is paired with, in no order."""
    num_proposals, num_boxes = iou.shape
    iou = iou.copy()
    found = np.zeros(num_boxes)
    for i in range(min(num_proposals, num_boxes)):
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        found[i] = iou[row, column]
        iou[row, :] = -1
        iou[:, column] = -1
    return found


def _average_recall(overlaps: list[np.ndarray]) -> float:
    found = np.concatenate(overlaps) if overlaps else np.zeros(0)
    if not found.size:
        return float("nan")
    return float(np.mean([(found >= threshold).mean() for threshold in _THRESHOLDS]) * 100)
