"""The COCO metric for boxes, masks, keypoints and box proposals."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import math
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from detlib.data.catalog import MetadataCatalog
from detlib.evaluation.coco_json import GroundTruth, instances_to_coco_json, load_ground_truth
from detlib.evaluation.coco_metrics import (
    METRICS,
    CocoScores,
    are_rotated,
    evaluate_coco,
    gc_paused,
    make_coco_api,
    to_rotated,
)
from detlib.evaluation.evaluator import DatasetEvaluator
from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detlib.utils import comm
from detlib.utils.file_io import PathManager, safe_name
from detlib.utils.logger import create_small_table, log_first_n

__all__ = ["COCOEvaluator", "evaluate_box_proposals", "instances_to_coco_json"]

_NUM_COCO_KEYPOINTS = 17

# For the average recall of box proposals.
_RECALL_THRESHOLDS = np.arange(0.5, 0.95 + 1e-5, 0.05)
_RECALL_AREAS = {"": (0.0, 1e5**2), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e5**2)}


class COCOEvaluator(DatasetEvaluator):
    """Evaluator of instance predictions with COCO's average precision, and of proposals with average recall.

    The metric is computed by faster-coco-eval, which gives the same numbers as pycocotools. If the ground
    truth or the predictions have rotated boxes, the IoU is that of the rotated rectangles. The ground truth
    is the `json_file` of the dataset's metadata if there is one, otherwise the registered dataset, converted
    to COCO's format. Each evaluator reads it again, so it is never out of date.
    """

    _always_rotated = False
    _METRICS = METRICS
    _RESULTS_FILE = "coco_instances_results.json"
    _DEFAULT_MAX_DETS = 100

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered name or a dataset URI.
            tasks: some of "bbox", "segm" and "keypoints"; by default the tasks that the predictions have
                fields for. A config, as in old programs, is accepted with a warning.
            distributed: gather the predictions of all processes in the main process.
            output_dir: folder for `instances_predictions.pth`, `coco_instances_results.json` (in COCO's
                result format) or `box_proposals.pkl`, and for converted ground truth. Unless all image ids
                are integers in [0, 2^53], the JSON files number the images from 1, the same in both files.
            max_dets_per_image: maximum number of detections per image that count, highest scores first.
                Default: 100.
            use_fast_impl: if False, use pycocotools.
            kpt_oks_sigmas: one number for each keypoint; by default `keypoint_oks_sigmas` of the dataset's
                metadata, or COCO's for 17 keypoints.
            allow_cached_coco: accepted for compatibility and ignored. Results of earlier runs are never used.

        Raises:
            TypeError: `tasks` is not a tuple of names.
            ValueError: a task is unknown, or the number of sigmas does not match the dataset's keypoints.
            FileNotFoundError: the annotation file does not exist.
        """
        self._logger = logging.getLogger(__name__)
        if isinstance(tasks, CfgNode):
            log_first_n(
                logging.WARNING,
                "COCOEvaluator(name, cfg, ...) is deprecated: pass tasks, max_dets_per_image and "
                "kpt_oks_sigmas instead of the config.",
                name=__name__,
            )
            kpt_oks_sigmas = kpt_oks_sigmas or tasks.TEST.KEYPOINT_OKS_SIGMAS
            max_dets_per_image = max_dets_per_image or tasks.TEST.DETECTIONS_PER_IMAGE
            tasks = None
        self._dataset_name = dataset_name
        self._tasks = _check_tasks(tasks, self._METRICS, type(self).__name__)
        self._distributed = distributed
        self._output_dir = output_dir
        self._use_fast_impl = use_fast_impl
        self._max_dets_per_image = max_dets_per_image
        self._metadata = MetadataCatalog.get(dataset_name)
        self._kpt_oks_sigmas = tuple(kpt_oks_sigmas) or tuple(self._metadata.get("keypoint_oks_sigmas", ()))
        json_file = self._metadata.get("json_file")
        if json_file and "://" not in json_file and not PathManager.isfile(json_file):
            raise FileNotFoundError(
                f"{type(self).__name__}: the annotation file {json_file!r} of dataset {dataset_name!r} does "
                "not exist."
            )
        self._check_keypoints()
        self._predictions: list[dict] = []
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()

    def _check_keypoints(self) -> None:
        """Raise ValueError early if the keypoints cannot be evaluated."""
        num_keypoints = len(self._metadata.get("keypoint_names", ()))
        if not num_keypoints:
            return
        if self._kpt_oks_sigmas and len(self._kpt_oks_sigmas) != num_keypoints:
            raise ValueError(
                f"COCOEvaluator: kpt_oks_sigmas (TEST.KEYPOINT_OKS_SIGMAS) has {len(self._kpt_oks_sigmas)} "
                f"numbers; dataset {self._dataset_name!r} has {num_keypoints} keypoints."
            )
        if "keypoints" in (self._tasks or ()) and not self._sigmas_known(num_keypoints):
            raise ValueError(self._missing_sigmas(num_keypoints))

    def _sigmas_known(self, num_keypoints: int) -> bool:
        return num_keypoints == len(self._kpt_oks_sigmas or range(_NUM_COCO_KEYPOINTS))

    def _missing_sigmas(self, num_keypoints: int) -> str:
        return (
            f"The {num_keypoints} keypoints of dataset {self._dataset_name!r} are not COCO's person "
            "keypoints, so set one number for each in TEST.KEYPOINT_OKS_SIGMAS (kpt_oks_sigmas)."
        )

    @functools.cached_property
    def _ground_truth(self) -> GroundTruth:
        ground_truth = load_ground_truth(self._dataset_name, self._metadata)
        if self._output_dir and not self._metadata.get("json_file"):
            name = safe_name(self._dataset_name)
            self._write_json(f"{name}_coco_format.json", ground_truth.coco)
        return ground_truth

    @functools.cached_property
    def _coco_api(self) -> Any:
        """The ground truth as a `COCO` object."""
        return make_coco_api(self._ground_truth.coco, fast=self._use_fast_impl)

    def reset(self) -> None:
        """Discard all predictions."""
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the predictions of one batch.

        Args:
            inputs: the model's input dicts, each with "image_id".
            outputs: the model's output dicts, with "instances" or "proposals".
        """
        for image, output in zip(inputs, outputs):
            prediction = {"image_id": image["image_id"]}
            if "instances" in output:
                prediction["instances"] = self._to_json(output["instances"], image["image_id"])
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(torch.device("cpu"))
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def _to_json(self, instances: Any, img_id: Any) -> list[dict]:
        """Convert the instances of an image to COCO's result format, with class indices as category ids."""
        return instances_to_coco_json(instances, img_id)

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        """Compute the metrics of all collected predictions.

        Args:
            img_ids: evaluate only the images with these ids; all by default.

        Returns:
            `{task: {metric: percent}}`. The metrics of the tasks "bbox", "segm" and "keypoints" are "AP",
            "AP50", "AP75", "APs", "APm", "APl" and "AP-<class>"; those of "box_proposals" are "AR@100",
            "ARs@100" etc. Empty in processes other than the main one, and if nothing can be evaluated.

        Raises:
            ValueError: the predictions lack the fields of a requested task, or have an unknown class.
        """
        predictions = self._gather()
        if predictions is None:
            return {}
        if not predictions:
            self._logger.warning("%s received no predictions.", type(self).__name__)
            return {}
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "instances_predictions.pth"), "wb") as file:
                torch.save(predictions, file)
        self._results = OrderedDict()
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            with gc_paused():
                self._eval_predictions(predictions, img_ids)
        return copy.deepcopy(self._results)

    def _gather(self) -> list[dict] | None:
        """Return the predictions of all processes, or None if this is not the main process."""
        if not self._distributed:
            return self._predictions
        comm.synchronize()
        gathered = comm.gather(self._predictions, dst=0)
        comm.synchronize()
        return list(itertools.chain(*gathered)) if comm.is_main_process() else None

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence[Any] | None = None) -> None:
        """Evaluate instances and store the metrics in `self._results`."""
        results = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        tasks = self._check_tasks_of(results)
        numbers = self._ground_truth.image_numbers
        category_ids = self._category_ids()
        results = [
            {
                **result,
                "image_id": numbers[result["image_id"]],
                "category_id": self._category_id(result["category_id"], category_ids),
            }
            for result in results
        ]
        if self._output_dir:
            self._write_json(self._RESULTS_FILE, results)
        if not self._ground_truth.has_annotations:
            self._logger.info("Dataset %r has no annotations to evaluate with.", self._dataset_name)
            return
        self._warn_of_limit(predictions)
        selected = None if img_ids is None else [numbers[i] for i in img_ids]
        for task in sorted(tasks):
            if task == "keypoints" and results and not self._sigmas_known(len(results[0]["keypoints"]) // 3):
                self._logger.error(self._missing_sigmas(len(results[0]["keypoints"]) // 3))
                continue
            if task != "bbox" and results and not self._is_annotated(task):
                continue
            scores = self._score(results, task, selected) if results else None
            self._results[task] = self._derive_coco_results(scores, task, self._class_names())

    def _is_annotated(self, task: str) -> bool:
        """Return False if all annotations lack the field of the task; warn about annotations without it."""
        total = len(self._ground_truth.coco["annotations"])
        without = total - self._ground_truth.count({"segm": "segmentation"}.get(task, task))
        if without and (task == "segm" or without == total):
            what = "count as missed objects" if without < total else "so the task is not evaluated"
            self._logger.warning(
                "%d of %d annotations of %r have no %s, %s",
                *(without, total, self._dataset_name),
                *({"segm": "mask"}.get(task, task), what),
            )
        return without < total or not total

    def _check_tasks_of(self, results: list[dict]) -> set[str]:
        """Return the tasks to evaluate; raise ValueError if the predictions lack the fields of a task."""
        predicted = _tasks_of(results)
        missing = set(self._tasks or ()) - predicted
        if results and missing:
            raise ValueError(
                f"{type(self).__name__}: tasks is {self._tasks}, but the predictions have no results for "
                f"{sorted(missing)}, only for {sorted(predicted)}."
            )
        return set(self._tasks or predicted & self._METRICS.keys())

    def _score(self, results: list[dict], task: str, img_ids: Sequence[int] | None) -> CocoScores:
        """Compute precision and recall of one task; image ids are those of `GroundTruth.coco`."""
        max_dets = self._max_dets_per_image or self._DEFAULT_MAX_DETS
        rotated = task == "bbox" and (
            self._always_rotated
            or are_rotated(results)
            or are_rotated(self._ground_truth.coco["annotations"])
        )
        return evaluate_coco(
            self._coco_api,
            results,
            task,
            max_dets=(*(n for n in (1, 10) if n < max_dets), max_dets),
            kpt_oks_sigmas=self._kpt_oks_sigmas,
            img_ids=img_ids,
            fast=self._use_fast_impl,
            rotated=rotated,
        )

    def _eval_box_proposals(self, predictions: list[dict]) -> None:
        """Evaluate proposals, and save them in detectron2's format of precomputed proposals."""
        if self._output_dir:
            proposals = [prediction["proposals"] for prediction in predictions]
            saved = {
                "ids": [prediction["image_id"] for prediction in predictions],
                "boxes": [p.proposal_boxes.tensor.numpy() for p in proposals],
                "objectness_logits": [p.objectness_logits.numpy() for p in proposals],
                "bbox_mode": _mode_of(proposals).value,
            }
            with PathManager.open(os.path.join(self._output_dir, "box_proposals.pkl"), "wb") as file:
                pickle.dump(saved, file)
        if not self._ground_truth.has_annotations:
            self._logger.info("Dataset %r has no annotations to evaluate with.", self._dataset_name)
            return
        recalls = evaluate_box_proposals(predictions, self._ground_truth)
        self._logger.info("Proposal metrics:\n%s", create_small_table(recalls))
        self._results["box_proposals"] = recalls

    def _derive_coco_results(
        self, coco_eval: CocoScores | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Log the metrics of one task and return them by name.

        Args:
            coco_eval: precision and recall; None if there are no predictions, which makes all metrics nan.
            iou_type: the task.
            class_names: names of all classes. With two or more, the result has "AP-<class>" for each.
        """
        if coco_eval is None:
            self._logger.warning("The model made no predictions: all %s metrics are nan.", iou_type)
            return {metric: math.nan for metric in self._METRICS[iou_type]}
        results = {metric: coco_eval.ap(metric) for metric in self._METRICS[iou_type]}
        self._logger.info("Evaluation results for %s:\n%s", iou_type, create_small_table(results))
        recalls = {f"AR@{n}": coco_eval.ar(i) for i, n in enumerate(coco_eval.max_dets)}
        self._logger.info("Average recall for %s:\n%s", iou_type, create_small_table(recalls))
        if any(math.isnan(value) for value in results.values()):
            self._logger.info("Metrics without ground truth are nan.")
        if class_names is None or len(class_names) <= 1:
            return results
        class_names = _make_unique(class_names)
        per_class = {f"AP-{name}": coco_eval.ap_of_class(i) for i, name in enumerate(class_names)}
        self._logger.info("AP of each class for %s:\n%s", iou_type, _class_table(class_names, per_class))
        return {**results, **per_class}

    def _category_ids(self) -> dict[int, int]:
        """Return the mapping from class index to category id."""
        id_map = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if id_map is None:
            return {i: i for i in self._ground_truth.category_ids}
        return {index: category_id for category_id, index in id_map.items()}

    def _category_id(self, class_index: int, category_ids: dict[int, int]) -> int:
        if class_index not in category_ids:
            raise ValueError(
                f"The model predicted class {class_index}, but dataset {self._dataset_name!r} has the "
                f"{len(category_ids)} classes {', '.join(map(str, sorted(category_ids)[:100]))}. Check the "
                "model's NUM_CLASSES, and that it was trained for this dataset."
            )
        return category_ids[class_index]

    def _class_names(self) -> list[str]:
        """Return the class names in the order of the category ids, as in `CocoScores`."""
        names = self._metadata.get("thing_classes")
        id_map = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if names is None or id_map is None:
            return self._ground_truth.class_names
        return [names[id_map[i]] for i in self._ground_truth.category_ids]

    def _warn_of_limit(self, predictions: list[dict]) -> None:
        most = max(len(prediction["instances"]) for prediction in predictions)
        if self._max_dets_per_image is None and most > self._DEFAULT_MAX_DETS:
            self._logger.warning(
                "There are up to %d detections per image, but only the best %d count. Pass "
                "max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE to the evaluator to count all.",
                most,
                self._DEFAULT_MAX_DETS,
            )

    def _write_json(self, name: str, content: Any) -> None:
        assert self._output_dir is not None, "callers check that there is a folder"
        path = os.path.join(self._output_dir, name)
        PathManager.mkdirs(self._output_dir)
        with PathManager.open(path, "w") as file:
            json.dump(content, file)
        self._logger.info("Wrote %s", path)


def _mode_of(proposals: list[Instances]) -> BoxMode:
    rotated = isinstance(proposals[0].proposal_boxes, RotatedBoxes)
    return BoxMode.XYWHA_ABS if rotated else BoxMode.XYXY_ABS


def _check_tasks(
    tasks: Sequence[str] | None, legal: Mapping[str, Any], evaluator: str
) -> tuple[str, ...] | None:
    if tasks is None:
        return None
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(
            f"{evaluator}: tasks must be a tuple of names such as ('bbox', 'segm'), not {tasks!r}."
        )
    unknown = [task for task in tasks if task not in legal]
    if unknown:
        raise ValueError(f"{evaluator}: unknown tasks {unknown}; legal tasks are {', '.join(legal)}.")
    return tuple(tasks)


def _tasks_of(results: list[dict]) -> set[str]:
    """Return the tasks that the results have fields for; "bbox" is always one of them."""
    tasks = {"bbox"}
    for result in results:
        if "segmentation" in result:
            tasks.add("segm")
        if "keypoints" in result:
            tasks.add("keypoints")
    return tasks


def _make_unique(names: Sequence[str]) -> list[str]:
    """Append a number to repeated names, because categories may share a name."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return unique


def _class_table(class_names: Sequence[str], per_class: dict[str, float]) -> str:
    """Return a table of the AP of each class, with up to three pairs of columns."""
    from tabulate import tabulate

    cells = list(itertools.chain(*zip(class_names, per_class.values())))
    columns = min(6, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return tabulate(
        rows, headers=["class", "AP"] * (columns // 2), tablefmt="pipe", floatfmt=".3f", numalign="left"
    )


def evaluate_box_proposals(
    predictions: list[dict], ground_truth: GroundTruth, limits: Sequence[int] = (100, 1000)
) -> dict[str, float]:
    """Compute the class-agnostic average recall over the IoU thresholds 0.5, 0.55, ..., 0.95.

    In each image, proposals and ground truth boxes are paired greedily, starting with the highest IoU.

    Args:
        predictions: dicts with "image_id" and "proposals", Instances with `proposal_boxes` and
            `objectness_logits`.
        ground_truth: the annotations; crowd boxes are ignored.
        limits: maximum numbers of proposals per image that count, highest scores first.

    Returns:
        "AR@100", "ARs@100", "ARm@100", "ARl@100" etc. for each limit, in percent. Nan if there is no ground
        truth box of that size.
    """
    by_image: dict[int, list[dict]] = {}
    for annotation in ground_truth.coco["annotations"]:
        if not annotation["iscrowd"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)

    overlaps: dict[str, list[np.ndarray]] = {f"AR{a}@{limit}": [] for limit in limits for a in _RECALL_AREAS}
    for prediction in predictions:
        annotations = by_image.get(ground_truth.image_numbers[prediction["image_id"]])
        if not annotations:
            continue
        areas = np.array([annotation["area"] for annotation in annotations])
        iou = _proposal_iou(prediction["proposals"], annotations)
        for limit in limits:
            for suffix, (low, high) in _RECALL_AREAS.items():
                columns = (areas >= low) & (areas <= high)
                overlaps[f"AR{suffix}@{limit}"].append(_pair_greedily(iou[:limit, columns]))
    return {key: _average_recall(values) for key, values in overlaps.items()}


def _proposal_iou(proposals: Instances, annotations: list[dict]) -> np.ndarray:
    """Return the IoU of the proposals, in descending score order, with the ground truth boxes."""
    order = proposals.objectness_logits.argsort(descending=True)
    boxes = proposals.proposal_boxes[order]
    if isinstance(boxes, RotatedBoxes) or are_rotated(annotations):
        if not isinstance(boxes, RotatedBoxes):
            boxes = RotatedBoxes(BoxMode.convert(boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS))
        return boxes.pairwise_iou(
            RotatedBoxes(torch.as_tensor(to_rotated([a["bbox"] for a in annotations])))
        ).numpy()
    xywh = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    gt_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
    return boxes.pairwise_iou(gt_boxes).numpy()


def _pair_greedily(iou: np.ndarray) -> np.ndarray:
    """Return the IoU of each ground truth box with its paired proposal, in arbitrary order."""
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
    return float(np.mean([(found >= threshold).mean() for threshold in _RECALL_THRESHOLDS]) * 100)
