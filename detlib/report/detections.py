"""Predictions of a run and their ground truth, as files and as arrays.

Shapes: G ground-truth objects, D detections, K classes in the order of their category ids.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from detlib.data.catalog import MetadataCatalog
from detlib.evaluation.coco_json import GroundTruth, complete_ground_truth, load_ground_truth
from detlib.evaluation.coco_metrics import (
    CocoScores,
    are_rotated,
    evaluate_coco,
    gc_paused,
    make_coco_api,
    to_rotated,
)
from detlib.evaluation.lvis_evaluation import evaluate_lvis, keep_best_per_image
from detlib.report.run import max_dets, setting
from detlib.utils.file_io import PathManager, safe_name

__all__ = ["Detections", "find_predictions", "load_detections"]

logger = logging.getLogger(__name__)

_RESULT_FILES = ("coco_instances_results.json", "lvis_instances_results.json")
_TASKS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
_DEFAULT_MAX_DETS, _LVIS_MAX_DETS = 100, 300


def find_predictions(
    output_dir: str, datasets: Sequence[str], config: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the paths of a run's prediction files, by dataset name.

    They are in ``inference/`` or in its subfolder of the dataset; with a lazy config, also in the output
    folder of the evaluator. A file in ``inference/`` itself belongs to the last dataset, which has
    overwritten the others.
    """
    inference = os.path.join(output_dir, "inference")
    evaluators = setting(config, "dataloader.evaluator", default=())
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else list(evaluators)
    configured = [folder for e in evaluators if (folder := setting(e, "output_dir"))]
    found = {}
    for dataset in datasets:
        folders = [os.path.join(inference, name) for name in dict.fromkeys((safe_name(dataset), dataset))]
        if dataset == datasets[-1]:
            folders += [inference, *configured]
        paths = [os.path.join(folder, name) for folder in folders for name in _RESULT_FILES]
        existing = [path for path in paths if PathManager.isfile(path)]
        if existing:
            found[dataset] = existing[0]
    return found


