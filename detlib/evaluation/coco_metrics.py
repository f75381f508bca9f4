"""COCO's average precision and recall (https://cocodataset.org/#detection-eval).

Shape legend: T IoU thresholds, R recall thresholds, K categories, A area ranges, M limits on the number of
detections per image; in overlaps D detections, G ground truth objects, P keypoints of an object.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detlib.ops import box_iou_rotated
from detlib.structures import BoxMode

__all__ = [
    "METRICS",
    "CocoScores",
    "are_rotated",
    "evaluate_coco",
    "gc_paused",
    "keypoint_similarity",
    "make_coco_api",
    "make_keypoint_similarity",
    "make_rotated_iou",
    "mean_percent",
    "rotated_iou",
    "to_rotated",
]

METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}

_AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}


@dataclass(frozen=True)
class CocoScores:
    """Precision and recall of a COCO evaluation.

    Attributes:
        precision: (T, R, K, A, M) float64, -1 where there is no ground truth.
        recall: (T, K, A, M) float64, -1 where there is no ground truth.
        iou_thresholds: (T,) float64.
        area_names: the A names "all", "small", ...
        max_dets: the M limits in ascending order.
    """

    precision: np.ndarray
    recall: np.ndarray
    iou_thresholds: np.ndarray
    area_names: tuple[str, ...]
    max_dets: tuple[int, ...]

    def ap(self, metric: str) -> float:
        """Return a metric such as "AP", "AP50" or "APs" in percent, or nan if it has no ground truth.

        The highest limit on the number of detections applies.
        """
        suffix = metric.removeprefix("AP")
        precision = self.precision[..., self._area_index("" if suffix.isdigit() else suffix), -1]
        if suffix.isdigit():
            precision = precision[np.isclose(self.iou_thresholds, int(suffix) / 100)]
        return mean_percent(precision)

    def ap_of_class(self, index: int) -> float:
        """Return the AP, in percent, of the category with the `index`-th smallest id, or nan."""
        return mean_percent(self.precision[:, :, index, 0, -1])

    def ar(self, max_dets_index: int = -1, area: str = "") -> float:
        """Return the average recall in percent, or nan.

        Args:
            max_dets_index: index into `max_dets` of the limit that applies.
            area: "" for all, "s", "m" or "l".
        """
        return mean_percent(self.recall[:, :, self._area_index(area), max_dets_index])

    def _area_index(self, suffix: str) -> int:
        return self.area_names.index(_AREAS[suffix])


def mean_percent(values: np.ndarray) -> float:
    """Return the mean, in percent, of the valid values (above -1), or nan if there are none."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def make_coco_api(coco: dict, fast: bool = True) -> Any:
    """Return a `COCO` object of faster-coco-eval, or of pycocotools if `fast` is False."""
    if fast:
        from faster_coco_eval import COCO

        return COCO(coco)
    from pycocotools.coco import COCO

    api = COCO()
    api.dataset = coco
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection while many small objects are created that all stay in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _as_detections(coco_gt: Any, results: list[dict], task: str) -> Any:
    """Return predictions as a `COCO` object.

    The backends' own `loadRes` processes the results one by one and adds fields that are not used. The area
    of a result is that of its mask for the task "segm", otherwise that of its box.
    """
    key = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[task]
    areas = _areas(results, task)
    detections = type(coco_gt)()
    detections.dataset = {
        "images": list(coco_gt.dataset["images"]),
        "categories": coco_gt.dataset["categories"],
        "annotations": [
            {
                "id": number,
                "image_id": result["image_id"],
                "category_id": result["category_id"],
                "score": result["score"],
                "area": area,
                "iscrowd": 0,
                key: result[key],
            }
            for number, (result, area) in enumerate(zip(results, areas), start=1)
        ],
    }
    detections.createIndex()
    return detections


def _areas(results: list[dict], task: str) -> list[float]:
    if task == "segm":
        from faster_coco_eval.core import mask as mask_utils  # pycocotools.mask accepts at most 255 masks

        return list(map(float, mask_utils.area([result["segmentation"] for result in results])))
    if all("bbox" in result for result in results):
        return [result["bbox"][2] * result["bbox"][3] for result in results]
    points = np.array([result["keypoints"] for result in results], dtype=np.float64)
    return (np.ptp(points[:, 0::3], axis=1) * np.ptp(points[:, 1::3], axis=1)).tolist()


def are_rotated(annotations: Iterable[dict]) -> bool:
    """Return whether any box of annotations or results in COCO's format has five numbers, so is rotated."""
    return any(len(annotation.get("bbox") or ()) == 5 for annotation in annotations)


