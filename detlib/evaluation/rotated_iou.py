"""Overlaps of rotated boxes for the COCO metric, in place of those that its back ends compute.

D detections, G ground truth boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import torch

from detlib.ops import box_iou_rotated
from detlib.structures import BoxMode

__all__ = ["are_rotated", "by_image_and_category", "make_rotated_iou", "rotated_iou", "to_rotated"]


def are_rotated(annotations: Iterable[dict]) -> bool:
    """Whether a box in COCO's format, of the ground truth or of results, is (x, y, width, height, angle)."""
    return any(len(annotation.get("bbox") or ()) == 5 for annotation in annotations)


def to_rotated(boxes: list[list[float]]) -> np.ndarray:
    """(N, 5) float64 from boxes in COCO's format; upright ones, (x0, y0, width, height), get the angle 0."""
    rows = [b if len(b) == 5 else BoxMode.convert(b, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS) for b in boxes]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def rotated_iou(dt_boxes: np.ndarray, gt_boxes: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Overlaps as COCO defines them: of a crowd, it is the part of the detection that lies in it.

    Args:
        dt_boxes: (D, 5) float64.
        gt_boxes: (G, 5) float64.
        is_crowd: (G,) bool.

    Returns:
        (D, G) float64.
    """
    iou = box_iou_rotated(torch.from_numpy(dt_boxes), torch.from_numpy(gt_boxes)).numpy()
    if not is_crowd.any():
        return iou
    dt_areas = (dt_boxes[:, 2] * dt_boxes[:, 3])[:, None]
    gt_areas = gt_boxes[:, 2] * gt_boxes[:, 3]
    intersection = iou * (dt_areas + gt_areas) / (1 + iou)
    of_detection = np.divide(intersection, dt_areas, out=np.zeros_like(iou), where=dt_areas > 0)
    return np.where(is_crowd, of_detection, iou)


def make_rotated_iou(annotations: list[dict], results: list[dict], max_dets: int) -> Callable:
    """Returns what takes the place of the method `computeIoU` of a back end.

    Args:
        annotations: the ground truth's, in COCO's format.
        results: the predictions, likewise.
        max_dets: so many detections of a picture and category count, the best first.

    Returns:
        A function of image id and category id. It gives (D, G) float64, the detections by falling score, or
        an empty list where there are none of one kind.
    """
    gts, dts = by_image_and_category(annotations), by_image_and_category(results)

    def compute(image_id: int, category_id: int) -> np.ndarray | list:
        gt, dt = gts.get((image_id, category_id)), dts.get((image_id, category_id))
        if not gt or not dt:
            return []
        order = np.argsort([-d["score"] for d in dt], kind="mergesort")[:max_dets]
        return rotated_iou(
            to_rotated([dt[i]["bbox"] for i in order]),
            to_rotated([g["bbox"] for g in gt]),
            np.array([bool(g.get("iscrowd", 0)) for g in gt]),
        )

    return compute


def by_image_and_category(annotations: list[dict]) -> dict[tuple[int, int], list[dict]]:
    """Annotations in COCO's format by the ids of image and category, in their order."""
    groups = defaultdict(list)
    for annotation in annotations:
        groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    return groups
