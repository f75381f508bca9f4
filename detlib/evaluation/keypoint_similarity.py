"""Overlaps of keypoints for the COCO metric, of all objects of a picture at once.

D detections, G ground truth objects, K keypoints.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .rotated_iou import by_image_and_category

__all__ = ["keypoint_similarity", "make_keypoint_similarity"]


def keypoint_similarity(
    found: np.ndarray, truth: np.ndarray, boxes: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """COCO's object keypoint similarity (https://cocodataset.org/#keypoints-eval).

    Objects without a labelled keypoint, which do not count, are compared by how far the keypoints lie outside
    their box, taken three times as large.

    Args:
        found: (D, K, 3) float64, x, y and anything.
        truth: (G, K, 3) float64, x, y and visibility.
        boxes: (G, 4) float64, XYWH.
        areas: (G,) float64.
        sigmas: (K,) float64.

    Returns:
        (D, G) float64.
    """
    labeled = truth[:, :, 2] > 0
    bare = ~labeled.any(axis=1)
    offsets = found[:, None, :, :2] - truth[:, :, :2]
    if bare.any():
        low, high = boxes[bare, :2] - boxes[bare, 2:], boxes[bare, :2] + 2 * boxes[bare, 2:]
        points = found[:, None, :, :2]
        below, above = low[:, None] - points, points - high[:, None]
        offsets[:, bare] = np.maximum(below, 0) + np.maximum(above, 0)
    # In pycocotools' order, so that the last digits differ as seldom as can be.
    distances = offsets[..., 0] ** 2 + offsets[..., 1] ** 2
    similar = np.exp(-(distances / (2 * sigmas) ** 2 / (areas[:, None] + np.spacing(1)) / 2))
    counted = labeled | bare[:, None]
    return (similar * counted).sum(axis=2) / counted.sum(axis=1)


def make_keypoint_similarity(
    annotations: list[dict], results: list[dict], max_dets: int, sigmas: np.ndarray
) -> Callable:
    """Returns what takes the place of the method `computeOks` of a back end.

    Args:
        annotations: the ground truth's, in COCO's format.
        results: the predictions, likewise.
        max_dets: so many detections of a picture and category count, the best first.
        sigmas: one number for each keypoint.

    Returns:
        A function of image id and category id. It gives (D, G) float64, the detections by falling score, or
        an empty list where there are none of one kind.
    """
    gts, dts = by_image_and_category(annotations), by_image_and_category(results)
    sigmas = np.asarray(sigmas, dtype=np.float64)

    def stack(entries: list[dict]) -> np.ndarray:
        return np.array([e["keypoints"] for e in entries], dtype=np.float64).reshape(len(entries), -1, 3)

    def compute(image_id: int, category_id: int) -> np.ndarray | list:
        gt, dt = gts.get((image_id, category_id)), dts.get((image_id, category_id))
        if not gt or not dt:
            return []
        order = np.argsort([-d["score"] for d in dt], kind="mergesort")[:max_dets]
        boxes = np.array([g["bbox"] for g in gt], dtype=np.float64)
        areas = np.array([g["area"] for g in gt], dtype=np.float64)
        return keypoint_similarity(stack([dt[i] for i in order]), stack(gt), boxes, areas, sigmas)

    return compute
