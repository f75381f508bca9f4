"""Metrics of semantic segmentation: IoU, accuracy and Boundary IoU of every class."""

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

# Boundary IoU looks at the pixels this near to an outline, as a fraction of the image's diagonal.
_BOUNDARY_WIDTH = 0.02


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: Any = None) -> np.ndarray:
    """Reads an image as it is, say a PNG of labels: (H, W) or (H, W, C).

    Args:
        filename: path of the image.
        copy: whether the array must be writable.
        dtype: type of the values; the image's own by default.
    """
    with PathManager.open(filename, "rb") as file, Image.open(file) as image:
        return np.array(image, dtype=dtype) if copy else np.asarray(image, dtype=dtype)


class SemSegEvaluator(DatasetEvaluator):
    """Computes the metrics of semantic segmentation over a dataset with "sem_seg_file_name".

    The results, in percent, where a class's pixels are counted over all images and pixels with the ignored
    label are left out:

    * mIoU, IoU-{class}: intersection over union; fwIoU: its mean weighted by how frequent classes are.
    * mACC, ACC-{class}: the part of a class's true pixels that are found (its recall); pACC: of all pixels.
    * Precision-{class}: the part of the pixels said to be of a class that are.
    * BoundaryIoU-{class} (arXiv:2103.16562): IoU of what lies near the outlines, 2 % of the diagonal;
      min(IoU, B-Iou)-{class}: the smaller of the two.

    Means are over the classes that occur; a class without true pixels has nan.

    Args:
        dataset_name: a registered name or an address; its metadata has `stuff_classes` and `ignore_label`.
        distributed: gather the counts of all processes into the main one.
        output_dir: folder for `sem_seg_predictions.json`, see `encode_json_sem_seg`, and
        `sem_seg_evaluation.pth`.
        sem_seg_loading_fn: reads the label map of a path, (H, W) integers.
        num_classes: deprecated; must be the number of `stuff_classes`.
        ignore_label: deprecated; overrides the metadata's.

    Raises:
        ValueError: the dataset has no label maps or no `stuff_classes`, or `num_classes` is another number.
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
                self._logger.warning("SemSegEvaluator: %s is deprecated; the metadata tells it.", name)
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
        """Paths of the label maps by those of the images."""
        records = DatasetCatalog.get(self._dataset_name)
        files = {x["file_name"]: x["sem_seg_file_name"] for x in records if "sem_seg_file_name" in x}
        if not files:
            raise ValueError(f"SemSegEvaluator: dataset {self._dataset_name!r} has no 'sem_seg_file_name'.")
        return files

    def reset(self) -> None:
        """Forgets all counts."""
        size = self._num_classes + 1
        # Rows are predictions, columns the truth; the last of each stands for pixels that do not count.
        self._confusion = np.zeros((size, size), np.int64)
        self._boundary_confusion = np.zeros((size, size), np.int64)
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in one batch.

        Args:
            inputs: the model's input dicts, each with "file_name".
            outputs: the model's output dicts, with "sem_seg": (K, H, W) logits of the label map's size.
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
            # Predictions at pixels without a label must not count, wherever an outline runs.
            boundary_pred &= gt != self._num_classes
            none = self._num_classes
            self._boundary_confusion += self._count(
                np.where(boundary_pred, pred, none), np.where(boundary_gt, gt, none)
            )
            if self._output_dir:
                self._predictions.extend(self.encode_json_sem_seg(pred, name))

    def _load_labels(self, file_name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the truth of an image, (H, W) int64, with `num_classes` for pixels without a label."""
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
                f"SemSegEvaluator: the label map {path!r} holds {np.unique(labels[wrong]).tolist()}; there "
                f"are {self._num_classes} stuff_classes, and the ignored label is {self._ignore_label}."
            )
        labels[is_ignored] = self._num_classes
        return labels

    def _count(self, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
        size = self._num_classes + 1
        pairs = pred.astype(np.int64).ravel() * size + gt.ravel()
        return np.bincount(pairs, minlength=size * size).reshape(size, size)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Returns `{"sem_seg": {metric: percent}}`, see the class; in the main process only, else None."""
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
        """Converts a prediction to COCO's stuff format (https://cocodataset.org/#format-results).

        Args:
            sem_seg: (H, W) integer classes.
            input_file_name: the image's file.

        Returns:
            One dict for each class that occurs: "file_name", "category_id" (the dataset's own id, where the
            metadata has `stuff_dataset_id_to_contiguous_id`) and "segmentation" (compressed RLE).
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
    """Which pixels have one of another class, or the image's edge, in the square window around them.

    This is, for all classes at once, what an erosion takes off the class's mask.

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


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, true and predicted pixels of each class, (K,) each, in pixels that have a label."""
    return (
        confusion.diagonal()[:-1].astype(float),
        confusion[:, :-1].sum(axis=0, dtype=float),
        confusion[:-1].sum(axis=1, dtype=float),
    )


def _metrics(confusion: np.ndarray, boundary: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """See `SemSegEvaluator`; the matrices are (K + 1, K + 1)."""
    correct, true, predicted = _counts(confusion * (np.arange(len(confusion)) < len(names)))
    accuracy = _ratio(correct, true)
    precision = _ratio(correct, predicted)
    iou = np.where(true > 0, _ratio(correct, true + predicted - correct), np.nan)
    both, near_true, near_predicted = _counts(boundary)
    boundary_iou = _ratio(both, near_true + near_predicted - both)

    occurs = true > 0
    if occurs.any():
        frequency = true[occurs] / true.sum()
        means = (iou[occurs].mean(), (iou[occurs] * frequency).sum(), accuracy[occurs].mean())
        means = (*means, correct.sum() / true.sum())
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
