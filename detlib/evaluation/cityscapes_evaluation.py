"""The Cityscapes metrics (https://www.cityscapes-dataset.com/benchmarks) of instances and label maps.

The results are the same as those of the package cityscapesscripts, which is not required.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections import OrderedDict
from typing import Any, cast

import numpy as np
import torch

from detlib.data.catalog import MetadataCatalog
from detlib.data.datasets.cityscapes import read_png
from detlib.data.datasets.cityscapes_labels import CITYSCAPES_LABELS
from detlib.evaluation.cityscapes_instance_ap import InstanceMatches, instance_average_precision
from detlib.evaluation.evaluator import DatasetEvaluator
from detlib.structures import ROIMasks
from detlib.utils import comm
from detlib.utils.file_io import PathManager
from detlib.utils.logger import create_small_table

__all__ = ["CityscapesEvaluator", "CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]

_LABELS = {label.id: label for label in CITYSCAPES_LABELS if label.id >= 0}
_COUNTED = [label for label in _LABELS.values() if not label.ignored]
_THINGS = [label for label in _COUNTED if label.has_instances]
_NUM_IDS = max(_LABELS) + 1

# Mean number of pixels per object in the training set, so that objects of any size weigh equally in iIoU.
_MEAN_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


class CityscapesEvaluator(DatasetEvaluator):
    """Base class of the Cityscapes evaluators, which finds the ground truth files."""

    _gt_suffix = ""

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered name. Its metadata has `gt_dir`, the folder with the annotations by
                city.

        Raises:
            FileNotFoundError: `gt_dir` does not exist.
        """
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._gt_dir = self._metadata.gt_dir
        if not PathManager.isdir(self._gt_dir):
            raise FileNotFoundError(
                f"{type(self).__name__}: gt_dir of dataset {dataset_name!r}, {self._gt_dir!r}, does not "
                "exist."
            )
        self.reset()

    @functools.cached_property
    def _gt_files(self) -> dict[str, str]:
        """Paths of the ground truth PNGs, by the CITY_SEQUENCE_FRAME that all file names begin with."""
        found = {}
        for city in sorted(PathManager.ls(self._gt_dir)):
            folder = os.path.join(self._gt_dir, city)
            for name in PathManager.ls(folder) if PathManager.isdir(folder) else ():
                if name.endswith(self._gt_suffix):
                    found[name.removesuffix(self._gt_suffix)] = os.path.join(folder, name)
        if not found:
            raise FileNotFoundError(
                f"{type(self).__name__}: there is no CITY/*{self._gt_suffix} in {self._gt_dir!r}."
            )
        return found

    def reset(self) -> None:
        """Discard all collected results."""
        self._images: dict[str, Any] = {}

    def _name(self, image: dict) -> str:
        name = os.path.basename(image["file_name"]).removesuffix(".png").removesuffix("_leftImg8bit")
        if name not in self._gt_files:
            raise ValueError(
                f"{type(self).__name__}: dataset {self._dataset_name!r} has no ground truth for the image "
                f"{image['file_name']!r} in {self._gt_dir!r}."
            )
        return name

    def _gather(self) -> list[Any] | None:
        """Return the results of all images, sorted by name; None in processes other than the main one.

        Images without a prediction count as images without detections.
        """
        comm.synchronize()
        gathered = comm.gather(self._images, dst=0)
        if not comm.is_main_process():
            return None
        images = dict(itertools.chain(*(part.items() for part in gathered)))
        missing = [name for name in self._gt_files if name not in images]
        if missing:
            self._logger.warning(
                "%d of %d images of %s have no prediction; all their objects count as missed.",
                len(missing),
                len(self._gt_files),
                self._dataset_name,
            )
        for name in missing:
            images[name] = self._compare(name, None)
        return [images[name] for name in sorted(images)]

    def _compare(self, name: str, prediction: Any) -> Any:
        """Return the counts needed for the metrics of an image; `prediction` is None if there is none."""
        raise NotImplementedError


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """Evaluator of instance masks with the average precision defined by Cityscapes.

    "AP" is the mean over classes and the IoU thresholds 0.5, 0.55, ..., 0.95, "AP50" the mean over classes at
    the threshold 0.5, in percent. `thing_classes` of the metadata must be names of Cityscapes labels.
    Classes without instances are not evaluated.
    """

    _gt_suffix = "_gtFine_instanceIds.png"

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Evaluate one batch and collect the counts.

        Args:
            inputs: the model's input dicts, each with "file_name".
            outputs: the model's output dicts, with "instances" that have `pred_masks` (N, H, W), `scores` and
                `pred_classes`.
        """
        for image, output in zip(inputs, outputs):
            name = self._name(image)
            self._images[name] = self._compare(name, output["instances"])

    @functools.cached_property
    def _label_ids(self) -> np.ndarray:
        """Label id of each class; 0 if the class is not evaluated."""
        ids = {label.name: label.id for label in _THINGS}
        return np.array([ids.get(name, 0) for name in self._metadata.thing_classes])

    def _compare(self, name: str, prediction: Any) -> InstanceMatches:
        path = self._gt_files[name]
        ids, indices = np.unique(read_png(path).astype(np.int64), return_inverse=True)
        indices = indices.reshape(-1)
        sizes = np.bincount(indices, minlength=len(ids))
        labels = np.where(ids < 1000, ids, ids // 1000)
        legal = [i in _LABELS for i in labels.tolist()]
        if not all(legal):
            raise ValueError(f"{path}: the ids {ids[~np.array(legal)].tolist()} have no Cityscapes label.")
        overlaps, scores, pred_labels = np.zeros((0, len(ids)), np.int64), np.zeros(0), np.zeros(0, np.int64)
        if prediction is not None and len(prediction):
            masks = _as_arrays(prediction)
            if masks.shape[1] != len(indices):
                raise ValueError(
                    f"{type(self).__name__}: the masks of {name!r} have {masks.shape[1]} pixels, but the "
                    f"ground truth {path!r} has {len(indices)}."
                )
            overlaps = np.stack([np.bincount(indices[mask], minlength=len(ids)) for mask in masks])
            scores = prediction.scores.detach().cpu().numpy().astype(np.float64)
            pred_labels = self._label_ids[prediction.pred_classes.cpu().numpy()]
        # As in cityscapesscripts, of an ignored label (caravan, trailer) groups are void, objects are not.
        void = np.array([i < 1000 and _LABELS[i].ignored for i in ids.tolist()])
        kept = np.isin(labels, [label.id for label in _THINGS])
        return InstanceMatches(
            labels=labels[kept],
            is_group=ids[kept] < 1000,
            sizes=sizes[kept],
            pred_labels=pred_labels,
            scores=scores,
            pred_sizes=overlaps.sum(axis=1),
            void_sizes=overlaps[:, void].sum(axis=1),
            overlaps=overlaps[:, kept],
        )

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Compute the metrics of all collected results.

        Returns:
            `{"segm": {"AP", "AP50", "AP-<class>"}}` in percent, or None in processes other than the main one.
        """
        images = self._gather()
        if images is None:
            return None
        table = 100 * instance_average_precision(images, [label.id for label in _THINGS])
        occurs = ~np.isnan(table[:, 0])
        means = table[occurs].mean(axis=0) if occurs.any() else np.full(table.shape[1], np.nan)
        results = {"AP": float(means.mean()), "AP50": float(means[0])}
        self._logger.info("Cityscapes instance metrics:\n%s", create_small_table(results))
        per_class = {f"AP-{x.name}": float(ap) for x, ap in zip(_THINGS, table.mean(axis=1))}
        self._logger.info("Per class:\n%s", create_small_table(per_class))
        return OrderedDict(segm=results | per_class)