@dataclass
class Detections:
    """Detections and ground truth of a dataset. The arrays leave out what the metric ignores.

    Attributes:
        dataset: name of the dataset.
        path: file of the predictions.
        ground_truth: ground truth as the metric uses it.
        results: predictions in COCO's result format.
        class_names: K class names.
        image_ids: (N,) int64 image ids in ascending order.
        gt_image, gt_class: (G,) int64, indices into `image_ids` and `class_names`.
        gt_boxes: (G, 4) float64, x, y, width, height in pixels; rotated boxes are (G, 5), center x, center y,
            width, height, angle in degrees counter-clockwise.
        gt_crowd: (G,) bool. Crowds are not counted as objects, and detections in them are not false
            positives.
        dt_image, dt_class, dt_boxes: the same for detections, (D,) and (D, 4 or 5).
        dt_score: (D,) float64.
        dt_uncounted: (D,) bool, detections that are not false positives if unmatched, since not every object
            of their class is annotated in their image (LVIS).
        dt_results: the D results that the arrays are built from.
        is_lvis: whether the metric is LVIS's.
        limit: maximum number of counted detections per image; None for the metric's default.
        sigmas: keypoint sigmas of OKS; empty for COCO's.
    """

    dataset: str
    path: str
    ground_truth: GroundTruth
    results: list[dict]
    class_names: list[str]
    image_ids: np.ndarray
    gt_image: np.ndarray
    gt_class: np.ndarray
    gt_boxes: np.ndarray
    gt_crowd: np.ndarray
    dt_image: np.ndarray
    dt_class: np.ndarray
    dt_boxes: np.ndarray
    dt_score: np.ndarray
    dt_uncounted: np.ndarray
    dt_results: list[dict]
    is_lvis: bool = False
    limit: int | None = None
    sigmas: tuple[float, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_rotated(self) -> bool:
        return self.gt_boxes.shape[1] == 5

    @cached_property
    def gt_counts(self) -> np.ndarray:
        """Number of objects per class, (K,)."""
        return np.bincount(self.gt_class[~self.gt_crowd], minlength=self.num_classes)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have predictions and annotations."""
        if not self.results:
            return ()
        predicted = [
            task for task, key in _TASKS.items() if any(key in result for result in self.results[:1])
        ]
        if self.is_rotated or self.is_lvis:
            predicted = [task for task in predicted if task == "bbox" or (self.is_lvis and task == "segm")]
        annotated = [
            task
            for task in predicted
            if task == "bbox" or any(a.get(_TASKS[task]) for a in self.ground_truth.coco["annotations"])
        ]
        return tuple(annotated)

    def scores(self, task: str) -> CocoScores:
        """Compute precision and recall the same way as the evaluator."""
        coco = self.ground_truth.coco
        if self.is_lvis:
            return evaluate_lvis(coco, self.results, task, max_dets=self.limit or _LVIS_MAX_DETS)
        limit = self.limit or _DEFAULT_MAX_DETS
        return evaluate_coco(
            make_coco_api(coco),
            self.results,
            task,
            max_dets=(*(n for n in (1, 10) if n < limit), limit),
            kpt_oks_sigmas=self.sigmas,
            rotated=task == "bbox" and self.is_rotated,
        )


def _load_ground_truth(dataset: str, folder: str) -> GroundTruth:
    """Load the ground truth of a dataset, falling back to the evaluator's copy next to the predictions."""
    try:
        return load_ground_truth(dataset, MetadataCatalog.get(dataset))
    except (KeyError, OSError, ValueError) as error:
        converted = os.path.join(folder, f"{safe_name(dataset)}_coco_format.json")
        if not PathManager.isfile(converted):
            raise
        logger.info("Report: %s; using the ground truth in %s", error, converted)
        with PathManager.open(converted) as file:
            return complete_ground_truth(json.load(file))


def load_detections(path: str, dataset: str, config: Mapping[str, Any] | None = None) -> Detections:
    """Read predictions and their ground truth.

    Args:
        path: file of predictions in COCO's result format.
        dataset: a registered name or a dataset URI.
        config: config of the run; source of the maximum number of detections and of the keypoint sigmas.

    Raises:
        KeyError, FileNotFoundError: the dataset is not registered, or its files do not exist.
        ValueError: the dataset has no annotations, or the predictions have unknown images or classes.
    """
    ground_truth = _load_ground_truth(dataset, os.path.dirname(path))
    if not ground_truth.has_annotations:
        raise ValueError(f"Dataset {dataset!r} has no annotations.")
    with gc_paused(), PathManager.open(path) as file:
        results = json.load(file)
    is_lvis = os.path.basename(path).startswith("lvis")
    limit = max_dets(config)
    if is_lvis:
        annotations = [{**a, "iscrowd": 0} for a in ground_truth.coco["annotations"]]
        ground_truth = GroundTruth(
            {**ground_truth.coco, "annotations": annotations}, ground_truth.image_numbers, True
        )
    category_ids = np.array(ground_truth.category_ids, dtype=np.int64)
    image_ids = np.unique(np.array([image["id"] for image in ground_truth.coco["images"]], dtype=np.int64))
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        unknown = np.setdiff1d([result[key] for result in results], known)
        if len(unknown):
            raise ValueError(
                f"{path}: the predictions have {key} {unknown[:3].tolist()}, which dataset {dataset!r} does "
                "not have. They belong to another dataset, or the dataset has changed."
            )

    counted, uncounted = results, np.zeros(len(results), dtype=bool)
    if is_lvis:
        counted, uncounted = _searched_only(
            ground_truth.coco, keep_best_per_image(results, limit or _LVIS_MAX_DETS)
        )
    annotations = ground_truth.coco["annotations"]
    rotated = are_rotated(annotations) or are_rotated(results)
    to_boxes = to_rotated if rotated else lambda b: np.array(b, dtype=np.float64).reshape(-1, 4)
    arrays: dict[str, np.ndarray] = {}
    for side, rows in (("gt", annotations), ("dt", counted)):
        images = np.array([row["image_id"] for row in rows], dtype=np.int64)
        classes = np.array([row["category_id"] for row in rows], dtype=np.int64)
        arrays[f"{side}_image"] = np.searchsorted(image_ids, images)
        arrays[f"{side}_class"] = np.searchsorted(category_ids, classes)
        arrays[f"{side}_boxes"] = to_boxes([row["bbox"] for row in rows])
    found = Detections(
        dataset=dataset,
        path=path,
        ground_truth=ground_truth,
        results=results,
        class_names=[str(name) for name in ground_truth.class_names],
        image_ids=image_ids,
        gt_crowd=np.array([bool(row["iscrowd"]) for row in annotations], dtype=bool),
        dt_score=np.array([row["score"] for row in counted], dtype=np.float64),
        dt_uncounted=uncounted,
        dt_results=counted,
        is_lvis=is_lvis,
        limit=limit,
        sigmas=_sigmas(dataset, config),
        **arrays,
    )
    return found if is_lvis else _limited(found)


def _sigmas(dataset: str, config: Mapping[str, Any] | None) -> tuple[float, ...]:
    sigmas = setting(config, "TEST.KEYPOINT_OKS_SIGMAS", "dataloader.evaluator.kpt_oks_sigmas", default=())
    return tuple(sigmas) or tuple(MetadataCatalog.get(dataset).get("keypoint_oks_sigmas", ()))


def _searched_only(lvis: dict, results: list[dict]) -> tuple[list[dict], np.ndarray]:
    """Return the results of classes annotated in their image, and a mask of those never counted as wrong."""
    searched = {image["id"]: set(image.get("neg_category_ids") or ()) for image in lvis["images"]}
    for annotation in lvis["annotations"]:
        searched[annotation["image_id"]].add(annotation["category_id"])
    partly = {image["id"]: set(image.get("not_exhaustive_category_ids") or ()) for image in lvis["images"]}
    kept = [result for result in results if result["category_id"] in searched[result["image_id"]]]
    return kept, np.array([r["category_id"] in partly[r["image_id"]] for r in kept], dtype=bool)


def _limited(found: Detections) -> Detections:
    """Drop the detections of each image and class beyond the metric's limit."""
    group = found.dt_image * found.num_classes + found.dt_class
    order = np.lexsort((-found.dt_score, group))
    starts = np.r_[0, np.flatnonzero(np.diff(group[order])) + 1] if len(order) else np.zeros(0, dtype=int)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    keep = np.sort(order[rank < (found.limit or _DEFAULT_MAX_DETS)])
    for name in ("dt_image", "dt_class", "dt_boxes", "dt_score", "dt_uncounted"):
        setattr(found, name, getattr(found, name)[keep])
    found.dt_results = [found.dt_results[i] for i in keep.tolist()]
    return found
