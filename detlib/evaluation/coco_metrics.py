"""COCO's average precision and recall (https://cocodataset.org/#detection-eval).

T IoU thresholds, R recall thresholds, K categories, A area ranges, M limits of detections in an image.
In overlaps: D detections, G ground truth objects, P keypoints of an object.
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
    """What COCO's evaluation computes.

    Attributes:
        precision: (T, R, K, A, M) float64, -1 where there is no ground truth.
        recall: (T, K, A, M) float64, likewise.
        iou_thresholds: (T,) float64.
        area_names: the A names "all", "small", ...
        max_dets: the M limits, rising.
    """

    precision: np.ndarray
    recall: np.ndarray
    iou_thresholds: np.ndarray
    area_names: tuple[str, ...]
    max_dets: tuple[int, ...]

    def ap(self, metric: str) -> float:
        """Returns a metric such as "AP", "AP50" or "APs" in percent, or nan without ground truth for it.

        It is computed with the highest limit of detections.
        """
        suffix = metric.removeprefix("AP")
        precision = self.precision[..., self._area_index("" if suffix.isdigit() else suffix), -1]
        if suffix.isdigit():
            precision = precision[np.isclose(self.iou_thresholds, int(suffix) / 100)]
        return mean_percent(precision)

    def ap_of_class(self, index: int) -> float:
        """Returns AP, in percent, of the category with the `index`-th smallest id, or nan."""
        return mean_percent(self.precision[:, :, index, 0, -1])

    def ar(self, max_dets_index: int = -1, area: str = "") -> float:
        """Returns the average recall, in percent, or nan.

        Args:
            max_dets_index: which of `max_dets` is the limit.
            area: "", "s", "m" or "l".
        """
        return mean_percent(self.recall[:, :, self._area_index(area), max_dets_index])

    def _area_index(self, suffix: str) -> int:
        return self.area_names.index(_AREAS[suffix])


def mean_percent(values: np.ndarray) -> float:
    """The mean in percent of the values that are there (above -1), or nan."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def make_coco_api(coco: dict, fast: bool = True) -> Any:
    """Returns a `COCO` object of faster-coco-eval, or of pycocotools if not `fast`."""
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
    """Keeps Python from looking for garbage while very many small objects are made, all of them in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _as_detections(coco_gt: Any, results: list[dict], task: str) -> Any:
    """Returns predictions as a `COCO` object.

    The back ends' own `loadRes` does this for one result after the other, and adds things that nothing asks
    for. A result's area is that of its mask for the task "segm", else that of its box.
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
        from faster_coco_eval.core import mask as mask_utils  # pycocotools' takes no more than 255 at once

        return list(map(float, mask_utils.area([result["segmentation"] for result in results])))
    if all("bbox" in result for result in results):
        return [result["bbox"][2] * result["bbox"][3] for result in results]
    points = np.array([result["keypoints"] for result in results], dtype=np.float64)
    return (np.ptp(points[:, 0::3], axis=1) * np.ptp(points[:, 1::3], axis=1)).tolist()


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
        max_dets: so many detections of an image and category count, the best first.

    Returns:
        A function of image id and category id. It gives (D, G) float64, the detections by descending score,
        or an empty list where there are none of one kind.
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


def keypoint_similarity(
    found: np.ndarray, truth: np.ndarray, boxes: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """COCO's object keypoint similarity (https://cocodataset.org/#keypoints-eval).

    Objects without a labeled keypoint, which do not count, are compared by how far the keypoints lie outside
    their box, taken three times as large.

    Args:
        found: (D, P, 3) float64, x, y and anything.
        truth: (G, P, 3) float64, x, y and visibility.
        boxes: (G, 4) float64, XYWH.
        areas: (G,) float64.
        sigmas: (P,) float64.

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
    counted = labeled | bare[:, None]  # type: ignore[index]
    return (similar * counted).sum(axis=2) / counted.sum(axis=1)


def make_keypoint_similarity(
    annotations: list[dict], results: list[dict], max_dets: int, sigmas: np.ndarray
) -> Callable:
    """Returns what takes the place of the method `computeOks` of a back end.

    Args:
        annotations: the ground truth's, in COCO's format.
        results: the predictions, likewise.
        max_dets: so many detections of an image and category count, the best first.
        sigmas: one number for each keypoint.

    Returns:
        A function of image id and category id. It gives (D, G) float64, the detections by descending score,
        or an empty list where there are none of one kind.
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
    """Evaluates predictions by COCO's metric.

    Args:
        coco_gt: from `make_coco_api`, with the same `fast`.
        results: predictions in COCO's result format; at least one.
        task: "bbox", "segm" or "keypoints".
        max_dets: limits of detections in an image; AP counts with the highest. Default: 1, 10, 100, and 20
            for keypoints.
        kpt_oks_sigmas: one number for each keypoint; default: those of COCO's 17.
        img_ids: evaluate on these images only.
        fast: use faster-coco-eval, else pycocotools. The numbers are the same.
        rotated: whether overlaps of boxes are those of rotated boxes; only for the task "bbox".
    """
    if fast:
        from detlib.evaluation.fast_eval_api import COCOeval_opt as COCOeval
    else:
        from pycocotools.cocoeval import COCOeval  # type: ignore[no-redef]
    with contextlib.redirect_stdout(io.StringIO()), gc_paused():
        evaluation = COCOeval(coco_gt, _as_detections(coco_gt, results, task), task)
        params = evaluation.params
        # faster-coco-eval takes only the categories that have annotations, for keypoints.
        params.catIds = sorted(coco_gt.getCatIds())
        if img_ids is not None:
            params.imgIds = list(img_ids)
        if max_dets is not None and task != "keypoints":
            params.maxDets = sorted(max_dets)
        if task == "keypoints" and len(kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        if rotated:
            annotations = coco_gt.dataset["annotations"]
            # Both back ends look this method up when they begin.
            evaluation.computeIoU = make_rotated_iou(annotations, results, max(params.maxDets))
        if task == "keypoints" and fast:
            # The back end's own goes through the detections one by one.
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
