"""labelme's format (https://github.com/wkentaro/labelme): one JSON file for each image.

A file has `imagePath`, `imageHeight`, `imageWidth`, `imageData` (the image as base64, or null) and `shapes`.
A shape has `label`, `shape_type`, `points` [[x, y], ...] in pixels, `group_id` and `flags`. Shapes with the
same label and group are one object. What the types become:

polygon                       a polygon; the box is its extent
rectangle                     a box; a polygon if the object has other shapes
circle                        a polygon of 64 points; the box is the extent of the circle
mask                          an RLE mask; the box is its extent
point, line, linestrip        left out with a warning: they have no area

The flags `iscrowd` and `difficult` are the marks of that name. Other flags are ignored.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from PIL import Image

from detlib.data.datasets.pascal_voc import IMAGE_SUFFIXES, read_lines
from detlib.data.datasets.yolo_layout import join_path
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, ParsedURI, register_format
from detlib.data.formats.findings import RawSet, split_common_folder
from detlib.data.formats.writing import ConversionSource, write_text
from detlib.data.image_io import read_image_size
from detlib.structures import BoxMode
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager, cache_dir

__all__ = ["LabelmeURI", "read_raw_labelme", "write_labelme"]

logger = logging.getLogger(__name__)

# Bounds on what a file may state, so that the work on it is bounded by its size.
_MAX_FILE_BYTES = 2**28
_MAX_COORDINATE = 10**7
_MAX_SIDE = 10**6
_MAX_PIXELS = 2**28  # of an image with masks: these are decoded at the size of the image
_CIRCLE_POINTS = 64
_WITHOUT_AREA = ("point", "line", "linestrip", "points")
# labelme's own names in labels.txt that are not classes.
_NOT_CLASSES = ("__ignore__", "_background_")
_SPLIT_ALIASES = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("valid", "val")}
# Files that are not asked whether they are folders, which is slow in an object store.
_NOT_FOLDERS = (".json", ".txt", ".xml", *IMAGE_SUFFIXES)
# A polygon also stands for the box. Its extent may differ from the box by this, in pixels.
_SAME_BOX = 0.011


class LabelmeURI(ParsedURI):
    """`labelme:DIR` or `labelme:DIR@SPLIT`.

    A split is a folder in DIR. Without a split, all files in DIR and its folders are read. The classes are
    the lines of DIR/labels.txt. Without that file they are the sorted labels of all files in DIR, so that all
    splits agree on them.
    """

    form = "labelme:DIR@SPLIT"
    options = (EMPTY_BOXES,)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.split = self.split_body_with_optional_split()

    def _folder(self) -> str:
        """Return the folder to read; "val" finds "valid" too."""
        self.require_folder(self.dirname)
        if not self.split:
            return self.dirname
        for name in (self.split, *_SPLIT_ALIASES.get(self.split, ())):
            folder = os.path.join(self.dirname, name)
            if PathManager.isdir(folder):
                return folder
        splits = [name for name in _subfolders(self.dirname) if _has_labelme_file(f"{self.dirname}/{name}")]
        raise FileNotFoundError(
            f"Dataset URI {self.uri!r}: {self.dirname!r} has no folder {self.split!r}. It has the splits: "
            f"{', '.join(splits) or 'none; write the URI without a split to read all files'}."
        )

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the split or its files do not exist."""
        _find_files(self._folder())

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format, in the order of the files' paths.

        Raises:
            FileNotFoundError: There are no files, or an image does not exist.
            ValueError: A file is malformed. The message names file and shape.
        """
        folder = self._folder()
        raw = read_raw_labelme(folder, self._class_names())
        for finding in raw.findings:
            if finding.severity == "error":
                error = FileNotFoundError if finding.kind == "missing-image" else ValueError
                raise error(f"{finding.location}: {finding.detail}")
        dropped = Counter({"points and lines, which have no area": len(raw.findings)})
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
            standard = self._annotation(annotation, f"{folder}/{raw.locations[number]}")
            if standard is not None:
                records[annotation["image_id"]]["annotations"].append(standard)
            else:
                dropped["objects whose box has no area"] += 1
        for what, count in (+dropped).items():
            logger.warning("%s: left out %d %s.", folder, count, what)
        logger.info("Loaded %d images in labelme's format from %s", len(records), folder)
        return [*records.values()]

    def _annotation(self, annotation: dict, location: str) -> dict | None:
        """Return an annotation in the standard format, or None if it is left out."""
        if isinstance(annotation["category_id"], str):
            raise ValueError(
                f"{location}: the label {annotation['category_id']!r} is not in {self.dirname}/labels.txt."
            )
        if min(annotation["bbox"][2:]) <= 0:
            if self.values["empty_boxes"] == "drop":
                return None
            raise ValueError(
                f"{location}: the box has no area: {annotation['bbox']}. Correct it, or leave such objects "
                "out with ?empty_boxes=drop."
            )
        keys = ("category_id", "bbox", "segmentation", "iscrowd", "difficult")
        return {key: annotation[key] for key in keys if key in annotation} | {"bbox_mode": BoxMode.XYWH_ABS}

    def metadata(self) -> dict[str, Any]:
        """Return the classes; without labels.txt this reads all files in DIR."""
        self.check()
        return {"evaluator_type": "coco", "thing_classes": self._class_names()}

    def _class_names(self) -> list[str]:
        listed = _listed_classes(self.dirname)
        if listed:
            return listed
        with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
            names = sorted(set().union(*pool.map(_read_labels, _find_files(self.dirname))))
        if not names:
            raise ValueError(f"The files in {self.dirname!r} have no object.")
        return names

    def read_raw(self) -> RawSet:
        """Read the dataset for the checker."""
        return read_raw_labelme(self._folder(), _listed_classes(self.dirname))


def _read_labels(file: str) -> set[str]:
    objects = parse_objects(read_labelme_file(file)["shapes"], lambda *fault: None)
    return {found.label for found in objects}


def _listed_classes(dirname: str) -> list[str]:
    path = os.path.join(dirname, "labels.txt")
    lines = read_lines(path) if PathManager.isfile(path) else []
    return [name for name in dict.fromkeys(lines) if name not in _NOT_CLASSES]


def _subfolders(path: str) -> list[str]:
    names = (name for name in PathManager.ls(path) if not name.lower().endswith(_NOT_FOLDERS))
    return sorted(name for name in names if PathManager.isdir(os.path.join(path, name)))


def _walk(folder: str) -> Iterator[str]:
    for name in PathManager.ls(folder):
        if name.endswith(".json"):
            yield os.path.join(folder, name)
    for name in _subfolders(folder):
        yield from _walk(os.path.join(folder, name))


def _find_files(folder: str) -> list[str]:
    """Return the annotation files in a folder and its folders, sorted. Raise FileNotFoundError if none."""
    files = sorted(_walk(folder))
    if not files:
        raise FileNotFoundError(f"Folder {folder!r} has no annotation files (*.json).")
    return files


def claims_file(path: str) -> bool:
    """Whether a file is in labelme's format, by its first bytes."""
    if not path.endswith(".json"):
        return False
    with PathManager.open(path, "rb") as file:
        head = file.read(4096)
    keys = (b'"imageData"', b'"imagePath"', b'"shapes"')
    return any(head.partition(key)[2].lstrip().startswith(b":") for key in keys)


