"""The metric of Pascal VOC for boxes (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf).

N detections of a class, G ground truth boxes of it.
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
class _Truth:
    """The objects of one class in one image: boxes (G, 4) float64 XYXY; which are difficult, (G,) bool."""

    boxes: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class _Ranking:
    """All detections of one class, the best first.

    Attributes:
        overlap: (N,) IoU with the object that each overlaps most; 0 where its image has none.
        object_index: (N,) which object that is, counted over all images.
        difficult: (N,) whether that object is difficult.
        num_objects: how many objects are to be found, without the difficult ones.
    """

    overlap: np.ndarray
    object_index: np.ndarray
    difficult: np.ndarray
    num_objects: int


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """Computes average precision of boxes as Pascal VOC defines it.

    "AP50" and "AP75" are the means over classes at an IoU above 0.5 and 0.75, "AP" the mean over 0.5, 0.55,
    ..., 0.95, all in percent. For the year 2007 the precision is averaged at the recalls 0, 0.1, ..., 1;
    otherwise it is the area under the curve. Difficult objects (whose annotation has "difficult" or
    "iscrowd") need not be found, and detections of them do not count. A class that has no other objects in
    the dataset has nan and is left out of the means.

    Args:
        dataset_name: a registered name or an address; its metadata has `thing_classes`, and `year` if the
            metric of 2007 is wanted. Nothing is read from files but the dataset itself.
    """

    def __init__(self, dataset_name: str) -> None:
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        metadata = MetadataCatalog.get(dataset_name)
        self._class_names = list(metadata.thing_classes)
        self._is_2007 = int(metadata.get("year") or 0) == 2007
        self.reset()

    @functools.cached_property
    def _truth(self) -> dict[str, dict[int, _Truth]]:
        """The objects by image, in the dataset's order, and by class."""
        return {
            str(record["image_id"]): _by_class(record) for record in DatasetCatalog.get(self._dataset_name)
        }

    def reset(self) -> None:
        """Forgets all detections."""
        # Image id, classes (N,), scores (N,), boxes (N, 4).
        self._predictions: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in one batch.

        Args:
            inputs: the model's input dicts, each with "image_id".
            outputs: the model's output dicts, with "instances" that have `pred_boxes`, `scores` and
                `pred_classes`.
        """
        for image, output in zip(inputs, outputs):
            instances = output["instances"]
            boxes = instances.pred_boxes.tensor.detach().cpu().numpy().astype(np.float64)
            scores = instances.scores.detach().cpu().numpy().astype(np.float64)
            classes = instances.pred_classes.cpu().numpy()
            wrong = classes[(classes < 0) | (classes >= len(self._class_names))]
            if len(wrong):
                raise ValueError(
                    f"The model has predicted class {wrong[0]}, but dataset {self._dataset_name!r} has "
                    f"{len(self._class_names)} classes. Is NUM_CLASSES of the model right?"
                )
            self._predictions.append((str(image["image_id"]), classes, scores, boxes))

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Returns `{"bbox": {"AP", "AP50", "AP75", "AP-<class>"}}`, in the main process only, else None."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        places = {image_id: i for i, image_id in enumerate(self._truth)}
        predictions = list(itertools.chain(*gathered))
        unknown = [image_id for image_id, *_ in predictions if image_id not in places]
        if unknown:
            raise ValueError(
                f"There are detections of {unknown[0]!r}, which is no image of dataset "
                f"{self._dataset_name!r}."
            )
        # Equal scores are ranked by the dataset's order, whatever order the images came in.
        predictions.sort(key=lambda prediction: places[prediction[0]])
        table = np.full((len(self._class_names), len(_THRESHOLDS)), np.nan)
        for index in range(len(self._class_names)):
            ranking = self._rank(index, predictions)
            if ranking.num_objects:
                table[index] = [
                    100 * voc_average_precision(*_curve(ranking, t / 100), self._is_2007) for t in _THRESHOLDS
                ]
        return OrderedDict(bbox=self._results(table))

    def _rank(self, index: int, predictions: list[tuple]) -> _Ranking:
        """Ranks the detections of a class and finds the object that each overlaps most."""
        # Numbers of the objects of each image begin here.
        starts, number, to_find = {}, 0, 0
        for image_id, classes in self._truth.items():
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
            truth = self._truth[image_id].get(index)
            if truth is None:
                overlaps.append(np.zeros(mine.sum()))
                objects.append(np.full(mine.sum(), -1))
                difficult.append(np.zeros(mine.sum(), bool))
                continue
            iou = _iou(boxes[mine], truth.boxes)
            best = iou.argmax(axis=1)
            overlaps.append(iou.max(axis=1))
            objects.append(best + starts[image_id])
            difficult.append(truth.difficult[best])
        if not scores:
            return _Ranking(np.zeros(0), np.zeros(0, int), np.zeros(0, bool), to_find)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        overlaps, objects, difficult = (np.concatenate(x)[order] for x in (overlaps, objects, difficult))
        return _Ranking(overlaps, objects, difficult, to_find)

    def _results(self, table: np.ndarray) -> dict[str, float]:
        """Means over classes of (K, T) average precisions; logs them, and the table of classes."""
        from tabulate import tabulate

        occurs = ~np.isnan(table[:, 0])
        means = table[occurs].mean(axis=0) if occurs.any() else np.full(len(_THRESHOLDS), np.nan)
        results = {
            "AP": float(means.mean()),
            "AP50": float(means[_THRESHOLDS == 50][0]),
            "AP75": float(means[_THRESHOLDS == 75][0]),
        }
        which = "2007" if self._is_2007 else "2012"
        self._logger.info("Pascal VOC's metric of %s:\n%s", which, create_small_table(results))
        columns = [table.mean(axis=1), table[:, _THRESHOLDS == 50][:, 0], table[:, _THRESHOLDS == 75][:, 0]]
        rows = [[name, *values] for name, *values in zip(self._class_names, *columns)]
        headers = ["class", "AP", "AP50", "AP75"]
        self._logger.info(
            "Per class:\n%s",
            tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left"),
        )
        return results | {f"AP-{name}": float(ap) for name, ap in zip(self._class_names, columns[0])}


def _by_class(record: dict[str, Any]) -> dict[int, _Truth]:
    groups: dict[int, list[dict]] = {}
    for annotation in record.get("annotations", ()):
        groups.setdefault(annotation["category_id"], []).append(annotation)
    return {
        index: _Truth(
            np.array([BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in group], float),
            np.array([bool(x.get("difficult", 0) or x.get("iscrowd", 0)) for x in group]),
        )
        for index, group in groups.items()
    }


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of (N, 4) and (G, 4) XYXY boxes: (N, G) float64.

    VOC counts pixels, with the last one included; in coordinates that run from edge to edge this is the area.
    """
    corners = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[:, 2:]),
    )
    shared = np.prod(np.clip(corners[1] - corners[0], 0, None), axis=2)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (boxes, others)]
    whole = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def _curve(ranking: _Ranking, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection; those of difficult objects are left out."""
    hits = ranking.overlap > threshold
    counts = ~(hits & ranking.difficult)
    found = np.zeros(len(hits), bool)
    candidates = np.flatnonzero(hits & counts)
    # An object is found once; further detections of it are wrong.
    first = np.unique(ranking.object_index[candidates], return_index=True)[1]
    found[candidates[first]] = True
    right = np.cumsum(found[counts])
    return right / ranking.num_objects, right / np.arange(1, len(right) + 1)


def voc_average_precision(recall: np.ndarray, precision: np.ndarray, use_07_metric: bool = False) -> float:
    """Computes average precision of a curve.

    Args:
        recall: (N,) rising, of the best 1, 2, ... detections.
        precision: (N,) likewise.
        use_07_metric: average the best precision at a recall of 0, 0.1, ..., 1 or more; else take the area
            below the curve, made falling.
    """
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # at this recall or a higher one
    if use_07_metric:
        # Multiples of 0.1 as they come out in floating point, by which VOC's own figures were computed.
        return float(best[np.searchsorted(recall, np.arange(11) * 0.1)].mean())
    return float((np.diff(recall, prepend=0.0) * best[:-1]).sum())
