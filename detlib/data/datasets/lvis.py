"""Datasets in LVIS's format (https://www.lvisdataset.org/dataset): COCO's, with federated ground truth.

Each image was annotated for some of the categories only: those with annotations, and those in
`neg_category_ids`, which are known to be absent. Categories in `not_exhaustive_category_ids` may have objects
without annotation. Nothing is known about all other categories.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.builtin_meta import _get_builtin_metadata
from detlib.data.datasets.coco import read_categories, read_coco_json
from detlib.data.datasets.coco_reader import CocoReader
from detlib.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES as LVIS_V0_5_CATEGORIES
from detlib.data.datasets.lvis_v1_categories import LVIS_CATEGORIES as LVIS_V1_CATEGORIES
from detlib.data.datasets.lvis_v1_category_image_count import LVIS_CATEGORY_IMAGE_COUNT

__all__ = ["get_lvis_instances_meta", "load_lvis_json", "register_lvis_instances", "with_lvis_path"]

logger = logging.getLogger(__name__)


def register_lvis_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    *,
    empty_boxes: str = "error",
    overwrite: bool = False,
) -> None:
    """Register a dataset in LVIS's format for detection and instance segmentation.

    Args:
        name: the name to use in `cfg.DATASETS`.
        metadata: additional attributes for the metadata of the dataset, such as those of
            `get_lvis_instances_meta`; may be empty.
        json_file: path of the annotations.
        image_root: folder that the paths of images are relative to, see `load_lvis_json`.
        empty_boxes: see `load_coco_json`.
        overwrite: replace a dataset that is already registered under `name`.
    """
    for argument, value in (("name", name), ("json_file", json_file), ("image_root", image_root)):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"register_lvis_instances: {argument} must be a string or a path, not {value!r}.")
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)

    def load() -> list[dict]:
        return load_lvis_json(json_file, image_root, name, empty_boxes=empty_boxes)

    DatasetCatalog.register(name, load, overwrite=overwrite)
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="lvis", **metadata
    )


def get_lvis_instances_meta(dataset_name: str) -> dict[str, Any]:
    """Return the metadata of LVIS's own datasets.

    Args:
        dataset_name: contains "cocofied" for COCO's 80 classes, "v0.5" for the 1230 classes of LVIS v0.5, or
            "v1" for the 1203 classes of LVIS v1.

    Returns:
        `thing_classes`; for v1 also `class_image_count`, a list of {"id", "image_count"} over the training
        set; for COCO's classes also their ids and colors.

    Raises:
        ValueError: The name contains none of the three.
    """
    if "cocofied" in dataset_name:
        return _get_builtin_metadata("coco")
    if "v0.5" in dataset_name:
        return {"thing_classes": [category["name"] for category in LVIS_V0_5_CATEGORIES]}
    if "v1" in dataset_name:
        return {
            "thing_classes": [category["name"] for category in LVIS_V1_CATEGORIES],
            "class_image_count": LVIS_CATEGORY_IMAGE_COUNT,
        }
    raise ValueError(
        f"There are no built-in LVIS metadata for dataset {dataset_name!r}: its name contains none of 'v1', "
        "'v0.5' and 'cocofied'."
    )


def load_lvis_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    empty_boxes: str = "error",
) -> list[dict]:
    """Load annotations in LVIS's format as dicts in the standard format.

    The class index is the category id minus 1, or given by `thing_dataset_id_to_contiguous_id` in the
    metadata. The class names are those in the metadata of `dataset_name`. If it has none yet, they are LVIS's
    own if the name contains its version (see `get_lvis_instances_meta`) and the number of categories is the
    same, else those of the file.

    Args:
        json_file: path of the annotations.
        image_root: folder of the images. The path of an image in it is the last two parts of its `coco_url`,
            such as "train2017/000000000009.jpg", or without a URL its `file_name`.
        dataset_name: the dataset whose metadata are used and filled.
        extra_annotation_keys: keys of the annotations to keep in addition to the standard keys.
        empty_boxes: see `load_coco_json`.

    Returns:
        One dict for each image, sorted by image id, as `load_coco_json` returns them, with additional
        `neg_category_ids` and `not_exhaustive_category_ids`: lists of category ids as in the file.

    Raises:
        FileNotFoundError: The annotation file does not exist.
        ValueError: The file is not an annotation file, or has an error; the message names file, image and
            annotation.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    lvis = read_coco_json(json_file)
    names, id_map = read_categories(lvis["categories"], json_file)
    if dataset_name is None:
        id_map = {category_id: category_id - 1 for category_id in id_map}
    else:
        id_map = _class_indices(dataset_name, json_file, lvis["categories"], names, id_map)
    reader = _LvisReader(json_file, image_root, lvis, id_map, tuple(extra_annotation_keys or ()), empty_boxes)
    return reader.read()


def _class_indices(
    dataset_name: str, json_file: str, categories: list[dict], names: list[str], by_order: dict[int, int]
) -> dict[int, int]:
    """Complete the metadata of the dataset, and return the class index of each category id.

    Args:
        dataset_name: name of the dataset.
        json_file: its file, for errors.
        categories: the categories of the file.
        names: their names, sorted by id.
        by_order: the position of each id in that order.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None:
        metadata.set(**_metadata_for(dataset_name, categories, names, by_order))
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    if id_map is None:
        id_map = {category_id: category_id - 1 for category_id in by_order}
    num_classes = len(metadata.thing_classes)
    wrong = [i for i in by_order if not 0 <= id_map.get(i, -1) < num_classes]
    if wrong:
        raise ValueError(
            f"{json_file}: category ids {wrong[:10]} are not among the {num_classes} classes of dataset "
            f"{dataset_name!r}. Are the metadata and the file of the same version of LVIS?"
        )
    return {category_id: id_map[category_id] for category_id in by_order}


def _metadata_for(
    dataset_name: str, categories: list[dict], names: list[str], by_order: dict[int, int]
) -> dict[str, Any]:
    """Return metadata for a dataset that has none: LVIS's own, or those of the file."""
    if any(version in dataset_name for version in ("cocofied", "v0.5", "v1")):
        builtin = get_lvis_instances_meta(dataset_name)
        if len(builtin["thing_classes"]) == len(names):
            return builtin
    found: dict[str, Any] = {"thing_classes": names}
    if any(category_id != index + 1 for category_id, index in by_order.items()):
        found["thing_dataset_id_to_contiguous_id"] = by_order
    if all("image_count" in category for category in categories):
        counts = sorted(categories, key=lambda category: category["id"])
        found["class_image_count"] = [{key: c[key] for key in ("id", "image_count")} for c in counts]
    logger.info("Dataset %r uses the %d classes of its annotation file.", dataset_name, len(names))
    return found


def with_lvis_path(image: dict) -> dict:
    """Return an image entry with the `file_name` derived from its `coco_url`, see `load_lvis_json`."""
    url = image.get("coco_url")
    return {**image, "file_name": "/".join(url.split("/")[-2:])} if isinstance(url, str) and url else image


class _LvisReader(CocoReader):
    """Reads the paths of images and the categories that they were annotated for, too."""

    def _image(self, image: dict) -> dict:
        record = super()._image(with_lvis_path(image))
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            record[key] = image.get(key) or []
        return record