def _has_labelme_file(folder: str) -> bool:
    names = sorted(name for name in PathManager.ls(folder) if name.endswith(".json"))
    return any(claims_file(os.path.join(folder, name)) for name in names[:3])


def find_labelme(path: str) -> list[Candidate]:
    """Find a dataset in a folder itself, and one split for each of its folders."""
    found = []
    if _has_labelme_file(path):
        found.append(Candidate(f"labelme:{path}", "all", "found JSON files with shapes"))
    for name in _subfolders(path):
        if _has_labelme_file(os.path.join(path, name)):
            found.append(Candidate(f"labelme:{path}@{name}", name, f"found JSON files with shapes in {name}"))
    return found


def read_labelme_file(file: str) -> dict:
    """Read an annotation file.

    Raises:
        ValueError: It is too large, not JSON, or has no list of shapes.
    """
    with PathManager.open(file, "rb") as opened:
        data = opened.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"Annotation file {file!r} has more than {_MAX_FILE_BYTES} bytes.")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Annotation file {file!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"Annotation file {file!r} is not in labelme's format: it has no list 'shapes'.")
    return content


def _stated_size(file: str, content: dict) -> tuple[int, int] | None:
    """Return width and height; None if the file states neither. Raise ValueError if they are invalid."""
    size = content.get("imageWidth"), content.get("imageHeight")
    if size == (None, None):
        return None
    if not all(type(number) is int and 0 < number <= _MAX_SIDE for number in size):
        raise ValueError(
            f"Annotation file {file!r} has imageWidth {size[0]!r} and imageHeight {size[1]!r}; both must be "
            f"integers from 1 to {_MAX_SIDE}."
        )
    return cast(tuple[int, int], size)


