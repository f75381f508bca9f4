"""The LVIS metric (https://arxiv.org/abs/1908.03195) for boxes and masks, and the recall of box proposals.

It is COCO's metric on a federated dataset, whose images are each annotated for some of the categories only.

Shape legend: T IoU thresholds, R recall thresholds, K categories, A area ranges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detlib.evaluation.coco_evaluation import COCOEvaluator
from detlib.evaluation.coco_json import GroundTruth, load_ground_truth
from detlib.evaluation.coco_metrics import METRICS as COCO_METRICS
from detlib.evaluation.coco_metrics import CocoScores, mean_percent

__all__ = ["METRICS", "LVISEvaluator", "LvisScores", "evaluate_lvis", "keep_best_per_image"]

_BY_FREQUENCY = ("APr", "APc", "APf")

METRICS = {task: (*COCO_METRICS[task], *_BY_FREQUENCY) for task in ("bbox", "segm")}

_NUM_THRESHOLDS, _NUM_RECALLS = 10, 101
_AREA_NAMES = ("all", "small", "medium", "large")


class LVISEvaluator(COCOEvaluator):
    """Evaluator of instance predictions with LVIS's average precision, and of proposals with average recall.

    See `evaluate_lvis` for the differences to COCO's metric.
    """

    _METRICS = METRICS
    _RESULTS_FILE = "lvis_instances_results.json"
    _DEFAULT_MAX_DETS = 300

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered name. Its metadata has `json_file`, the annotation file in LVIS's
                format.
            tasks: some of "bbox" and "segm"; by default the tasks that the predictions have fields for.
            distributed: gather the predictions of all processes in the main process.
            output_dir: folder for `instances_predictions.pth`, `lvis_instances_results.json` (in COCO's
                result format) or `box_proposals.pkl`.
            max_dets_per_image: maximum number of detections per image that count, over all classes, highest
                scores first. Default: 300. Negative for no limit.

        Raises:
            ValueError: the dataset has no annotation file, or a task is unknown.
            FileNotFoundError: the annotation file does not exist.
        """
        super().__init__(dataset_name, tasks, distributed, output_dir, max_dets_per_image=max_dets_per_image)
        if not self._metadata.get("json_file"):
            raise ValueError(
                f"LVISEvaluator: dataset {dataset_name!r} has no 'json_file' in its metadata; the metric "
                "needs the annotation file, which lists the annotated categories of each image."
            )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the metrics of all collected predictions.

        Args:
            img_ids: evaluate only the images with these ids; all by default.

        Returns:
            `{task: {metric: percent}}`. The metrics of the tasks "bbox" and "segm" are "AP", "AP50", "AP75",
            "APs", "APm", "APl", "APr", "APc" and "APf"; those of "box_proposals" are "AR@100", "ARs@100" etc.
            Empty in processes other than the main one, and if nothing can be evaluated.
        """
        return super().evaluate(img_ids)

    @functools.cached_property
    def _ground_truth(self) -> GroundTruth:
        ground_truth = load_ground_truth(self._dataset_name, self._metadata)
        annotations = [{**annotation, "iscrowd": 0} for annotation in ground_truth.coco["annotations"]]
        return dataclasses.replace(ground_truth, coco={**ground_truth.coco, "annotations": annotations})

    def _score(self, results: list[dict], task: str, img_ids: Sequence[int] | None) -> LvisScores:
        return evaluate_lvis(
            self._ground_truth.coco,
            results,
            task,
            max_dets=self._max_dets_per_image or self._DEFAULT_MAX_DETS,
            img_ids=img_ids,
        )

    def _category_ids(self) -> dict[int, int]:
        """Return the mapping from class index to category id."""
        if self._metadata.get("thing_dataset_id_to_contiguous_id") is None:
            return {category_id - 1: category_id for category_id in self._ground_truth.category_ids}
        return super()._category_ids()

    def _class_names(self) -> None:
        """Return None: there are too many classes for a table."""
        return None


@dataclass(frozen=True)
class LvisScores(CocoScores):
    """Precision and recall of an LVIS evaluation.

    Attributes:
        frequencies: K frequency groups of the categories: "r" (rare), "c" (common), "f" (frequent), or "" if
            the file does not specify it.
    """

    frequencies: tuple[str, ...] = ()

    def ap(self, metric: str) -> float:
        """Return a metric in percent, or nan if it has no ground truth.

        Args:
            metric: as in `CocoScores.ap`, or "APr", "APc" or "APf" for rare, common or frequent categories.
        """
        if metric not in _BY_FREQUENCY:
            return super().ap(metric)
        chosen = np.array([frequency == metric[-1] for frequency in self.frequencies], dtype=bool)
        return mean_percent(self.precision[:, :, chosen, 0, -1])


def keep_best_per_image(results: list[dict], limit: int) -> list[dict]:
    """Return the `limit` results with the highest scores of each image, over all classes.

    Of equal scores, the earlier result is preferred. A negative limit keeps all results.
    """
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    kept = []
    for found in by_image.values():
        if 0 <= limit < len(found):
            found = sorted(found, key=lambda result: -result["score"])[:limit]
        kept += found
    return kept


def evaluate_lvis(
    lvis: dict,
    results: list[dict],
    task: str,
    *,
    max_dets: int = 300,
    img_ids: Sequence[int] | None = None,
) -> LvisScores:
    """Evaluate predictions with the LVIS metric.

    In an image, only categories count that are annotated in it or listed in its `neg_category_ids`. Unmatched
    detections of categories in its `not_exhaustive_category_ids` are not counted as wrong.

    faster-coco-eval evaluates each category on the images that are relevant to it. There are millions of
    pairs of an image and a category, nearly all of them empty.

    Args:
        lvis: ground truth in LVIS's format. LVIS has no crowd regions, so `iscrowd` is ignored.
        results: predictions in COCO's result format, with category ids.
        task: "bbox" or "segm".
        max_dets: maximum number of detections per image that count, over all categories, highest scores
            first. Negative for no limit.
        img_ids: evaluate only these images.

    Returns:
        Precision and recall, with -1 for categories without ground truth.
    """
    images = {image["id"]: image for image in lvis["images"]}
    if img_ids is not None:
        images = {i: images[i] for i in img_ids}
    gt: dict[int, list[dict]] = defaultdict(list)
    annotated = {i: set(image.get("neg_category_ids") or ()) for i, image in images.items()}
    for annotation in lvis["annotations"]:
        if annotation["image_id"] in images:
            gt[annotation["category_id"]].append({**annotation, "iscrowd": 0})
            annotated[annotation["image_id"]].add(annotation["category_id"])
    found: dict[int, list[dict]] = defaultdict(list)
    for result in keep_best_per_image(results, max_dets):
        if result["category_id"] in annotated.get(result["image_id"], ()):
            found[result["category_id"]].append(result)

    categories = sorted(lvis["categories"], key=lambda category: category["id"])
    shape = (_NUM_THRESHOLDS, _NUM_RECALLS, len(categories), len(_AREA_NAMES), 1)
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    for k, category in enumerate(categories):
        category_id = category["id"]
        if gt[category_id]:
            precision[:, :, k], recall[:, k] = _evaluate_category(
                category_id, gt[category_id], found[category_id], images, task
            )
    return LvisScores(
        precision=precision,
        recall=recall,
        iou_thresholds=np.linspace(0.5, 0.95, _NUM_THRESHOLDS),
        area_names=_AREA_NAMES,
        max_dets=(max_dets,),
        frequencies=tuple(category.get("frequency", "") for category in categories),
    )


def _evaluate_category(
    category_id: int, gt: list[dict], found: list[dict], images: dict[int, dict], task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, A, 1) and recall (T, A, 1) of one category that has ground truth."""
    from faster_coco_eval import COCO

    from detlib.evaluation.fast_eval_api import COCOeval_opt

    image_ids = sorted({a["image_id"] for a in gt} | {a["image_id"] for a in found})
    header = {
        "info": {},
        "categories": [{"id": category_id, "name": "", "frequency": "f"}],
        "images": [
            {
                "id": i,
                "height": images[i]["height"],
                "width": images[i]["width"],
                "neg_category_ids": [category_id],  # irrelevant detections are already removed
                "not_exhaustive_category_ids": [
                    c for c in images[i].get("not_exhaustive_category_ids") or () if c == category_id
                ],
            }
            for i in image_ids
        ],
    }
    results = [_as_annotation(result, number, task) for number, result in enumerate(found, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval_opt(
            COCO({**header, "annotations": gt}),
            COCO({**header, "annotations": results}),
            task,
            lvis_style=True,
        )
        evaluation.params.maxDets = [max(1, len(found))]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, 0], np.asarray(evaluation.eval["recall"])[:, 0]


def _as_annotation(result: dict, number: int, task: str) -> dict:
    """Return a result as an annotation, with an id and the area of its mask, or of its box for "bbox"."""
    annotation = {"id": number, "iscrowd": 0} | {
        key: result[key] for key in ("image_id", "category_id", "score")
    }
    if task == "bbox":
        return annotation | {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
    from pycocotools import mask as mask_utils

    rle = result["segmentation"]
    return annotation | {"segmentation": rle, "area": float(mask_utils.area(rle))}
