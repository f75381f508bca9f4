"""Objects as annotation tools draw them, and datasets of such objects.

The readers of labelme, VIA and CVAT collect shapes in `DrawnObject` and images in `RawSetBuilder`. `DrawnURI`
loads what such a reader returns, so that loader and checker read a file in the same way.
"""

from __future__ import annotations

import logging
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detlib.data.datasets.file_values import MAX_COORDINATE, MAX_PIXELS
from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.datasets.rotated_corners import RotatedBox
from detlib.data.datasets.split_names import split_names
from detlib.data.datasets.voc_layout import IMAGE_SUFFIXES, read_lines
from detlib.data.formats.base import ParsedURI, URIOption
from detlib.data.formats.findings import RawSet, split_common_folder
from detlib.data.image_io import read_image_size
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = [
    "ROTATED_BOXES",
    "DrawnObject",
    "DrawnURI",
    "RawSetBuilder",
    "ShapeError",
    "check_points",
    "find_image",
    "find_split_folder",
    "read_class_list",
    "subfolders",
]

logger = logging.getLogger(__name__)

_ELLIPSE_POINTS = 64
# Files that are not asked whether they are folders, which is slow in an object store.
_NOT_FOLDERS = (".json", ".txt", ".xml", ".csv", *IMAGE_SUFFIXES)
# labelme's own names in labels.txt that are not classes.
_NOT_CLASSES = ("__ignore__", "_background_")

ROTATED_BOXES = URIOption(
    "boxes",
    "`axis-aligned` replaces each rotated box by its extent and keeps its outline as a polygon; by default "
    "boxes are rotated",
    ("rotated", "axis-aligned"),
)