def find_image(file: str, content: dict) -> str:
    """Return the path of an annotation file's image.

    It is `imagePath`, relative to the annotation file, or an image next to the annotation file with the name
    of either. If there is none, `imageData` is decoded into the cache folder.

    Raises:
        FileNotFoundError: There is neither an image nor `imageData`.
        ValueError: `imageData` is not an image.
    """
    folder, stem = os.path.dirname(file), os.path.basename(file).removesuffix(".json")
    stated = content.get("imagePath")
    # Paths from Windows have backslashes. A URL is not followed: only its last part counts.
    parts = stated.replace("\\", "/") if isinstance(stated, str) else ""
    paths = [] if "://" in parts or not parts else [join_path(folder, parts)]
    if parts.rpartition("/")[2]:
        paths.append(join_path(folder, parts.rpartition("/")[2]))
    for path in (*paths, *(os.path.join(folder, stem + suffix) for suffix in IMAGE_SUFFIXES)):
        if PathManager.isfile(path):
            return path
    if content.get("imageData"):
        return _decode_image_data(file, content["imageData"])
    raise FileNotFoundError(
        f"{file}: the image {stated!r} does not exist, and imageData is empty. Looked for: "
        f"{', '.join(paths) or folder}."
    )


def _decode_image_data(file: str, text: Any) -> str:
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as image:
            suffix = f".{str(image.format).lower()}"
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: imageData is not an image: {error}.") from error
    folder = os.path.join(cache_dir(), "labelme")
    path = os.path.join(folder, hashlib.sha256(data).hexdigest() + suffix)
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        write_bytes_atomically(path, lambda opened: opened.write(data))
    return path


