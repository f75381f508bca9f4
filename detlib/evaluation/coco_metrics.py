"""COCO's average precision and recall (https://cocodataset.org/#detection-eval).

T IoU thresholds, R recall thresholds, K categories, A area ranges, M limits of detections in a picture.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .keypoint_similarity import make_keypoint_similarity
from .rotated_iou import make_rotated_iou

__all__ = ["CocoScores", "METRICS", "evaluate_coco", "gc_paused", "make_coco_api", "mean_percent"]

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
        max_dets: limits of detections in a picture; AP counts with the highest. Default: 1, 10, 100, and 20
            for keypoints.
        kpt_oks_sigmas: one number for each keypoint; default: those of COCO's 17.
        img_ids: evaluate on these pictures only.
        fast: use faster-coco-eval, else pycocotools. The numbers are the same.
        rotated: whether overlaps of boxes are those of rotated boxes; only for the task "bbox".
    """
    if fast:
        from .fast_eval_api import COCOeval_opt as COCOeval
    else:
        from pycocotools.cocoeval import COCOeval
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
