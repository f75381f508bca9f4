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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from PIL import Image

from detlib.data.datasets.file_values import MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE, read_json
from detlib.data.datasets.voc_layout import IMAGE_SUFFIXES
from detlib.data.datasets.yolo_layout import join_path
from detlib.data.formats.base import CROWD, EMPTY_BOXES, Candidate, Format, register_format
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import (
    DrawnObject,
    DrawnURI,
    RawSetBuilder,
    ShapeError,
    check_points,
    find_split_folder,
    subfolders,
)
from detlib.data.formats.writing import ConversionSource, write_text
from detlib.data.image_io import read_image_size
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager, cache_dir

__all__ = ["LabelmeURI", "read_raw_labelme", "write_labelme"]

logger = logging.getLogger(__name__)

_WITHOUT_AREA = ("point", "line", "linestrip", "points")


class LabelmeURI(DrawnURI):
    """`labelme:DIR` or `labelme:DIR@SPLIT`.

    A split is a folder in DIR. Without a split, all files in DIR and its folders are read. The classes are
    the lines of DIR/labels.txt. Without that file they are the sorted labels of all files in DIR, so that all
    splits agree on them.
    """

    form = "labelme:DIR@SPLIT"
    options = (CROWD, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.split = self.split_body_with_optional_split()

    def _folder(self) -> str:
        return find_split_folder(self, self.dirname, self.split, _has_labelme_file)

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the split or its files do not exist."""
        _find_files(self._folder())

    def folder(self) -> str:
        """Return the folder of labels.txt."""
        return self.dirname

    def find_classes(self) -> list[str]:
        """Return the sorted labels of all files in DIR."""
        with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
            return sorted(set().union(*pool.map(_read_labels, _find_files(self.dirname))))

    def read(self, classes: list[str]) -> RawSet:
        """Read the split."""
        return read_raw_labelme(self._folder(), classes)


def _read_labels(file: str) -> set[str]:
    objects = parse_objects(read_labelme_file(file)["shapes"], lambda *fault: None)
    return {found.label for found in objects}


def _walk(folder: str) -> Iterator[str]:
    for name in PathManager.ls(folder):
        if name.endswith(".json"):
            yield os.path.join(folder, name)
    for name in subfolders(folder):
        yield from _walk(os.path.join(folder, name))


def _find_files(folder: str) -> list[str]:
    """Return the annotation files in a folder and its folders, sorted. Raise FileNotFoundError if none."""
    files = sorted(_walk(folder))
    if not files:
        raise FileNotFoundError(f"Folder {folder!r} has no annotation files (*.json).")
    return files


def claims_file(path: str) -> bool:
    """Return whether a file is in labelme's format, by its first bytes."""
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
    for name in subfolders(path):
        if _has_labelme_file(os.path.join(path, name)):
            found.append(Candidate(f"labelme:{path}@{name}", name, f"found JSON files with shapes in {name}"))
    return found


def read_labelme_file(file: str) -> dict:
    """Read an annotation file.

    Raises:
        ValueError: It is too large, not JSON, or has no list of shapes.
    """
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"Annotation file {file!r} is not in labelme's format: it has no list 'shapes'.")
    return content