class _ShapeError(ValueError):
    """An invalid shape, with its kind of finding."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass
class _Object:
    """An object, built from the shapes of a group or from a single shape.

    Attributes:
        label: name of its class.
        location: identifies its first shape.
        marks: the keys `iscrowd` and `difficult` of the standard format, where they are set.
        boxes: rectangles as (x0, y0, x1, y1).
        polygons: polygons as flat lists (x0, y0, x1, y1, ...).
        masks: masks as x and y of their corner and an (h, w) bool array.
    """

    label: str
    location: str
    marks: dict[str, int]
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    polygons: list[list[float]] = field(default_factory=list)
    masks: list[tuple[int, int, np.ndarray]] = field(default_factory=list)

    def add(self, shape: dict) -> None:
        """Add a shape. Raise _ShapeError if it is invalid or has no area."""
        kind = shape.get("shape_type") or "polygon"  # files of old versions have no type
        if kind in _WITHOUT_AREA:
            raise _ShapeError("shape-without-area", f"is a {kind}, which has no area")
        points = _points(shape)
        x, y = [point[0] for point in points], [point[1] for point in points]
        if kind == "polygon":
            if len(points) < 3:
                raise _ShapeError("polygon-too-short", f"is a polygon of {len(points)} points")
            self.polygons.append([value for point in points for value in point])
        elif kind == "rectangle":
            if len(points) not in (2, 4):  # two corners in any order; some programs write all four
                raise _ShapeError("bad-shape", f"is a rectangle of {len(points)} points, not of two corners")
            self.boxes.append((min(x), min(y), max(x), max(y)))
        elif kind == "circle":
            if len(points) != 2:
                raise _ShapeError("bad-shape", f"is a circle of {len(points)} points, not of center and rim")
            radius = math.hypot(x[1] - x[0], y[1] - y[0])
            turns = [2 * math.pi * i / _CIRCLE_POINTS for i in range(_CIRCLE_POINTS)]
            rim = ((x[0] + radius * math.cos(turn), y[0] + radius * math.sin(turn)) for turn in turns)
            self.polygons.append([value for point in rim for value in point])
        elif kind == "mask":
            if len(points) != 2:
                raise _ShapeError("bad-shape", f"is a mask of {len(points)} points, not of two corners")
            self.masks.append((round(min(x)), round(min(y)), _decode_mask(shape.get("mask"))))
        else:
            raise _ShapeError("bad-shape", f"has the unknown shape_type {kind!r}"[:200])

    def geometry(self, size: tuple[int, int]) -> tuple[list[float], list | dict | None]:
        """Return the box [x0, y0, x1, y1] in pixels, and polygons, an RLE mask or None.

        Args:
            size: width and height of the image.

        Raises:
            ValueError: A mask is not inside the image, or the image is too large for masks.
        """
        polygons = [*self.polygons, *([a, b, c, b, c, d, a, d] for a, b, c, d in self.boxes)]
        if self.masks:
            return _merge_masks(self.masks, polygons, size)
        x, y = [v for p in polygons for v in p[0::2]], [v for p in polygons for v in p[1::2]]
        is_box = len(self.boxes) == 1 and not self.polygons
        return [float(v) for v in (min(x), min(y), max(x), max(y))], None if is_box else polygons


def parse_objects(shapes: list, report: Callable[[str, str, str], None]) -> list[_Object]:
    """Return the objects of a file: shapes with the same label and group are one.

    Args:
        shapes: the list in the file.
        report: called for each shape that is not used, with kind of finding, location and detail.
    """
    objects: list[_Object] = []
    groups: dict[tuple[str, str], _Object] = {}
    for number, shape in enumerate(shapes, start=1):
        location = f"shape {number}"
        try:
            if not isinstance(shape, dict):
                raise _ShapeError("annotation-broken", f"is a {type(shape).__name__}, not an object")
            label = shape.get("label")
            if not isinstance(label, str) or not label.strip():
                raise _ShapeError("annotation-broken", f"has the label {label!r}"[:200])
            label, group, flags = label.strip(), shape.get("group_id"), shape.get("flags")
            location = f"shape {number} ({label})"
            flags = flags if isinstance(flags, dict) else {}
            new = _Object(label, location, {k: 1 for k in ("iscrowd", "difficult") if flags.get(k) is True})
            found = new if group is None else groups.get((label, repr(group)), new)
            found.add(shape)
            if found is new:
                objects.append(new)
                groups[label, repr(group)] = new
            found.marks |= new.marks
        except _ShapeError as error:
            report(error.kind, location, str(error))
    return objects


def _points(shape: dict) -> list[list[float]]:
    points: Any = shape.get("points")
    valid = isinstance(points, list) and len(points) > 0
    for point in points if valid else ():
        # The comparison is False for values that are not finite.
        valid = valid and isinstance(point, list) and len(point) == 2
        valid = valid and all(type(v) in (int, float) and abs(v) <= _MAX_COORDINATE for v in point)
    if not valid:
        shown = repr(points)[:100]
        raise _ShapeError("bad-shape", f"needs points [x, y] of numbers up to {_MAX_COORDINATE}, not {shown}")
    return points


def _decode_mask(text: Any) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            pixels = np.asarray(image)
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _ShapeError("bad-shape", f"has a mask that cannot be decoded: {error}") from error
    if pixels.ndim != 2:
        raise _ShapeError("bad-shape", "has a mask that is a color image")
    return pixels > 0


def _merge_masks(
    masks: list[tuple[int, int, np.ndarray]], polygons: list[list[float]], size: tuple[int, int]
) -> tuple[list[float], dict]:
    """Return box and RLE mask of the union of masks and polygons."""
    from pycocotools import mask as mask_utils

    if size[0] * size[1] > _MAX_PIXELS:
        raise ValueError(f"has a mask, and its image of {size[0]} x {size[1]} pixels is too large for masks")
    width, height = size
    union = np.zeros((height, width), dtype=bool)
    for x0, y0, mask in masks:
        h, w = mask.shape
        if not (0 <= x0 <= width - w and 0 <= y0 <= height - h):
            raise ValueError(
                f"has a mask of {w} x {h} pixels at ({x0}, {y0}), which is not inside the image of {width} x "
                f"{height}"
            )
        union[y0 : y0 + h, x0 : x0 + w] |= mask
    for polygon in polygons:
        # The rasterizer's work grows with the coordinates.
        clipped = np.clip(np.reshape(polygon, (-1, 2)), 0, size).ravel().tolist()
        union |= mask_utils.decode(mask_utils.frPyObjects([clipped], height, width))[..., 0].astype(bool)
    rle = mask_utils.encode(np.asfortranarray(union, dtype=np.uint8))
    x, y, w, h = mask_utils.toBbox(rle).tolist()
    return [x, y, x + w, y + h], {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def read_raw_labelme(folder: str, listed: list[str]) -> RawSet:
    """Read all files of a folder for the checker.

    Args:
        folder: is searched with its folders.
        listed: the classes; empty to use the sorted labels of the objects found.
    """
    raw = RawSet(folder, folder)
    images: list[dict] = []
    labels: list[str] = []
    annotations: list[dict] = []
    for file in _find_files(folder):
        shown = os.path.relpath(file, folder)
        try:
            content = read_labelme_file(file)
            path = find_image(file, content)
            size = _stated_size(file, content) or read_image_size(path)
        except FileNotFoundError as error:
            raw.report("missing-image", str(error), file=file, action="image dropped")
            continue
        except ValueError as error:
            raw.report("bad-file", str(error), file=file, action="image dropped")
            continue
        image = {"id": shown.removesuffix(".json"), "file_name": path, "width": size[0], "height": size[1]}
        images.append(image)

        def report(kind: str, location: str, detail: str, file: str = file, path: str = path) -> None:
            where = {"file": file, "image": os.path.basename(path), "annotation": location}
            raw.report(kind, f"the shape {detail}", action="shape dropped", **where)

        for found in parse_objects(content["shapes"], report):
            try:
                (x0, y0, x1, y1), segmentation = found.geometry(size)
            except ValueError as error:
                report("bad-shape", found.location, str(error))
                continue
            annotation = {"id": len(labels) + 1, "image_id": image["id"], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if segmentation is not None:
                annotation["segmentation"] = segmentation
            raw.locations[len(labels)] = f"{shown}, {found.location}"
            annotations.append(annotation | found.marks)
            labels.append(found.label)
    raw.image_root, names = split_common_folder([image["file_name"] for image in images])
    for image, name in zip(images, names):
        image["file_name"] = name
    classes = listed or sorted({*labels})
    ids = {name: i for i, name in enumerate(classes)}
    for annotation, label in zip(annotations, labels):
        annotation["category_id"] = ids.get(label, label)  # a label that labels.txt lacks is an error
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def write_labelme(source: ConversionSource, out: str, masks: str) -> tuple[str, list[str]]:
    """Write OUT/SPLIT/*.json and OUT/labels.txt; the images go to OUT/SPLIT.

    An object becomes a polygon or several, a mask, or a rectangle, see `masks` of `convert_dataset`.
    """
    classes = source.write_class_list(os.path.join(out, "labels.txt"))
    paths = []
    for i, record in enumerate(source.dicts):
        shapes = []
        for number, annotation in enumerate(record.get("annotations", ()), start=1):
            parts = _shapes_of(source, annotation, masks)
            source.count_lost("objects lose their keypoints", annotation.get("keypoints") is not None)
            flags = {key: True for key in ("iscrowd", "difficult") if annotation.get(key)}
            rest = {"group_id": number if len(parts) > 1 else None, "description": "", "flags": flags}
            shapes += [{"label": classes[annotation["category_id"]], **part, **rest} for part in parts]
        content = {
            "version": "5.0.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": source.file_name(i),
            "imageData": None,
            "imageHeight": record["height"],
            "imageWidth": record["width"],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_text(os.path.join(out, source.split, source.stems[i] + ".json"), text)
        paths.append(os.path.join(out, source.split, source.file_name(i)))
    return f"labelme:{out}@{source.split}", paths


def _shapes_of(source: ConversionSource, annotation: dict, masks: str) -> list[dict]:
    """Return type and points of an object's shapes."""
    x0, y0, x1, y1 = box = source.box(annotation)
    segmentation = annotation.get("segmentation")
    if segmentation is not None and len(segmentation) and masks != "boxes":
        if isinstance(segmentation, dict):
            shapes, extent = _mask_shape(segmentation)
        else:
            polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
            shapes = [{"shape_type": "polygon", "points": polygon.tolist()} for polygon in polygons]
            points = np.concatenate(polygons)
            extent = [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
        if masks == "polygons" or max(abs(a - b) for a, b in zip(extent, box)) <= _SAME_BOX:
            return shapes
    if segmentation is not None:
        source.count_lost("objects lose their segmentation")
    return [{"shape_type": "rectangle", "points": [[x0, y0], [x1, y1]]}]


def _mask_shape(segmentation: dict) -> tuple[list[dict], list[float]]:
    """Return an RLE mask as a shape with a PNG of its extent, and the extent."""
    from pycocotools import mask as mask_utils

    rle = segmentation
    if isinstance(rle["counts"], list):
        rle = mask_utils.frPyObjects(rle, *rle["size"])
    x, y, w, h = (int(v) for v in mask_utils.toBbox(rle))
    pixels = mask_utils.decode(rle)[y : y + h, x : x + w]
    buffer = io.BytesIO()
    if pixels.size:
        Image.fromarray(pixels * np.uint8(255)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    # The points are the first and the last pixel.
    points = [[float(x), float(y)], [float(x + w - 1), float(y + h - 1)]]
    return [{"shape_type": "mask", "points": points, "mask": text}], [x, y, x + w, y + h]


register_format(
    Format(
        name="labelme",
        summary="labelme's JSON files, one for each image: polygons, rectangles, circles, masks. `SPLIT` is "
        "a folder in `DIR`; `labelme:DIR` reads all files",
        uri_class=LabelmeURI,
        write=write_labelme,
        find=find_labelme,
        layout="*.json with 'shapes', one for each image, here or in a split's folder",
        claims=claims_file,
        findings={
            "bad-shape": (
                "error",
                "a shape has an unknown type, or points or a mask that do not fit its type",
            ),
            "shape-without-area": ("warning", "a shape is a point or a line, which has no area"),
        },
    )
)
