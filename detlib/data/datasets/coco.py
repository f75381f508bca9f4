"""Data sets in COCO's instance format (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.utils.file_io import PathManager

from .coco_reader import CocoReader
from .coco_writer import convert_to_coco_dict, convert_to_coco_json
from .sem_seg import load_sem_seg

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_content",
    "load_coco_json",
    "load_sem_seg",
    "read_categories",
    "read_coco_json",
    "register_coco_instances",
]

logger = logging.getLogger(__name__)


def register_coco_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    *,
    empty_boxes: str = "error",
    overwrite: bool = False,
) -> None:
    """Registers a data set in COCO's instance format for detection, instance segmentation or keypoints.

    Args:
        name: the name, as it will stand in `cfg.DATASETS`.
        metadata: more attributes for the data set's metadata; may be empty.
        json_file: path of the annotations.
        image_root: folder that the file names in the annotations are relative to.
        empty_boxes: see `load_coco_json`.
        overwrite: replace what `name` stands for already.
    """
    for argument, value in (("name", name), ("json_file", json_file), ("image_root", image_root)):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"register_coco_instances: {argument} must be a string or a path, not {value!r}.")
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)

    def load() -> list[dict]:
        return load_coco_json(json_file, image_root, name, empty_boxes=empty_boxes)

    DatasetCatalog.register(name, load, overwrite=overwrite)
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def read_coco_json(json_file: str) -> dict:
    """Reads an annotation file and checks that it has the parts of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or lacks images or categories.
    """
    path = PathManager.get_local_path(json_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Annotation file {json_file!r} does not exist.")
    with open(path, "rb") as file:
        try:
            coco = json.loads(file.read())  # of bytes it takes UTF-16 and marks of byte order, too
        except ValueError as error:
            raise ValueError(f"Annotation file {json_file!r} is not valid JSON: {error}") from error
    if not isinstance(coco, dict):
        raise ValueError(
            f"Annotation file {json_file!r} must hold a JSON object with 'images', 'annotations' and "
            f"'categories', not a {type(coco).__name__}."
        )
    for part in ("images", "categories"):
        if not coco.get(part):
            raise ValueError(
                f"Annotation file {json_file!r} has no {part}: the list {part!r} is empty or missing."
            )
    for part in ("images", "categories", "annotations"):
        entries = coco.get(part) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"Annotation file {json_file!r}: {part!r} must be a list of JSON objects.")
    return coco


def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    empty_boxes: str = "error",
) -> list[dict]:
    """Loads annotations in COCO's instance format as dicts in the standard format.

    With `dataset_name`, the categories become `thing_classes` in the order of their ids and the annotations'
    `category_id` is the index into them; the mapping stands in the metadata, as
    `thing_dataset_id_to_contiguous_id`, and in the log. Without, ids stay as they are in the file.

    Boxes stay (x, y, width, height) in pixels; those of five numbers are rotated ones, (center x, center y,
    width, height, angle) with the angle in degrees counter-clockwise, and have the mode XYWHA_ABS. Keypoints
    are moved by half a pixel: COCO counts whole pixels from 0, detlib measures from the picture's corner.
    Polygons of fewer than three points or of no extent are left out, and with a warning the annotations that
    have no other.

    Args:
        json_file: path of the annotations. `annotations` itself may be missing (test sets), and so may
            `iscrowd`, `area`, `id` and `info`.
        image_root: folder that the file names in the annotations are relative to.
        dataset_name: the data set whose metadata is filled.
        extra_annotation_keys: keys of the annotations that are to be kept beside the standard ones.
        empty_boxes: what to do about a box without an area: "error", or "drop" for leaving out the annotation
            with a warning. COCO's own training set has two of them.

    Returns:
        One dict for each image, sorted by image id.

    Raises:
        FileNotFoundError: there is no such annotation file.
        ValueError: the file is no annotation file or has an error; the message names file, image and
            annotation.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    return load_coco_content(
        read_coco_json(json_file),
        json_file,
        image_root,
        dataset_name,
        extra_annotation_keys,
        empty_boxes=empty_boxes,
    )


def load_coco_content(
    coco: dict,
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    empty_boxes: str = "error",
) -> list[dict]:
    """`load_coco_json` for content that was read before; `json_file` is for the messages."""
    id_map = None
    if dataset_name is not None:
        thing_classes, id_map = read_categories(coco["categories"], json_file)
        MetadataCatalog.get(dataset_name).set(
            thing_classes=thing_classes, thing_dataset_id_to_contiguous_id=id_map
        )
        _log_mapping(json_file, thing_classes, id_map)
    reader = CocoReader(json_file, image_root, coco, id_map, tuple(extra_annotation_keys or ()), empty_boxes)
    return reader.read()


def read_categories(categories: list[dict], json_file: str) -> tuple[list[str], dict[int, int]]:
    """Returns the category names in the order of their ids, and the map from id to index in that list."""
    for category in categories:
        if "id" not in category or "name" not in category:
            raise ValueError(f"{json_file}: category {category!r} has no 'id' or no 'name'.")
        if type(category["id"]) is not int or not isinstance(category["name"], str):
            raise ValueError(
                f"{json_file}: category {category!r} must have a whole number as 'id' and a string as 'name'."
            )
    categories = sorted(categories, key=lambda category: category["id"])
    id_map = {category["id"]: i for i, category in enumerate(categories)}
    if len(id_map) < len(categories):
        twice = next(i for i, n in Counter(category["id"] for category in categories).items() if n > 1)
        names = [category["name"] for category in categories if category["id"] == twice]
        raise ValueError(f"{json_file}: category id {twice} is given to {len(names)} categories: {names}.")
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        logger.warning("%s: several categories have one name: %s; they stay apart", json_file, twice)
    return names, id_map


def _log_mapping(json_file: str, thing_classes: list[str], id_map: dict[int, int]) -> None:
    if all(category_id == index for category_id, index in id_map.items()):
        logger.info("%s: %d classes, with ids from 0.", json_file, len(thing_classes))
        return
    pairs = [f"{i} -> {index} {thing_classes[index]}" for i, index in id_map.items()]
    shown = ", ".join(pairs[:20]) + (", ..." if len(pairs) > 20 else "")
    logger.info("%s: category ids become class indices: %s", json_file, shown)