class ShapeError(ValueError):
    """An invalid shape, with its kind of finding."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def check_points(points: Any) -> list[tuple[float, float]]:
    """Return points as pairs of numbers.

    Args:
        points: a list of pairs (x, y), in pixels.

    Raises:
        ShapeError: It is anything else, or a value is not finite or too large.
    """
    valid = isinstance(points, list | tuple) and len(points) > 0
    for point in points if valid else ():
        # The comparison is False for values that are not finite.
        valid = valid and isinstance(point, list | tuple) and len(point) == 2
        valid = valid and all(type(v) in (int, float) and abs(v) <= MAX_COORDINATE for v in point)
    if not valid:
        shown = repr(points)[:100]
        raise ShapeError("bad-shape", f"needs points [x, y] of numbers up to {MAX_COORDINATE}, not {shown}")
    return [(x, y) for x, y in points]


@dataclass
class DrawnObject:
    """An object, built from one or several shapes.

    Attributes:
        label: name of its class.
        location: identifies its first shape.
        marks: the keys `iscrowd` and `difficult` of the standard format, where they are set.
        boxes: rectangles as (x0, y0, x1, y1).
        polygons: polygons as flat lists (x0, y0, x1, y1, ...).
        masks: masks as x and y of their corner and an (h, w) bool array.
        rotated_box: center x, center y, width, height and angle in degrees, counter-clockwise.
    """

    label: str
    location: str
    marks: dict[str, int] = field(default_factory=dict)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    polygons: list[list[float]] = field(default_factory=list)
    masks: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    rotated_box: RotatedBox | None = None

    def add_polygon(self, points: Any) -> None:
        """Add a polygon, a list of pairs. Raise ShapeError if it is invalid."""
        points = check_points(points)
        if len(points) < 3:
            raise ShapeError("polygon-too-short", f"is a polygon of {len(points)} points")
        self.polygons.append([value for point in points for value in point])

    def add_box(self, points: Any) -> None:
        """Add the extent of points, a list of pairs. Raise ShapeError if they are invalid."""
        x, y = zip(*check_points(points))
        self.boxes.append((min(x), min(y), max(x), max(y)))

    def add_ellipse(self, center: Any, radii: Sequence[Any], angle: float = 0.0) -> None:
        """Add an ellipse as a polygon of 64 points.

        Args:
            center: a pair (x, y).
            radii: half of its width and half of its height.
            angle: turns it clockwise, in radians.

        Raises:
            ShapeError: A value is invalid.
        """
        ((x, y), (a, b)) = check_points([center, tuple(radii)])
        if not math.isfinite(angle) or a < 0 or b < 0:
            raise ShapeError("bad-shape", f"is an ellipse with radii {a}, {b} and angle {angle}")
        turns = [2 * math.pi * i / _ELLIPSE_POINTS for i in range(_ELLIPSE_POINTS)]
        c, s = math.cos(angle), math.sin(angle)
        rim = [(a * math.cos(turn), b * math.sin(turn)) for turn in turns]
        self.polygons.append([v for dx, dy in rim for v in (x + dx * c - dy * s, y + dx * s + dy * c)])

    def add_mask(self, x: int, y: int, mask: np.ndarray) -> None:
        """Add an (h, w) bool mask whose corner is at pixel (x, y)."""
        self.masks.append((x, y, mask))

    def geometry(self, size: tuple[int, int]) -> tuple[list[float], list | dict | None]:
        """Return the box [x0, y0, x1, y1] in pixels, and polygons, an RLE mask or None.

        Args:
            size: width and height of the image.

        Raises:
            ShapeError: A mask is not inside the image, or the image is too large for masks.
        """
        polygons = [*self.polygons, *([a, b, c, b, c, d, a, d] for a, b, c, d in self.boxes)]
        if self.masks:
            return _merge_masks(self.masks, polygons, size)
        x, y = [v for p in polygons for v in p[0::2]], [v for p in polygons for v in p[1::2]]
        is_box = len(self.boxes) == 1 and not self.polygons
        return [float(v) for v in (min(x), min(y), max(x), max(y))], None if is_box else polygons


def _merge_masks(
    masks: list[tuple[int, int, np.ndarray]], polygons: list[list[float]], size: tuple[int, int]
) -> tuple[list[float], dict]:
    """Return box and RLE mask of the union of masks and polygons."""
    from pycocotools import mask as mask_utils

    width, height = size
    if width * height > MAX_PIXELS:
        raise ShapeError(
            "bad-shape", f"has a mask, and its image of {width} x {height} pixels is too large for masks"
        )
    union = np.zeros((height, width), dtype=bool)
    for x0, y0, mask in masks:
        h, w = mask.shape
        if not (0 <= x0 <= width - w and 0 <= y0 <= height - h):
            raise ShapeError(
                "bad-shape",
                f"has a mask of {w} x {h} pixels at ({x0}, {y0}), which is not inside the image of {width} x "
                f"{height}",
            )
        union[y0 : y0 + h, x0 : x0 + w] |= mask
    for polygon in polygons:
        # The rasterizer's work grows with the coordinates.
        clipped = np.clip(np.reshape(polygon, (-1, 2)), 0, size).ravel().tolist()
        union |= mask_utils.decode(mask_utils.frPyObjects([clipped], height, width))[..., 0].astype(bool)
    rle = mask_utils.encode(np.asfortranarray(union, dtype=np.uint8))
    x, y, w, h = mask_utils.toBbox(rle).tolist()
    return [x, y, x + w, y + h], {"size": [height, width], "counts": rle["counts"].decode("ascii")}


class RawSetBuilder:
    """Builds the `RawSet` of a dataset image by image."""

    def __init__(self, file: str) -> None:
        """
        Args:
            file: the annotation file or folder, for the messages.
        """
        self.raw = RawSet(file, os.path.dirname(file))
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._labels: list[str] = []

    def add_image(self, image_id: Any, path: str, size: tuple[int, int] | None) -> dict:
        """Add an image and return it, to be passed to `add_object`.

        Args:
            image_id: its id in the dataset.
            path: its file.
            size: width and height; None if the annotations do not state them.
        """
        image = {"id": image_id, "file_name": path}
        if size is not None:
            image |= {"width": size[0], "height": size[1]}
        self._images.append(image)
        return image

    def add_object(self, image: dict, found: DrawnObject, location: str) -> None:
        """Add an object of an image. Raise ShapeError if its shapes do not fit the image.

        Args:
            image: the result of `add_image`, with a size.
            found: the object.
            location: identifies its shape in messages.
        """
        annotation: dict[str, Any] = {"id": len(self._labels) + 1, "image_id": image["id"]}
        if found.rotated_box is not None:
            annotation["bbox"] = list(found.rotated_box)
        else:
            (x0, y0, x1, y1), segmentation = found.geometry((image["width"], image["height"]))
            annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if segmentation is not None:
                annotation["segmentation"] = segmentation
        self.raw.locations[len(self._labels)] = location
        self._annotations.append(annotation | found.marks)
        self._labels.append(found.label)

    def finish(self, classes: Iterable[str]) -> RawSet:
        """Return the dataset.

        Args:
            classes: the class names in order; empty to use the sorted labels of the objects. A label that is
                not among them stays, as a string, in `category_id`.
        """
        raw = self.raw
        raw.image_root, names = split_common_folder([image["file_name"] for image in self._images])
        for image, name in zip(self._images, names):
            image["file_name"] = name
        ids = {name: i for i, name in enumerate(list(classes) or sorted({*self._labels}))}
        for annotation, label in zip(self._annotations, self._labels):
            annotation["category_id"] = ids.get(label, label)
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        raw.content = {"images": self._images, "categories": categories, "annotations": self._annotations}
        return raw


class DrawnURI(ParsedURI):
    """Base class of formats that are loaded by their lenient reader.

    The classes are the lines of labels.txt in the dataset's folder, or without that file those that
    `find_classes` finds. The options of a subclass include `EMPTY_BOXES`.
    """

    @abstractmethod
    def folder(self) -> str:
        """Return the folder of labels.txt."""

    @abstractmethod
    def find_classes(self) -> list[str]:
        """Return the class names of all splits, so that these agree on them; [] if there are none."""

    @abstractmethod
    def read(self, classes: list[str]) -> RawSet:
        """Read the dataset, whatever is wrong with it.

        Args:
            classes: the class names in order; empty to use the sorted labels of the objects.
        """

    def evaluator_type(self) -> str:
        """Return the type of the dataset's evaluator."""
        return "coco"

    def class_names(self) -> list[str]:
        """Return the class names in order.

        Raises:
            ValueError: There are none.
        """
        names = read_class_list(self.folder()) or self.find_classes()
        if not names:
            raise ValueError(f"Dataset URI {self.uri!r}: there is no object with a class.")
        return names

    def metadata(self) -> dict[str, Any]:
        """Return classes and evaluator; without labels.txt this reads the annotations of all splits."""
        self.check()
        return {"evaluator_type": self.evaluator_type(), "thing_classes": self.class_names()}

    def read_raw(self) -> RawSet:
        """Read the dataset for the checker."""
        return self.read(read_class_list(self.folder()))

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format.

        Raises:
            FileNotFoundError: There are no files, or an image does not exist.
            ValueError: The annotations are malformed. The message names file and object.
        """
        raw = self.read(self.class_names())
        warnings: Counter[str] = Counter()
        for finding in raw.findings:
            if finding.severity == "error":
                error = FileNotFoundError if finding.kind == "missing-image" else ValueError
                raise error(f"{finding.location}: {finding.detail}")
            warnings[finding.kind] += 1
        records = {
            image["id"]: {
                "file_name": os.path.join(raw.image_root, image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": [],
            }
            for image in raw.content["images"]
        }
        for number, annotation in enumerate(raw.content["annotations"]):
            standard = self._annotation(annotation, f"{raw.file}, {raw.locations[number]}")
            if standard is not None:
                records[annotation["image_id"]]["annotations"].append(standard)
            else:
                warnings["box-no-area"] += 1
        for kind, count in warnings.items():
            logger.warning("%s: left out %d %s", raw.file, count, _LEFT_OUT.get(kind, f"of kind {kind}"))
        logger.info("Loaded %d images from %s", len(records), self.uri)
        dicts = [*records.values()]
        return self.treat_crowd(dicts) if "crowd" in self.values else dicts

    def _annotation(self, annotation: dict, location: str) -> dict | None:
        """Return an annotation in the standard format, or None if it is left out."""
        if isinstance(annotation["category_id"], str):
            listed = bool(read_class_list(self.folder()))
            source = f"{self.folder()}/labels.txt" if listed else "the list of labels in the annotations"
            raise ValueError(f"{location}: the label {annotation['category_id']!r} is not in {source}.")
        box = annotation["bbox"]
        if min(box[2:4]) <= 0:
            if self.values["empty_boxes"] == "drop":
                return None
            raise ValueError(
                f"{location}: the box has no area: {box}. Correct it, or leave such objects out with "
                "?empty_boxes=drop."
            )
        keys = ("category_id", "bbox", "segmentation", "iscrowd", "difficult")
        mode = BoxMode.XYWH_ABS if len(box) == 4 else BoxMode.XYWHA_ABS
        return {key: annotation[key] for key in keys if key in annotation} | {"bbox_mode": mode}


_LEFT_OUT = {
    "shape-without-area": "points and lines, which have no area",
    "box-no-area": "objects whose box has no area",
}


def find_image(finder: ImageFinder, name: str) -> tuple[str | None, tuple[int, int] | None, str]:
    """Return path and size (width, height) of an image, and what is wrong if one of them is None."""
    path = finder.find(name)
    if path is None:
        return None, None, f"{os.path.join(finder.root, name)} does not exist"
    try:
        return path, read_image_size(path), ""
    except (OSError, ValueError) as error:
        return path, None, str(error)


def subfolders(path: str) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    names = (name for name in PathManager.ls(path) if not name.lower().endswith(_NOT_FOLDERS))
    return sorted(name for name in names if PathManager.isdir(os.path.join(path, name)))


def find_split_folder(uri: ParsedURI, dirname: str, split: str, has_data: Callable[[str], bool]) -> str:
    """Return the folder of a split, which is a folder in `dirname`; "val" finds "valid" too.

    Args:
        uri: the dataset, for the messages.
        dirname: the folder of all splits.
        split: name of the split; empty for all data in `dirname`.
        has_data: whether a folder has data of the format, for the message.

    Raises:
        FileNotFoundError: The folder does not exist. The message names the splits there are.
    """
    uri.require_folder(dirname)
    if not split:
        return dirname
    for name in split_names(split):
        folder = os.path.join(dirname, name)
        if PathManager.isdir(folder):
            return folder
    splits = [name for name in subfolders(dirname) if has_data(os.path.join(dirname, name))]
    raise FileNotFoundError(
        f"Dataset URI {uri.uri!r}: {dirname!r} has no folder {split!r}. It has the splits: "
        f"{', '.join(splits) or 'none; write the URI without a split to read all files'}."
    )


def read_class_list(dirname: str) -> list[str]:
    """Return the class names in `dirname`/labels.txt in their order; [] if there is no such file."""
    path = os.path.join(dirname, "labels.txt")
    lines = read_lines(path) if PathManager.isfile(path) else []
    return [name for name in dict.fromkeys(lines) if name not in _NOT_CLASSES]
