"""Conversion of a COCO annotation file to dicts in the standard format. The first fault is an error."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any, cast

from detlib.data.datasets.file_values import (
    MAX_COORDINATE,
    MAX_SIDE,
    are_coordinates,
    is_id,
    is_path,
    is_side,
)
from detlib.data.datasets.image_paths import ImageFinder
from detlib.structures import BoxMode
from detlib.structures.rle import rle_runs
from detlib.utils.file_io import PathManager

__all__ = ["CocoReader"]

logger = logging.getLogger(__name__)

_COORDINATES = f"finite numbers up to {MAX_COORDINATE}"


class CocoReader:
    """Converts the content of one annotation file to dicts in the standard format."""

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
        """Prepare the conversion.

        Args:
            json_file: path of the file, for messages.
            image_root: folder that file names are relative to.
            coco: content of the file.
            id_map: class index of each category id; None to keep the ids.
            extra_keys: keys of the annotations to keep in addition to the standard keys.
            empty_boxes: "error" or "drop", see `load_coco_json`.
        """
        self.json_file = json_file
        self.image_root = image_root
        self.coco = coco
        self.id_map = id_map
        self.category_ids = {_key(category.get("id")) for category in coco["categories"]}
        self.num_keypoints = {
            _key(category.get("id")): len(category["keypoints"])
            for category in coco["categories"]
            if isinstance(category.get("keypoints"), list)
        }
        self.keys = (*self.KEPT_KEYS, *extra_keys)
        self.empty_boxes = empty_boxes
        self.dropped: Counter[str] = Counter()
        self.finder = ImageFinder(image_root)
        self._search = False  # for images whose paths do not exist as they are written

    def read(self) -> list[dict]:
        """Return the dicts, sorted by image id."""
        records = {}
        first = next((image.get("file_name") for image in self.coco["images"]), None)
        self._search = isinstance(first, str) and not PathManager.isfile(os.path.join(self.image_root, first))
        for image in self.coco["images"]:
            record = self._image(image)
            if record["image_id"] in records:
                raise ValueError(f"{self.json_file}: two images have the id {record['image_id']!r}.")
            records[record["image_id"]] = record

        seen_ids = set()
        for annotation in self.coco.get("annotations") or ():
            record = records.get(_key(annotation.get("image_id")))
            if record is None:
                self.dropped["annotations of images that the file does not list"] += 1
                continue
            annotation_id = _key(annotation.get("id"))
            if annotation_id is not None and annotation_id in seen_ids:
                raise self._error(record, annotation, "has the same id as another annotation")
            seen_ids.add(annotation_id)
            read = self._annotation(record, annotation)
            if read is not None:
                record["annotations"].append(read)

        self._check_ids(records)
        for what, count in self.dropped.items():
            logger.warning("%s: left out %d %s.", self.json_file, count, what)
        logger.info("Loaded %d images in COCO format from %s", len(records), self.json_file)
        return [records[i] for i in sorted(records)]

    def _check_ids(self, records: dict) -> None:
        types = {type(image_id).__name__ for image_id in records}
        if len(types) > 1 or not types <= {"int", "str"}:
            raise ValueError(
                f"{self.json_file}: image ids must be all integers or all strings; there are "
                f"{' and '.join(sorted(types))}."
            )

    def _image(self, image: dict) -> dict:
        missing = [key for key in ("id", "file_name", "height", "width") if image.get(key) in (None, "")]
        if missing:
            raise ValueError(
                f"{self.json_file}: image {image.get('file_name', image.get('id'))!r} has no "
                f"{' and no '.join(map(repr, missing))}."
            )
        valid_id = is_id(image["id"], (int, float, str, bool))  # `_check_ids` refuses float and bool
        if not is_path(image["file_name"]) or not valid_id:
            raise ValueError(
                f"{self.json_file}: image {image['file_name']!r} has the id {image['id']!r}; the file name "
                "must be a path, the id an integer of up to 64 bits or a string."
            )
        sizes = image["height"], image["width"]
        if not all(map(is_side, sizes)):
            raise ValueError(
                f"{self.json_file}: image {image['file_name']!r} has width {image['width']!r} and height "
                f"{image['height']!r}; both must be integers above 0, up to {MAX_SIDE}."
            )
        path = os.path.join(self.image_root, image["file_name"])
        if self._search or "\\" in image["file_name"] or os.path.isabs(image["file_name"]):
            path = self.finder.find(image["file_name"]) or path
        return {
            "file_name": path,
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }

    def _annotation(self, record: dict, annotation: dict) -> dict | None:
        """Return the annotation in the standard format, or None if it is left out."""
        result = {key: annotation[key] for key in self.keys if key in annotation}
        if result.setdefault("iscrowd", 0) not in (0, 1):
            raise self._error(record, annotation, f"has iscrowd {result['iscrowd']!r}; it must be 0 or 1")
        category_id = annotation.get("category_id")
        if _key(category_id) not in self.category_ids:
            legal = sorted(self.category_ids)
            raise self._error(
                record,
                annotation,
                f"has category id {category_id!r}, which is not in the file's list of {len(legal)} "
                f"categories (ids {legal[0]} to {legal[-1]})",
            )
        if self.id_map is not None:
            result["category_id"] = self.id_map[cast(int, category_id)]
        if not self._box_is_valid(record, annotation):
            self.dropped["annotations whose box has no area"] += 1
            return None
        result["bbox_mode"] = BoxMode.XYWH_ABS if len(result["bbox"]) == 4 else BoxMode.XYWHA_ABS
        if annotation.get("segmentation"):
            result["segmentation"] = self._segmentation(record, annotation)
            if not result["segmentation"]:
                self.dropped[
                    "annotations without a polygon that has an extent and at least three points"
                ] += 1
                return None
        if result.get("keypoints", ()) in (None, []):  # some tools write this for objects without
            del result["keypoints"]
        if "keypoints" in result:
            result["keypoints"] = self._keypoints(record, annotation)
        return result

    def _keypoints(self, record: dict, annotation: dict) -> list[float]:
        """Return x, y, visibility, ... with x and y moved from pixel indices to pixel centers."""
        keypoints = annotation["keypoints"]
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            raise self._error(record, annotation, "has keypoints that are not triples of x, y, visibility")
        if not are_coordinates(keypoints):
            raise self._error(record, annotation, f"has keypoints that are not {_COORDINATES}")
        wanted = self.num_keypoints.get(annotation["category_id"])
        if keypoints and wanted and len(keypoints) != 3 * wanted:
            raise self._error(
                record,
                annotation,
                f"has {len(keypoints) // 3} keypoints, but its category names {wanted}",
            )
        return [value if i % 3 == 2 else value + 0.5 for i, value in enumerate(keypoints)]

    def _box_is_valid(self, record: dict, annotation: dict) -> bool:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) not in (4, 5) or not all(map(_is_number, box)):
            raise self._error(
                record,
                annotation,
                f"has the bbox {box!r}; it must be [x, y, width, height], or [center x, center y, width, "
                "height, angle in degrees] for a rotated box",
            )
        if box[2] > 0 and box[3] > 0:
            if not are_coordinates(box):
                raise self._error(record, annotation, f"has a box that is not of {_COORDINATES}: {box}")
            return True
        if self.empty_boxes == "error":
            raise self._error(
                record,
                annotation,
                f"has a box without area (width, height): {box}. Correct it, or leave such annotations out "
                "with empty_boxes='drop' (in a dataset URI: ?empty_boxes=drop)",
            )
        return False

    def _segmentation(self, record: dict, annotation: dict) -> list | dict:
        """Return the polygons with an extent and at least three points, or the compressed RLE mask."""
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            return self._rle(record, annotation)
        if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
            raise self._error(
                record, annotation, "has a segmentation that is neither polygons nor an RLE mask"
            )
        if not all(map(are_coordinates, segmentation)):
            raise self._error(record, annotation, f"has a polygon with values that are not {_COORDINATES}")
        return [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6 and _has_extent(p)]

    def _rle(self, record: dict, annotation: dict) -> dict:
        rle = annotation["segmentation"]
        try:
            rle_runs(rle)
        except ValueError as error:
            raise self._error(record, annotation, f"has a broken RLE mask: {error}") from error
        if list(rle["size"]) != [record["height"], record["width"]]:
            raise self._error(
                record,
                annotation,
                f"has an RLE mask of [height, width] = {rle['size']}, but the image has "
                f"{[record['height'], record['width']]}",
            )
        if not isinstance(rle["counts"], list):
            return rle
        from pycocotools import mask as mask_utils

        return mask_utils.frPyObjects(rle, *rle["size"])

    def _error(self, record: dict, annotation: dict, what: str) -> ValueError:
        return ValueError(
            f"{self.json_file}: annotation {annotation.get('id')!r} of image {record['file_name']!r} "
            f"(id {record['image_id']!r}) {what}."
        )


def _key(value: Any) -> Any:
    """Return a hashable value to look up an id by, whatever its type."""
    return value if value is None or isinstance(value, int | float | str) else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_extent(polygon: list[float]) -> bool:
    """Return whether a polygon is more than a point or a horizontal or vertical line."""
    x, y = polygon[0::2], polygon[1::2]
    return min(x) < max(x) and min(y) < max(y)
