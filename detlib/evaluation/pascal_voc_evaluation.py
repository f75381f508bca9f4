"""The Pascal VOC metric for boxes (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf).

Shape legend: N detections and G ground truth boxes of a class, K classes, T IoU thresholds.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.evaluation.evaluator import DatasetEvaluator
from detlib.structures import BoxMode
from detlib.utils import comm
from detlib.utils.logger import create_small_table

__all__ = ["PascalVOCDetectionEvaluator", "voc_average_precision"]

_THRESHOLDS = np.arange(50, 100, 5)


@dataclass(frozen=True)
class _Objects:
    """The ground truth objects of one class in one image.

    Attributes:
        boxes: (G, 4) float64 XYXY.
        difficult: (G,) bool.
    """

    boxes: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class _Ranking:
    """All detections of one class in descending score order.

    Attributes:
        overlap: (N,) highest IoU with an object; 0 if there are no objects in the image.
        object_index: (N,) index of that object over all images.
        difficult: (N,) whether that object is difficult.
        num_objects: number of objects to be found, without difficult ones.
    """

    overlap: np.ndarray
    object_index: np.ndarray
    difficult: np.ndarray
    num_objects: int


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """Evaluator of boxes with the average precision defined by Pascal VOC.

    "AP50" and "AP75" are means over classes at the IoU thresholds 0.5 and 0.75, "AP" the mean over 0.5, 0.55,
    ..., 0.95, all in percent. For the year 2007, average precision is the mean precision at the recalls 0,
    0.1, ..., 1; otherwise it is the area under the precision-recall curve. Difficult objects ("difficult" or
    "iscrowd" in the annotation) need not be found, and detections of them do not count. The AP of a class
    without other objects in the dataset is nan, and the class is left out of the means.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered name or a dataset URI. Its metadata has `thing_classes`, and `year` =
                2007 for the metric of that year. The ground truth is taken from the registered dataset; no
                other files are read.
        """
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        metadata = MetadataCatalog.get(dataset_name)
        self._class_names = list(metadata.thing_classes)
        self._is_2007 = int(metadata.get("year") or 0) == 2007
        self.reset()

    @functools.cached_property
    def _gt(self) -> dict[str, dict[int, _Objects]]:
        """The objects by image id, in the order of the dataset, and by class."""
        return {
            str(record["image_id"]): _by_class(record) for record in DatasetCatalog.get(self._dataset_name)
        }

    def reset(self) -> None:
        """Discard all detections."""
        # Image id, classes (N,), scores (N,), boxes (N, 4).
        self._predictions: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the detections of one batch.

        Args:
            inputs: the model's input dicts, each with "image_id".
            outputs: the model's output dicts, with "instances" that have `pred_boxes`, `scores` and
                `pred_classes`.

        Raises:
            ValueError: the dataset does not have a predicted class.
        """
        for image, output in zip(inputs, outputs):
            instances = output["instances"]
            boxes = instances.pred_boxes.tensor.detach().cpu().numpy().astype(np.float64)
            scores = instances.scores.detach().cpu().numpy().astype(np.float64)
            classes = instances.pred_classes.cpu().numpy()
            wrong = classes[(classes < 0) | (classes >= len(self._class_names))]
            if len(wrong):
                raise ValueError(
                    f"The model predicted class {wrong[0]}, but dataset {self._dataset_name!r} has "
                    f"{len(self._class_names)} classes. Check the model's NUM_CLASSES."
                )
            self._predictions.append((str(image["image_id"]), classes, scores, boxes))

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Compute the metrics of all collected detections.

        Returns:
            `{"bbox": {"AP", "AP50", "AP75", "AP-<class>"}}` in percent, or None in processes other than the
            main one.

        Raises:
            ValueError: an image of the detections is not in the dataset.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        positions = {image_id: i for i, image_id in enumerate(self._gt)}
        predictions = list(itertools.chain(*gathered))
        unknown = [image_id for image_id, *_ in predictions if image_id not in positions]
        if unknown:
            raise ValueError(
                f"There are detections for image {unknown[0]!r}, which is not in dataset "
                f"{self._dataset_name!r}."
            )
        # Equal scores are ranked in the dataset's order, independent of the order of processing.
        predictions.sort(key=lambda prediction: positions[prediction[0]])
        table = np.full((len(self._class_names), len(_THRESHOLDS)), np.nan)
        for index in range(len(self._class_names)):
            ranking = self._rank(index, predictions)
            if ranking.num_objects:
                table[index] = [
                    100 * voc_average_precision(*_curve(ranking, t / 100), self._is_2007) for t in _THRESHOLDS
                ]
        return OrderedDict(bbox=self._results(table))

    def _rank(self, index: int, predictions: list[tuple]) -> _Ranking:
        """Rank the detections of a class and find the object that each overlaps most."""
        # Index of the first object of each image.
        starts, number, to_find = {}, 0, 0
        for image_id, classes in self._gt.items():
            if index in classes:
                starts[image_id] = number
                number += len(classes[index].boxes)
                to_find += int((~classes[index].difficult).sum())
        scores, overlaps, objects, difficult = [], [], [], []
        for image_id, classes, image_scores, boxes in predictions:
            mine = classes == index
            if not mine.any():
                continue
            scores.append(image_scores[mine])
            gt = self._gt[image_id].get(index)
            if gt is None:
                overlaps.append(np.zeros(mine.sum()))
                objects.append(np.full(mine.sum(), -1))
                difficult.append(np.zeros(mine.sum(), bool))
                continue
            iou = _iou(boxes[mine], gt.boxes)
            best = iou.argmax(axis=1)
            overlaps.append(iou.max(axis=1))
            objects.append(best + starts[image_id])
            difficult.append(gt.difficult[best])
        if not scores:
            return _Ranking(np.zeros(0), np.zeros(0, int), np.zeros(0, bool), to_find)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        overlaps, objects, difficult = (np.concatenate(x)[order] for x in (overlaps, objects, difficult))
        return _Ranking(overlaps, objects, difficult, to_find)

    def _results(self, table: np.ndarray) -> dict[str, float]:
        """Return the metrics from the (K, T) average precisions; log the means and a table of the classes."""
        from tabulate import tabulate

        occurs = ~np.isnan(table[:, 0])
        means = table[occurs].mean(axis=0) if occurs.any() else np.full(len(_THRESHOLDS), np.nan)
        results = {
            "AP": float(means.mean()),
            "AP50": float(means[_THRESHOLDS == 50][0]),
            "AP75": float(means[_THRESHOLDS == 75][0]),
        }
        which = "2007" if self._is_2007 else "2012"
        self._logger.info("Pascal VOC %s metric:\n%s", which, create_small_table(results))
        columns = [table.mean(axis=1), table[:, _THRESHOLDS == 50][:, 0], table[:, _THRESHOLDS == 75][:, 0]]
        rows = [[name, *values] for name, *values in zip(self._class_names, *columns)]
        headers = ["class", "AP", "AP50", "AP75"]
        self._logger.info(
            "Per class:\n%s",
            tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left"),
        )
        return results | {f"AP-{name}": float(ap) for name, ap in zip(self._class_names, columns[0])}


