"""Panoptic quality of predictions, and output files in COCO's panoptic format."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detlib.data.datasets.coco import read_coco_json
from detlib.evaluation.evaluator import DatasetEvaluator
from detlib.evaluation.panoptic_quality import PanopticStats, Segments
from detlib.structures.panoptic import id_to_rgb, rgb_to_id
from detlib.utils import comm
from detlib.utils.file_io import PathManager

__all__ = ["COCOPanopticEvaluator"]


@dataclass(frozen=True)
class _GroundTruth:
    """The ground truth in COCO's panoptic format.

    Attributes:
        coco: "categories" (with "id", "name" and "isthing") and "images".
        annotations: maps an image id to the segments ("id", "category_id" of the dataset, "iscrowd") and the
            path of the PNG with the segment ids.
    """

    coco: dict[str, Any]
    annotations: dict[Any, tuple[list[dict], str]]


class _CategoryIds:
    """Mapping from the contiguous category ids of models to the dataset's ids of things and stuff.

    If the metadata has no such mapping, things are numbered from 1 and stuff after them.
    """

    def __init__(self, metadata: Metadata) -> None:
        num_things = len(metadata.get("thing_classes") or ())
        self._maps = {}
        for isthing, kind, start in ((True, "thing", 1), (False, "stuff", num_things + 1)):
            ids = metadata.get(f"{kind}_dataset_id_to_contiguous_id")
            if ids is None:
                count = len(metadata.get(f"{kind}_classes") or ())
                ids = {start + i: i for i in range(count)}
            self._maps[isthing] = {contiguous: dataset_id for dataset_id, contiguous in ids.items()}

    def to_dataset(self, category: int, isthing: bool, where: str) -> int:
        ids = self._maps[bool(isthing)]
        if category not in ids:
            raise ValueError(
                f"{where}: a segment has the category_id {category}; the dataset has {len(ids)} "
                f"{'thing' if isthing else 'stuff'} classes ({min(ids, default=None)} to "
                f"{max(ids, default=None)})."
            )
        return ids[category]

    def categories(self, metadata: Metadata) -> list[dict]:
        """Return the categories in COCO's format."""
        return [
            {"id": dataset_id, "name": metadata.get(f"{kind}_classes")[contiguous], "isthing": int(isthing)}
            for isthing, kind in ((True, "thing"), (False, "stuff"))
            for contiguous, dataset_id in self._maps[isthing].items()
        ]