def _stated_size(file: str, content: dict) -> tuple[int, int] | None:
    """Return width and height; None if the file states neither. Raise ValueError if they are invalid."""
    size = content.get("imageWidth"), content.get("imageHeight")
    if size == (None, None):
        return None
    if not all(type(number) is int and 0 < number <= MAX_SIDE for number in size):
        raise ValueError(
            f"Annotation file {file!r} has imageWidth {size[0]!r} and imageHeight {size[1]!r}; both must be "
            f"integers from 1 to {MAX_SIDE}."
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


def _add_shape(found: DrawnObject, shape: dict) -> None:
    """Add a shape to an object. Raise ShapeError if it is invalid or has no area."""
    kind = shape.get("shape_type") or "polygon"  # files of old versions have no type
    if kind in _WITHOUT_AREA:
        raise ShapeError("shape-without-area", f"is a {kind}, which has no area")
    points = check_points(shape.get("points"))
    if kind == "polygon":
        found.add_polygon(points)
    elif kind == "rectangle":
        if len(points) not in (2, 4):  # two corners in any order; some programs write all four
            raise ShapeError("bad-shape", f"is a rectangle of {len(points)} points, not of two corners")
        found.add_box(points)
    elif kind == "circle":
        if len(points) != 2:
            raise ShapeError("bad-shape", f"is a circle of {len(points)} points, not of center and rim")
        radius = math.dist(*points)
        found.add_ellipse(points[0], (radius, radius))
    elif kind == "mask":
        if len(points) != 2:
            raise ShapeError("bad-shape", f"is a mask of {len(points)} points, not of two corners")
        x, y = zip(*points)
        found.add_mask(round(min(x)), round(min(y)), _decode_mask(shape.get("mask")))
    else:
        raise ShapeError("bad-shape", f"has the unknown shape_type {kind!r}"[:200])


def parse_objects(shapes: list, report: Callable[[str, str, str], None]) -> list[DrawnObject]:
    """Return the objects of a file: shapes with the same label and group are one.

    Args:
        shapes: the list in the file.
        report: called for each shape that is not used, with kind of finding, location and detail.
    """
    objects: list[DrawnObject] = []
    groups: dict[tuple[str, str], DrawnObject] = {}
    for number, shape in enumerate(shapes, start=1):
        location = f"shape {number}"
        try:
            if not isinstance(shape, dict):
                raise ShapeError("annotation-broken", f"is a {type(shape).__name__}, not an object")
            label = shape.get("label")
            if not isinstance(label, str) or not label.strip():
                raise ShapeError("annotation-broken", f"has the label {label!r}"[:200])
            label, group, flags = label.strip(), shape.get("group_id"), shape.get("flags")
            location = f"shape {number} ({label})"
            flags = flags if isinstance(flags, dict) else {}
            new = DrawnObject(
                label, location, {k: 1 for k in ("iscrowd", "difficult") if flags.get(k) is True}
            )
            found = new if group is None else groups.get((label, repr(group)), new)
            _add_shape(found, shape)
            if found is new:
                objects.append(new)
                groups[label, repr(group)] = new
            found.marks |= new.marks
        except ShapeError as error:
            report(error.kind, location, str(error))
    return objects


def _decode_mask(text: Any) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            pixels = np.asarray(image)
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ShapeError("bad-shape", f"has a mask that cannot be decoded: {error}") from error
    if pixels.ndim != 2:
        raise ShapeError("bad-shape", "has a mask that is a color image")
    return pixels > 0


def read_raw_labelme(folder: str, listed: list[str]) -> RawSet:
    """Read all files of a folder for the checker.

    Args:
        folder: is searched with its folders.
        listed: the classes; empty to use the sorted labels of the objects found.
    """
    builder = RawSetBuilder(folder)
    for file in _find_files(folder):
        shown = os.path.relpath(file, folder)
        try:
            content = read_labelme_file(file)
            path = find_image(file, content)
            size = _stated_size(file, content) or read_image_size(path)
        except FileNotFoundError as error:
            builder.raw.report("missing-image", str(error), file=file, action="image dropped")
            continue
        except ValueError as error:
            builder.raw.report("bad-file", str(error), file=file, action="image dropped")
            continue
        image = builder.add_image(shown.removesuffix(".json"), path, size)

        def report(kind: str, location: str, detail: str, file: str = file, path: str = path) -> None:
            where = {"file": file, "image": os.path.basename(path), "annotation": location}
            builder.raw.report(kind, f"the shape {detail}", action="shape dropped", **where)

        for found in parse_objects(content["shapes"], report):
            try:
                builder.add_object(image, found, f"{shown}, {found.location}")
            except ShapeError as error:
                report(error.kind, found.location, str(error))
    return builder.finish(listed)


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
    x0, y0, x1, y1 = source.box(annotation)
    segmentation = annotation.get("segmentation")
    if segmentation is not None and len(segmentation) and masks != "boxes":
        if isinstance(segmentation, dict):
            shapes, extent = _mask_shape(segmentation)
        else:
            polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
            shapes = [{"shape_type": "polygon", "points": polygon.tolist()} for polygon in polygons]
            points = np.concatenate(polygons)
            extent = [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
        if masks == "polygons" or source.is_extent(annotation, extent):
            source.count_moved_box(annotation, extent)
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
    )
)