def _by_class(record: dict[str, Any]) -> dict[int, _Objects]:
    groups: dict[int, list[dict]] = {}
    for annotation in record.get("annotations", ()):
        groups.setdefault(annotation["category_id"], []).append(annotation)
    return {
        index: _Objects(
            np.array([BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in group], float),
            np.array([bool(x.get("difficult", 0) or x.get("iscrowd", 0)) for x in group]),
        )
        for index, group in groups.items()
    }


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of (N, 4) and (G, 4) XYXY boxes, (N, G) float64.

    VOC counts pixels, including the last one. With the continuous coordinates here, this is the area.
    """
    corners = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[:, 2:]),
    )
    intersection = np.prod(np.clip(corners[1] - corners[0], 0, None), axis=2)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (boxes, others)]
    union = areas[0][:, None] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _curve(ranking: _Ranking, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision after each detection, without detections of difficult objects."""
    hits = ranking.overlap > threshold
    counts = ~(hits & ranking.difficult)
    found = np.zeros(len(hits), bool)
    candidates = np.flatnonzero(hits & counts)
    # An object is found once; further detections of it are false positives.
    first = np.unique(ranking.object_index[candidates], return_index=True)[1]
    found[candidates[first]] = True
    correct = np.cumsum(found[counts])
    return correct / ranking.num_objects, correct / np.arange(1, len(correct) + 1)


def voc_average_precision(recall: np.ndarray, precision: np.ndarray, use_07_metric: bool = False) -> float:
    """Return the average precision of a precision-recall curve.

    Args:
        recall: (N,) recall of the best 1, 2, ... detections, in ascending order.
        precision: (N,) precision of the best 1, 2, ... detections.
        use_07_metric: average the maximum precision at a recall of at least 0, 0.1, ..., 1. Otherwise compute
            the area under the curve after making it monotonically decreasing.
    """
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # at this recall or a higher one
    if use_07_metric:
        # Multiples of 0.1 with their floating-point errors, as in the original VOC evaluation code.
        return float(best[np.searchsorted(recall, np.arange(11) * 0.1)].mean())
    return float((np.diff(recall, prepend=0.0) * best[:-1]).sum())