def to_rotated(boxes: list[list[float]]) -> np.ndarray:
    """Convert boxes in COCO's format to (N, 5) float64 rotated boxes.

    Axis-aligned boxes, (x0, y0, width, height), get the angle 0.
    """
    rows = [b if len(b) == 5 else BoxMode.convert(b, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS) for b in boxes]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def rotated_iou(dt_boxes: np.ndarray, gt_boxes: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Return the overlap of every pair as COCO defines it.

    It is the IoU, but for a crowd region the fraction of the detection that lies inside the region.

    Args:
        dt_boxes: (D, 5) float64, detections.
        gt_boxes: (G, 5) float64, ground truth.
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
    """Return a replacement for the method `computeIoU` of a backend.

    Args:
        annotations: the ground truth in COCO's format.
        results: the predictions in COCO's result format.
        max_dets: maximum number of detections per image and category; those with the highest scores are kept.

    Returns:
        A function of image id and category id, which returns (D, G) float64 overlaps with the detections in
        descending score order, or an empty list if there are no detections or no ground truth objects.
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
    """Group annotations in COCO's format by image id and category id, in their order."""
    groups = defaultdict(list)
    for annotation in annotations:
        groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    return groups


def keypoint_similarity(
    found: np.ndarray, gt: np.ndarray, boxes: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Return COCO's object keypoint similarity of every pair (https://cocodataset.org/#keypoints-eval).

    Objects without labeled keypoints, which do not count, are compared by the distance of the keypoints from
    the object's box, scaled by three about its center.

    Args:
        found: (D, P, 3) float64, x, y and an ignored value of the detected keypoints.
        gt: (G, P, 3) float64, x, y and visibility of the ground truth keypoints.
        boxes: (G, 4) float64 XYWH.
        areas: (G,) float64.
        sigmas: (P,) float64.

    Returns:
        (D, G) float64.
    """
    labeled = gt[:, :, 2] > 0
    bare = ~labeled.any(axis=1)
    offsets = found[:, None, :, :2] - gt[:, :, :2]
    if bare.any():
        low, high = boxes[bare, :2] - boxes[bare, 2:], boxes[bare, :2] + 2 * boxes[bare, 2:]
        points = found[:, None, :, :2]
        below, above = low[:, None] - points, points - high[:, None]
        offsets[:, bare] = np.maximum(below, 0) + np.maximum(above, 0)
    # Same order of operations as in pycocotools, to keep rounding differences rare.
    distances = offsets[..., 0] ** 2 + offsets[..., 1] ** 2
    similar = np.exp(-(distances / (2 * sigmas) ** 2 / (areas[:, None] + np.spacing(1)) / 2))
    counted = labeled | bare[:, None]  # type: ignore[index]
    return (similar * counted).sum(axis=2) / counted.sum(axis=1)


def make_keypoint_similarity(
    annotations: list[dict], results: list[dict], max_dets: int, sigmas: np.ndarray
) -> Callable:
    """Return a replacement for the method `computeOks` of a backend.

    Args:
        annotations: the ground truth in COCO's format.
        results: the predictions in COCO's result format.
        max_dets: maximum number of detections per image and category; those with the highest scores are kept.
        sigmas: (P,) one number for each keypoint.

    Returns:
        A function of image id and category id, which returns (D, G) float64 similarities with the detections
        in descending score order, or an empty list if there are no detections or no ground truth objects.
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


def evaluate_coco(
    coco_gt: Any,
    results: list[dict],
    task: str,
    *,
    max_dets: Sequence[int] | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
    img_ids: Sequence[int] | None = None,
    fast: bool = True,
    rotated: bool = False,
) -> CocoScores:
    """Evaluate predictions with COCO's metric.

    Args:
        coco_gt: the ground truth, from `make_coco_api` with the same `fast`.
        results: predictions in COCO's result format, at least one.
        task: "bbox", "segm" or "keypoints".
        max_dets: limits on the number of detections per image; the highest one applies to AP. Default: 1, 10
            and 100. Ignored for keypoints, whose limit is 20.
        kpt_oks_sigmas: one number for each keypoint. Default: those of COCO's 17 keypoints.
        img_ids: evaluate only these images.
        fast: use faster-coco-eval, otherwise pycocotools. The results are the same.
        rotated: compute overlaps of rotated boxes; only for the task "bbox".

    Returns:
        Precision and recall.
    """
    if fast:
        from detlib.evaluation.fast_eval_api import COCOeval_opt as COCOeval
    else:
        from pycocotools.cocoeval import COCOeval  # type: ignore[no-redef]
    with contextlib.redirect_stdout(io.StringIO()), gc_paused():
        evaluation = COCOeval(coco_gt, _as_detections(coco_gt, results, task), task)
        params = evaluation.params
        # For keypoints, faster-coco-eval's default is only the categories that have annotations.
        params.catIds = sorted(coco_gt.getCatIds())
        if img_ids is not None:
            params.imgIds = list(img_ids)
        if max_dets is not None and task != "keypoints":
            params.maxDets = sorted(max_dets)
        if task == "keypoints" and len(kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        if rotated:
            annotations = coco_gt.dataset["annotations"]
            # Both backends look up this method when the evaluation starts.
            evaluation.computeIoU = make_rotated_iou(annotations, results, max(params.maxDets))
        if task == "keypoints" and fast:
            # The backend's own method loops over the detections.
            evaluation.computeOks = make_keypoint_similarity(
                coco_gt.dataset["annotations"], results, max(params.maxDets), params.kpt_oks_sigmas
            )
        evaluation.evaluate()
        evaluation.accumulate()
    return CocoScores(
        precision=np.asarray(evaluation.eval["precision"]),
        recall=np.asarray(evaluation.eval["recall"]),
        iou_thresholds=np.asarray(params.iouThrs),
        area_names=tuple(params.areaRngLbl),
        max_dets=tuple(params.maxDets),
    )