def _as_arrays(instances: Any) -> np.ndarray:
    """Return the masks as (N, H * W) bool."""
    masks = instances.pred_masks
    if isinstance(masks, ROIMasks):
        masks = masks.to_bitmasks(instances.pred_boxes, *instances.image_size)
    masks = cast(torch.Tensor, getattr(masks, "tensor", masks)).detach()
    masks = masks if masks.dtype == torch.bool else masks.to(torch.uint8) != 0
    return masks.flatten(1).cpu().numpy()


class CityscapesSemSegEvaluator(CityscapesEvaluator):
    """Evaluator of semantic segmentation with the IoU metrics defined by Cityscapes, in percent.

    "IoU" is the mean over the 19 classes, "IoU_sup" the mean over their categories. "iIoU" and "iIoU_sup"
    weight the pixels of each object so that all objects of a class count equally. They only cover classes
    with instances.
    """

    _gt_suffix = "_gtFine_labelIds.png"

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Evaluate one batch and collect the counts.

        Args:
            inputs: the model's input dicts, each with "file_name".
            outputs: the model's output dicts, with "sem_seg", (19, H, W) logits by train id.
        """
        for image, output in zip(inputs, outputs):
            if "sem_seg" not in output:
                raise ValueError(
                    f"{type(self).__name__}: the model's outputs have no 'sem_seg', only {sorted(output)}."
                )
            name = self._name(image)
            self._images[name] = self._compare(name, output["sem_seg"].argmax(dim=0).cpu().numpy())

    @functools.cached_property
    def _label_ids(self) -> np.ndarray:
        ids = np.zeros(256, np.int64)  # by train id; 0 is "unlabeled"
        for label in _COUNTED:
            ids[label.train_id] = label.id
        return ids

    def _compare(self, name: str, prediction: Any) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
        """Return the confusion matrix of label ids (ground truth, prediction) and a tuple for each object.

        The tuple has the object's label id, its number of pixels, and the numbers of its pixels whose
        predicted class, and predicted category, is right.
        """
        path = self._gt_files[name]
        gt = read_png(path).astype(np.int64)
        if gt.size and gt.max() >= _NUM_IDS:
            raise ValueError(f"{path}: the id {gt.max()} has no Cityscapes label.")
        if prediction is None:
            pred = np.zeros_like(gt)
        elif prediction.shape != gt.shape:
            raise ValueError(
                f"{type(self).__name__}: the ground truth {path!r} has the size {gt.shape}, the "
                f"prediction {prediction.shape}."
            )
        else:
            pred = self._label_ids[prediction]
        confusion = np.bincount((gt * _NUM_IDS + pred).ravel(), minlength=_NUM_IDS**2)
        instance_file = path.replace("_labelIds.png", "_instanceIds.png")
        objects = _objects(read_png(instance_file).astype(np.int64), pred)
        return confusion.reshape(_NUM_IDS, _NUM_IDS), objects

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Compute the metrics of all collected results.

        Returns:
            `{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup", "IoU-<class>"}}` in percent, or None in
            processes other than the main one.
        """
        images = self._gather()
        if images is None:
            return None
        confusion = sum(image[0] for image in images)
        objects = [entry for image in images for entry in image[1]]
        classes = {label.name: [label] for label in _COUNTED}
        categories: dict[str, list] = {}
        for label in _COUNTED:
            categories.setdefault(label.category, []).append(label)
        iou = {name: _iou(confusion, labels) for name, labels in classes.items()}
        iou_sup = {name: _iou(confusion, labels) for name, labels in categories.items()}
        things = {name: x for name, x in classes.items() if x[0].has_instances}
        thing_categories = {name: x for name, x in categories.items() if x[0].has_instances}
        weighted = {name: _weighted_iou(confusion, x, objects, 2) for name, x in things.items()}
        weighted_sup = {name: _weighted_iou(confusion, x, objects, 3) for name, x in thing_categories.items()}
        results = {
            "IoU": _mean(iou),
            "iIoU": _mean(weighted),
            "IoU_sup": _mean(iou_sup),
            "iIoU_sup": _mean(weighted_sup),
        }
        self._logger.info("Cityscapes semantic segmentation metrics:\n%s", create_small_table(results))
        per_class = {f"IoU-{name}": 100 * value for name, value in iou.items()}
        self._logger.info("Per class:\n%s", create_small_table(per_class))
        return OrderedDict(sem_seg=results | per_class)