class COCOPanopticEvaluator(DatasetEvaluator):
    """Evaluator with the panoptic quality (arXiv:1801.00868) PQ and its factors SQ and RQ, in percent.

    PQ is the mean over all categories that occur, PQ_th over things and PQ_st over stuff; the same applies to
    SQ and RQ. Each batch is evaluated immediately, so no segment ids are kept in memory.

    The ground truth is read from `panoptic_json` and `panoptic_root` of the dataset's metadata. If these are
    missing, it is read from "pan_seg_file_name" and "segments_info" of the dataset's dicts (with contiguous
    ids, see `load_coco_panoptic_json`).
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a registered name or a dataset URI.
            output_dir: folder for `predictions.json` and `predictions/*.png`, in COCO's panoptic format.

        Raises:
            FileNotFoundError: `panoptic_json` or `panoptic_root` does not exist.
        """
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._metadata = MetadataCatalog.get(dataset_name)
        for key, exists in (("panoptic_json", PathManager.isfile), ("panoptic_root", PathManager.isdir)):
            path = self._metadata.get(key)
            if path and not exists(path):
                raise FileNotFoundError(
                    f"COCOPanopticEvaluator: {key} of dataset {dataset_name!r}, {path!r}, does not exist."
                )
        self._ids = _CategoryIds(self._metadata)
        self.reset()

    @functools.cached_property
    def _gt(self) -> _GroundTruth:
        if self._metadata.get("panoptic_json"):
            return _read_gt(self._metadata.panoptic_json, self._metadata.panoptic_root)
        return _convert_gt(self._dataset_name, self._metadata, self._ids)

    @functools.cached_property
    def _indices(self) -> dict[int, int]:
        """Index of each category in the sums, by the dataset's id."""
        return {category["id"]: i for i, category in enumerate(self._gt.coco["categories"])}

    def reset(self) -> None:
        """Discard all collected results."""
        self._stats: PanopticStats | None = None
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Evaluate one batch and collect the counts.

        Args:
            inputs: the model's input dicts, each with "image_id" and "file_name".
            outputs: the model's output dicts. "panoptic_seg" is a tuple of (H, W) segment ids and a list with
                a dict ("id", "category_id", "isthing") for each segment. The list may be None if each id is
                category * `label_divisor` of the metadata + number, and -1 for no segment.

        Raises:
            ValueError: an output lacks "panoptic_seg" or is inconsistent, or the image is not in the dataset.
        """
        for image, output in zip(inputs, outputs):
            if "panoptic_seg" not in output:
                raise ValueError(
                    "COCOPanopticEvaluator: the model's outputs have no 'panoptic_seg', only "
                    f"{sorted(output)}."
                )
            ids, segments = output["panoptic_seg"]
            ids = ids.cpu().numpy()
            where = f"the prediction for {image['file_name']!r}"
            if segments is None:
                ids, segments = self._segments_from_ids(ids)
            # Without "isthing", "category_id" already is the dataset's id.
            categories = [
                self._ids.to_dataset(x["category_id"], x["isthing"], where)
                if x.get("isthing") is not None
                else x["category_id"]
                for x in segments
            ]
            pred = Segments(
                ids,
                [x["id"] for x in segments],
                [self._index(category, where) for category in categories],
                where=where,
            )
            if self._stats is None:
                self._stats = PanopticStats(len(self._indices))
            self._stats.add_image(self._gt_segments(image["image_id"], where), pred)
            annotation = {"image_id": image["image_id"], "file_name": _png_name(image["file_name"])}
            if self._output_dir:
                annotation["segments_info"] = [
                    {"id": int(x["id"]), "category_id": category} for x, category in zip(segments, categories)
                ]
                self._write_png(annotation["file_name"], ids)
            self._predictions.append(annotation)

    def _segments_from_ids(self, ids: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        divisor = self._metadata.label_divisor
        found = [label for label in np.unique(ids).tolist() if label != -1]
        things = set((self._metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
        segments = [
            {"id": label + 1, "category_id": label // divisor, "isthing": label // divisor in things}
            for label in found
        ]
        return ids + 1, segments

    def _index(self, category: int, where: str) -> int:
        if category not in self._indices:
            raise ValueError(
                f"{where}: a segment has the category {category}, which the ground truth does not list."
            )
        return self._indices[category]

    def _gt_segments(self, image_id: Any, where: str) -> Segments:
        if image_id not in self._gt.annotations:
            raise ValueError(
                f"{where}: the ground truth of dataset {self._dataset_name!r} has no image "
                f"with id {image_id!r}."
            )
        segments, path = self._gt.annotations[image_id]
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            ids = rgb_to_id(np.asarray(image.convert("RGB")))
        where = f"the ground truth {path!r}"
        return Segments(
            ids,
            [x["id"] for x in segments],
            [self._index(x["category_id"], where) for x in segments],
            [bool(x.get("iscrowd", 0)) for x in segments],
            where,
        )

    def _write_png(self, name: str, ids: np.ndarray) -> None:
        folder = os.path.join(cast(str, self._output_dir), "predictions")
        PathManager.mkdirs(folder)
        with PathManager.open(os.path.join(folder, name), "wb") as file:
            Image.fromarray(id_to_rgb(ids)).save(file, format="PNG")

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Compute the metrics of all collected results and write the output files.

        Returns:
            `{"panoptic_seg": {metric: percent}}`, see the class; None in processes other than the main one.
        """
        comm.synchronize()
        gathered = comm.all_gather((self._stats, self._predictions))
        if not comm.is_main_process():
            return None
        stats = PanopticStats(len(self._indices))
        for part, _ in gathered:
            stats = stats if part is None else stats + part
        predictions = [x for _, part in gathered for x in part]
        missing = self._gt.annotations.keys() - {x["image_id"] for x in predictions}
        if missing:
            self._logger.warning(
                "%d of %d images of %s have no prediction; all their segments count as missed.",
                len(missing),
                len(self._gt.annotations),
                self._dataset_name,
            )
        for image_id in missing:
            segments = self._gt.annotations[image_id][0]
            indices = [self._indices[x["category_id"]] for x in segments]
            stats.miss(indices, [bool(x.get("iscrowd", 0)) for x in segments])
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "predictions.json"), "w") as file:
                json.dump(self._gt.coco | {"annotations": predictions}, file)
        return OrderedDict(panoptic_seg=self._results(stats))

    def _results(self, stats: PanopticStats) -> dict[str, float]:
        """Return the means over categories, in percent; log them and the quality of each category."""
        from tabulate import tabulate

        categories = self._gt.coco["categories"]
        values = np.stack(stats.quality()) * 100
        isthing = np.array([bool(category["isthing"]) for category in categories])
        occurs = ~np.isnan(values[0])
        results: dict[str, float] = {}
        rows: list[list] = []
        for title, suffix, chosen in (
            ("All", "", occurs),
            ("Things", "_th", occurs & isthing),
            ("Stuff", "_st", occurs & ~isthing),
        ):
            means = values[:, chosen].mean(axis=1).tolist() if chosen.any() else [float("nan")] * 3
            results |= {f"{name}{suffix}": mean for name, mean in zip(("PQ", "SQ", "RQ"), means)}
            rows.append([title, *means, int(chosen.sum())])
        headers = ["PQ", "SQ", "RQ"]
        style = {"tablefmt": "pipe", "floatfmt": ".3f", "numalign": "center"}
        table = tabulate(rows, headers=["", *headers, "#categories"], **style)
        self._logger.info("Panoptic quality:\n%s", table)
        rows = [[category["name"], *column] for category, column in zip(categories, values.T.tolist())]
        self._logger.info("Per category:\n%s", tabulate(rows, headers=["category", *headers], **style))
        return results


