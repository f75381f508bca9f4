"""Metrics of semantic segmentation: IoU, accuracy and Boundary IoU of each class."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.image_io import read_label_map
from detlib.evaluation.evaluator import DatasetEvaluator
from detlib.ops import encode_rle
from detlib.utils import comm
from detlib.utils.file_io import PathManager
from detlib.utils.logger import create_small_table

__all__ = ["SemSegEvaluator", "load_image_into_numpy_array"]

# Maximum distance to an outline of the pixels in Boundary IoU, as a fraction of the image diagonal.
_BOUNDARY_WIDTH = 0.02


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: Any = None) -> np.ndarray:
    """Read an image file, such as a label PNG, as an (H, W) or (H, W, C) array without conversion.

    Args:
        filename: path of the image.
        copy: whether the array must be writable.
        dtype: dtype of the array; by default that of the image.
    """
    with PathManager.open(filename, "rb") as file, Image.open(file) as image:
        return np.array(image, dtype=dtype) if copy else np.asarray(image, dtype=dtype)


class SemSegEvaluator(DatasetEvaluator):
    """Evaluator of semantic segmentation on a dataset with "sem_seg_file_name".

    The metrics, in percent, count the pixels of each class over all images, without those of the ignored
    label:

    * mIoU, IoU-{class}: intersection over union. fwIoU: its mean weighted by class frequency.
    * mACC, ACC-{class}: accuracy, the fraction of the pixels of a class that are predicted correctly (its
      recall). pACC: the same for all pixels.
    * Precision-{class}: the fraction of the pixels predicted as a class that are correct.
    * BoundaryIoU-{class} (arXiv:2103.16562): IoU of the pixels near outlines, within 2 % of the image
      diagonal. min(IoU, B-Iou)-{class}: the minimum of IoU and Boundary IoU.

    Means are over the classes that occur in the ground truth; the metrics of other classes are nan.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = read_label_map,
        num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered name or a dataset URI. Its metadata has `stuff_classes` and optionally
                `ignore_label`, 255 by default.
            distributed: gather the counts of all processes in the main process.
            output_dir: folder for `sem_seg_predictions.json`, see `encode_json_sem_seg`, and
                `sem_seg_evaluation.pth`.
            sem_seg_loading_fn: function that reads a label map, (H, W) integers, from a path.
            num_classes: deprecated; must equal the number of `stuff_classes`.
            ignore_label: deprecated; overrides the metadata's.

        Raises:
            ValueError: the dataset has no `stuff_classes`, or `num_classes` differs from their number.
        """
        self._logger = logging.getLogger(__name__)
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._load = sem_seg_loading_fn
        self._class_names = list(metadata.get("stuff_classes") or ())
        if not self._class_names:
            raise ValueError(
                f"SemSegEvaluator: the metadata of dataset {dataset_name!r} has no stuff_classes."
            )
        self._num_classes = len(self._class_names)
        for name, value in (("num_classes", num_classes), ("ignore_label", ignore_label)):
            if value is not None:
                self._logger.warning("SemSegEvaluator: %s is deprecated; it is read from the metadata.", name)
        if num_classes not in (None, self._num_classes):
            raise ValueError(
                f"SemSegEvaluator: num_classes is {num_classes}, but dataset {dataset_name!r} has "
                f"{self._num_classes} stuff_classes."
            )
        self._ignore_label = metadata.get("ignore_label", 255) if ignore_label is None else ignore_label
        id_map = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {contiguous: dataset_id for dataset_id, contiguous in id_map.items()}
        self.reset()

    @functools.cached_property
    def _gt_files(self) -> dict[str, str]:
        """Paths of the label maps, by image path."""
        records = DatasetCatalog.get(self._dataset_name)
        files = {x["file_name"]: x["sem_seg_file_name"] for x in records if "sem_seg_file_name" in x}
        if not files:
            raise ValueError(f"SemSegEvaluator: dataset {self._dataset_name!r} has no 'sem_seg_file_name'.")
        return files

    def reset(self) -> None:
        """Discard all counts."""
        size = self._num_classes + 1
        # Rows are predictions, columns are ground truth. The last row and column are for ignored pixels.
        self._confusion = np.zeros((size, size), np.int64)
        self._boundary_confusion = np.zeros((size, size), np.int64)
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Evaluate one batch and collect the counts.

        Args:
            inputs: the model's input dicts, each with "file_name".
            outputs: the model's output dicts, with "sem_seg", (K, H, W) logits in the size of the label map.

        Raises:
            ValueError: an output lacks "sem_seg", or the image has no valid label map of its size.
        """
        for image, output in zip(inputs, outputs):
            if "sem_seg" not in output:
                raise ValueError(
                    f"SemSegEvaluator: the model's outputs have no 'sem_seg', only {sorted(output)}."
                )
            name = image["file_name"]
            pred = output["sem_seg"].argmax(dim=0).cpu().numpy()
            gt = self._load_labels(name, pred.shape)
            self._confusion += self._count(pred, gt)
            boundary_pred, boundary_gt = _near_outlines(pred), _near_outlines(gt)
            # Predictions at unlabeled pixels must not count, even if they are near an outline.
            boundary_pred &= gt != self._num_classes
            none = self._num_classes
            self._boundary_confusion += self._count(
                np.where(boundary_pred, pred, none), np.where(boundary_gt, gt, none)
            )
            if self._output_dir:
                self._predictions.extend(self.encode_json_sem_seg(pred, name))

    def _load_labels(self, file_name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the label map of an image, (H, W) int64, with `num_classes` for unlabeled pixels."""
        if file_name not in self._gt_files:
            raise ValueError(
                f"SemSegEvaluator: dataset {self._dataset_name!r} has no label map for the image "
                f"{file_name!r}."
            )
        path = self._gt_files[file_name]
        labels = np.array(self._load(path), dtype=np.int64)
        if labels.shape != shape:
            raise ValueError(
                f"SemSegEvaluator: the label map {path!r} has the size {labels.shape}, the prediction "
                f"{shape}."
            )
        is_ignored = labels == self._ignore_label
        wrong = ~is_ignored & ((labels < 0) | (labels >= self._num_classes))
        if wrong.any():
            raise ValueError(
                f"SemSegEvaluator: the label map {path!r} has labels {np.unique(labels[wrong]).tolist()}, "
                f"but there are {self._num_classes} stuff_classes, and ignore_label is {self._ignore_label}."
            )
        labels[is_ignored] = self._num_classes
        return labels

    def _count(self, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
        size = self._num_classes + 1
        pairs = pred.astype(np.int64).ravel() * size + gt.ravel()
        return np.bincount(pairs, minlength=size * size).reshape(size, size)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Compute the metrics of all collected counts and write the output files.

        Returns:
            `{"sem_seg": {metric: percent}}`, see the class, or None in processes other than the main one.
        """
        if self._distributed:
            comm.synchronize()
            gathered = comm.all_gather((self._confusion, self._boundary_confusion, self._predictions))
            if not comm.is_main_process():
                return None
            confusion, boundary = (sum(x[k] for x in gathered) for k in (0, 1))
            predictions = [prediction for x in gathered for prediction in x[2]]
        else:
            confusion, boundary = self._confusion, self._boundary_confusion
            predictions = self._predictions
        results = _metrics(confusion, boundary, self._class_names)
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_predictions.json"), "w") as file:
                json.dump(predictions, file)
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_evaluation.pth"), "wb") as file:
                torch.save(results, file)
        means = {key: results[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")}
        self._logger.info("Semantic segmentation:\n%s", create_small_table(means))
        self._logger.info("Per class:\n%s", _class_table(self._class_names, results))
        return OrderedDict(sem_seg=results)

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict]:
        """Convert a prediction to COCO's stuff format (https://cocodataset.org/#format-results).

        Args:
            sem_seg: (H, W) integer classes.
            input_file_name: path of the image.

        Returns:
            One dict for each class that occurs, with "file_name", "category_id" (the dataset's id if the
            metadata has `stuff_dataset_id_to_contiguous_id`) and "segmentation" (compressed RLE).

        Raises:
            ValueError: a class is not in `stuff_dataset_id_to_contiguous_id`.
        """
        labels = np.unique(sem_seg).tolist()
        unknown = [label for label in labels if self._dataset_ids and label not in self._dataset_ids]
        if unknown:
            raise ValueError(
                f"SemSegEvaluator: the classes {unknown} are not in stuff_dataset_id_to_contiguous_id of "
                f"dataset {self._dataset_name!r}."
            )
        masks = torch.from_numpy(np.stack([sem_seg == label for label in labels]))
        return [
            {
                "file_name": input_file_name,
                "category_id": self._dataset_ids.get(label, label),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
            for label, rle in zip(labels, encode_rle(masks))
        ]


def _near_outlines(labels: np.ndarray) -> np.ndarray:
    """Return which pixels have another class, or the image border, in the square window around them.

    These are the pixels that erosion removes from the mask of their class, computed for all classes together.

    Args:
        labels: (H, W) integers, 0 to 65534.

    Returns:
        (H, W) bool.
    """
    import cv2

    reach = max(1, round(_BOUNDARY_WIDTH * float(np.hypot(*labels.shape))))
    window = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    framed = np.pad(labels.astype(np.uint16), 1, constant_values=np.iinfo(np.uint16).max)
    return (cv2.erode(framed, window) != cv2.dilate(framed, window))[1:-1, 1:-1]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def _counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of correct, ground truth and predicted labeled pixels of each class, (K,) each."""
    return (
        confusion.diagonal()[:-1].astype(float),
        confusion[:, :-1].sum(axis=0, dtype=float),
        confusion[:-1].sum(axis=1, dtype=float),
    )


def _metrics(confusion: np.ndarray, boundary: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return the metrics listed in `SemSegEvaluator` from confusion matrices of shape (K + 1, K + 1)."""
    correct, num_gt, predicted = _counts(confusion * (np.arange(len(confusion)) < len(names)))
    accuracy = _ratio(correct, num_gt)
    precision = _ratio(correct, predicted)
    iou = np.where(num_gt > 0, _ratio(correct, num_gt + predicted - correct), np.nan)
    both, near_gt, near_predicted = _counts(boundary)
    boundary_iou = _ratio(both, near_gt + near_predicted - both)

    occurs = num_gt > 0
    if occurs.any():
        frequency = num_gt[occurs] / num_gt.sum()
        means = (iou[occurs].mean(), (iou[occurs] * frequency).sum(), accuracy[occurs].mean())
        means = (*means, correct.sum() / num_gt.sum())
    else:
        means = (np.nan,) * 4
    results = {"mIoU": means[0], "fwIoU": means[1]}
    for name, value, near_value in zip(names, iou, boundary_iou):
        results[f"IoU-{name}"] = value
        results[f"BoundaryIoU-{name}"] = near_value
        results[f"min(IoU, B-Iou)-{name}"] = min(value, near_value)
    results |= {"mACC": means[2], "pACC": means[3]}
    results |= {f"ACC-{name}": value for name, value in zip(names, accuracy)}
    results |= {f"Precision-{name}": value for name, value in zip(names, precision)}
    return {key: 100 * float(value) for key, value in results.items()}


def _class_table(names: Sequence[str], results: dict[str, float]) -> str:
    from tabulate import tabulate

    columns = ("IoU", "BoundaryIoU", "ACC", "Precision")
    rows = [[name, *(results[f"{column}-{name}"] for column in columns)] for name in names]
    return tabulate(rows, headers=["class", *columns], tablefmt="pipe", floatfmt=".3f", numalign="left")