def _objects(instance_ids: np.ndarray, pred: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return the tuples described in `_compare`, for objects of evaluated classes."""
    categories = {
        category: [label.id for label in labels]
        for category, labels in itertools.groupby(_THINGS, key=lambda label: label.category)
    }
    found = []
    for instance_id in np.unique(instance_ids[instance_ids > 1000]).tolist():
        label = _LABELS.get(instance_id // 1000)
        if label is None or label.ignored or label.name not in _MEAN_SIZES:
            continue
        pixels = pred[instance_ids == instance_id]
        of_category = np.isin(pixels, categories[label.category])
        found.append((label.id, pixels.size, int((pixels == label.id).sum()), int(of_category.sum())))
    return found


def _wrong(confusion: np.ndarray, ids: list[int]) -> int:
    """Return the number of pixels predicted as `ids` whose ground truth is another evaluated label."""
    others = [label.id for label in _COUNTED if label.id not in ids]
    return int(confusion[np.ix_(others, ids)].sum())


def _iou(confusion: np.ndarray, labels: list) -> float:
    """Return the IoU of labels that are merged into one."""
    ids = [label.id for label in labels]
    correct, num_gt = int(confusion[np.ix_(ids, ids)].sum()), int(confusion[ids].sum())
    union = num_gt + _wrong(confusion, ids)
    return correct / union if union else math.nan


def _weighted_iou(confusion: np.ndarray, labels: list, objects: list[tuple], field: int) -> float:
    """Return the IoU of labels that are merged into one, with weighted objects.

    The weight of an object's pixels is the mean size of its class divided by its own size. `field` is the
    index, in the tuples of `objects`, of the number of correct pixels.
    """
    ids = {label.id: _MEAN_SIZES[label.name] for label in labels}
    mine = [(entry, ids[entry[0]] / entry[1]) for entry in objects if entry[0] in ids]
    correct = math.fsum(entry[field] * weight for entry, weight in mine)
    missed = math.fsum((entry[1] - entry[field]) * weight for entry, weight in mine)
    union = correct + missed + _wrong(confusion, list(ids))
    return correct / union if union else math.nan


def _mean(values: dict[str, float]) -> float:
    valid = [value for value in values.values() if not math.isnan(value)]
    return 100 * sum(valid) / len(valid) if valid else math.nan
