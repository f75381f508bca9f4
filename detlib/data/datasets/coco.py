"""Data sets in COCO's instance format (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

from .coco_writer import convert_to_coco_dict, convert_to_coco_json
from .sem_seg import load_sem_seg

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_json",
    "load_sem_seg",
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
    with open(path, encoding="utf-8") as file:
        try:
            coco = json.load(file)
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
    Annotations whose polygons all have fewer than three points are left out, with a warning.

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
    coco = read_coco_json(json_file)
    id_map = None
    if dataset_name is not None:
        thing_classes, id_map = read_categories(coco["categories"], json_file)
        MetadataCatalog.get(dataset_name).set(
            thing_classes=thing_classes, thing_dataset_id_to_contiguous_id=id_map
        )
        _log_mapping(json_file, thing_classes, id_map)
    reader = _Reader(json_file, image_root, coco, id_map, tuple(extra_annotation_keys or ()), empty_boxes)
    return reader.read()


def read_categories(categories: list[dict], json_file: str) -> tuple[list[str], dict[int, int]]:
    """Returns the category names in the order of their ids, and the map from id to index in that list."""
    for category in categories:
        if "id" not in category or "name" not in category:
            raise ValueError(f"{json_file}: category {category!r} has no 'id' or no 'name'.")
    categories = sorted(categories, key=lambda category: category["id"])
    id_map = {category["id"]: i for i, category in enumerate(categories)}
    if len(id_map) < len(categories):
        twice = next(i for i, n in Counter(category["id"] for category in categories).items() if n > 1)
        names = [category["name"] for category in categories if category["id"] == twice]
        raise ValueError(f"{json_file}: category id {twice} is given to {len(names)} categories: {names}.")
    return [category["name"] for category in categories], id_map


def _log_mapping(json_file: str, thing_classes: list[str], id_map: dict[int, int]) -> None:
    if all(category_id == index for category_id, index in id_map.items()):
        logger.info("%s: %d classes, with ids from 0.", json_file, len(thing_classes))
        return
    pairs = [f"{i} -> {index} {thing_classes[index]}" for i, index in id_map.items()]
    shown = ", ".join(pairs[:20]) + (", ..." if len(pairs) > 20 else "")
    logger.info("%s: category ids become class indices: %s", json_file, shown)


class _Reader:
    """Turns the content of one annotation file into standard dicts. Knows the file's name for its errors."""

    KEPT_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")

    def __init__(
        self,
        json_file: str,
        image_root: str,
        coco: dict,
        id_map: dict[int, int] | None,
        extra_keys: tuple[str, ...],
        empty_boxes: str,
    ) -> None:
        self.json_file = json_file
        self.image_root = image_root
        self.coco = coco
        self.id_map = id_map
        self.category_ids = {category.get("id") for category in coco["categories"]}
        self.keys = (*self.KEPT_KEYS, *extra_keys)
        self.empty_boxes = empty_boxes
        self.dropped: Counter[str] = Counter()

    def read(self) -> list[dict]:
        """Returns the standard dicts, sorted by image id."""
        records = {}
        for image in self.coco["images"]:
            record = self._image(image)
            if record["image_id"] in records:
                raise ValueError(f"{self.json_file}: two images have the id {record['image_id']!r}.")
            records[record["image_id"]] = record

        seen_ids = set()
        for annotation in self.coco.get("annotations") or ():
            record = records.get(annotation.get("image_id"))
            if record is None:
                self.dropped["annotations of images that the file does not list"] += 1
                continue
            annotation_id = annotation.get("id")
            if annotation_id is not None and annotation_id in seen_ids:
                raise self._error(record, annotation, "has the same id as another annotation")
            seen_ids.add(annotation_id)
            read = self._annotation(record, annotation)
            if read is not None:
                record["annotations"].append(read)

        for what, count in self.dropped.items():
            logger.warning("%s: left out %d %s.", self.json_file, count, what)
        logger.info("Loaded %d images in COCO format from %s", len(records), self.json_file)
        return [records[i] for i in sorted(records)]

    def _image(self, image: dict) -> dict:
        missing = [key for key in ("id", "file_name", "height", "width") if image.get(key) is None]
        if missing:
            raise ValueError(
                f"{self.json_file}: image {image.get('file_name', image.get('id'))!r} has no "
                f"{' and no '.join(map(repr, missing))}."
            )
        if not (image["height"] > 0 and image["width"] > 0):
            raise ValueError(
                f"{self.json_file}: image {image['file_name']!r} has width {image['width']!r} and height "
                f"{image['height']!r}; both must be above 0."
            )
        return {
            "file_name": os.path.join(self.image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }

    def _annotation(self, record: dict, annotation: dict) -> dict | None:
        """Returns the annotation in the standard format, or None if it is left out."""
        read = {key: annotation[key] for key in self.keys if key in annotation}
        read.setdefault("iscrowd", 0)
        category_id = annotation.get("category_id")
        if category_id not in self.category_ids:
            legal = sorted(self.category_ids)
            raise self._error(
                record,
                annotation,
                f"has category id {category_id!r}, which is not in the file's list of {len(legal)} "
                f"categories (ids {legal[0]} to {legal[-1]})",
            )
        if self.id_map is not None:
            read["category_id"] = self.id_map[category_id]
        if not self._box_is_good(record, annotation):
            self.dropped["annotations whose box has no area"] += 1
            return None
        read["bbox_mode"] = BoxMode.XYWH_ABS if len(read["bbox"]) == 4 else BoxMode.XYWHA_ABS
        if annotation.get("segmentation"):
            read["segmentation"] = self._segmentation(record, annotation)
            if not read["segmentation"]:
                self.dropped["annotations without any polygon of three points or more"] += 1
                return None
        if "keypoints" in read:
            read["keypoints"] = _keypoints_from_pixel_indices(read["keypoints"])
            if len(read["keypoints"]) % 3:
                raise self._error(
                    record, annotation, "has keypoints that are not triples of x, y, visibility"
                )
        return read

    def _box_is_good(self, record: dict, annotation: dict) -> bool:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) not in (4, 5):
            raise self._error(
                record,
                annotation,
                f"has the bbox {box!r}; it must be [x, y, width, height], or [center x, center y, width, "
                "height, angle in degrees] for a rotated box",
            )
        if box[2] > 0 and box[3] > 0:
            return True
        if self.empty_boxes == "error":
            raise self._error(
                record,
                annotation,
                f"has a box of no area, by its width and height: {box}. Mend it, or let such annotations be "
                "left out with empty_boxes='drop' (in an address: ?empty_boxes=drop)",
            )
        return False

    def _segmentation(self, record: dict, annotation: dict) -> list | dict:
        """Returns the polygons that have three points at least, or the RLE mask in its compressed form."""
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            if not isinstance(segmentation.get("counts"), list):
                return segmentation
            from pycocotools import mask as mask_utils

            return mask_utils.frPyObjects(segmentation, *segmentation["size"])
        if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
            raise self._error(
                record, annotation, "has a segmentation that is neither polygons nor an RLE mask"
            )
        return [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]

    def _error(self, record: dict, annotation: dict, what: str) -> ValueError:
        return ValueError(
            f"{self.json_file}: annotation {annotation.get('id')!r} of image {record['file_name']!r} "
            f"(id {record['image_id']!r}) {what}."
        )


def _keypoints_from_pixel_indices(keypoints: list[float]) -> list[float]:
    """Moves x and y of a flat list of (x, y, visibility) to the pixels' centres."""
    return [value if i % 3 == 2 else value + 0.5 for i, value in enumerate(keypoints)]