def _png_name(file_name: str) -> str:
    return os.path.splitext(os.path.basename(file_name))[0] + ".png"


def _read_gt(json_file: str, folder: str) -> _GroundTruth:
    coco = read_coco_json(json_file)
    annotations = {
        x["image_id"]: (x["segments_info"], os.path.join(folder, x["file_name"]))
        for x in coco.get("annotations") or ()
    }
    return _GroundTruth({**coco, "annotations": []}, annotations)


def _convert_gt(dataset_name: str, metadata: Metadata, ids: _CategoryIds) -> _GroundTruth:
    """Return the ground truth from the dicts of a registered dataset."""
    annotations, images = {}, []
    for record in DatasetCatalog.get(dataset_name):
        if "pan_seg_file_name" not in record or "segments_info" not in record:
            raise ValueError(
                f"COCOPanopticEvaluator: the metadata of dataset {dataset_name!r} has no panoptic_json, and "
                "its dicts lack 'pan_seg_file_name' or 'segments_info'."
            )
        where = f"segments_info of {record['file_name']!r}"
        segments = [
            {**x, "category_id": ids.to_dataset(x["category_id"], x["isthing"], where)}
            for x in record["segments_info"]
        ]
        annotations[record["image_id"]] = (segments, record["pan_seg_file_name"])
        image = {"id": record["image_id"], "file_name": os.path.basename(record["file_name"])}
        images.append(image | {key: record[key] for key in ("height", "width") if key in record})
    return _GroundTruth({"images": images, "categories": ids.categories(metadata)}, annotations)
