"""The XML of CVAT, "CVAT for images 1.1" (https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/).

A file, usually annotations.xml, lists images with their shapes; the images are in the folder `images` next to
it. What the shapes become:

box                          a box; a rotated box if it has a rotation, see the option `boxes`
polygon                      a polygon; the box is its extent
ellipse                      a polygon of 64 points
mask                         an RLE mask; the box is its extent
cuboid                       a box, the extent of its corners
points, polyline, skeleton   left out with a warning: they have no area
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from detlib.data.datasets.file_values import MAX_COORDINATE, MAX_PIXELS, MAX_SIDE
from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.datasets.rotated_corners import corners, normalize_angle
from detlib.data.datasets.voc_layout import parse_xml
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, register_format
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import (
    ROTATED_BOXES,
    DrawnObject,
    DrawnURI,
    RawSetBuilder,
    ShapeError,
    find_split_folder,
    subfolders,
)
from detlib.utils.file_io import PathManager

__all__ = ["CvatURI"]

_NO_AREA = {
    "points": "is a set of points, which has no area",
    "polyline": "is a polyline, which has no area",
    "skeleton": "is a skeleton, which has no area; export keypoints as COCO Keypoints",
}
_AREAS = {"box", "polygon", "ellipse", "mask", "cuboid"}
_SHAPES = _AREAS | {*_NO_AREA}
_NAME = "annotations.xml"


class CvatURI(DrawnURI):
    """`cvat:DIR`, `cvat:DIR@SUBSET` or `cvat:FILE.xml`.

    A subset is that of the images in DIR/annotations.xml, or a folder in DIR with an annotations.xml. The
    classes are the lines of DIR/labels.txt. Without that file they are the labels of the task, in its order.
    """

    form = "cvat:DIR@SUBSET"
    options = (ROTATED_BOXES, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.subset = self.split_body_with_optional_split()

    def _source(self) -> tuple[str, str]:
        """Return the annotation file, and the subset of its images; "" for all images."""
        if PathManager.isfile(self.dirname):
            return self.dirname, self.subset
        self.require_folder(self.dirname)
        file = _find_file(self.dirname)
        if file is not None:
            if self.subset and self.subset not in _subsets(file):
                listed = ", ".join(_subsets(file)) or "none; write the URI without a subset"
                raise FileNotFoundError(
                    f"Dataset URI {self.uri!r}: {file!r} has no subset {self.subset!r}. It has: {listed}."
                )
            return file, self.subset
        folder = find_split_folder(self, self.dirname, self.subset, lambda path: _find_file(path) is not None)
        file = _find_file(folder)
        if file is None:
            raise FileNotFoundError(f"Dataset URI {self.uri!r}: {folder!r} has no {_NAME} of CVAT.")
        return file, ""

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the file or the subset do not exist."""
        self._source()

    def folder(self) -> str:
        """Return the folder of labels.txt, that of the annotation file."""
        return os.path.dirname(self._source()[0])

    def evaluator_type(self) -> str:
        """Return the type of the evaluator, which depends on the shapes."""
        return "rotated_coco" if self._makes_rotated_boxes(self._root()) else "coco"

    def find_classes(self) -> list[str]:
        """Return the labels of the task, or without these the sorted labels of all shapes."""
        root = self._root()
        shapes = (shape for image in root.iter("image") for shape in image if shape.tag in _AREAS)
        return _task_labels(root) or sorted({shape.get("label", "").strip() for shape in shapes} - {""})

    def read(self, classes: list[str]) -> RawSet:
        """Read the images of the subset."""
        file, subset = self._source()
        root = self._root()
        images = [image for image in root.iter("image") if subset in ("", image.get("subset"))]
        return _read_images(file, images, classes or _task_labels(root), self._makes_rotated_boxes(root))

    def _root(self) -> ElementTree.Element:
        file, _ = self._source()
        root = parse_xml(file)
        if root.tag != "annotations":
            raise ValueError(f"Annotation file {file!r} is not CVAT's: its root is <{root.tag[:100]}>.")
        if root.find("track") is not None and root.find("image") is None:
            raise ValueError(
                f"Annotation file {file!r} is in the format 'CVAT for video', which has no images. Export "
                "the task as 'CVAT for images 1.1', or as 'COCO 1.0'."
            )
        return root

    def _makes_rotated_boxes(self, root: ElementTree.Element) -> bool:
        """Return whether all objects get rotated boxes: some are rotated, and none has a polygon or mask."""
        if self.values["boxes"] != "rotated":
            return False
        shapes = [shape for image in root.iter("image") for shape in image if shape.tag in _AREAS]
        return all(shape.tag == "box" for shape in shapes) and any(
            shape.get("rotation", "0") not in ("0", "0.0", "0.00") for shape in shapes
        )


def _find_file(folder: str) -> str | None:
    path = os.path.join(folder, _NAME)
    return path if PathManager.isfile(path) and claims_file(path) else None


def claims_file(path: str) -> bool:
    """Return whether a file is CVAT's, by its first bytes."""
    if not path.endswith(".xml"):
        return False
    with PathManager.open(path, "rb") as file:
        return b"<annotations>" in file.read(4096)


def _subsets(file: str) -> list[str]:
    with PathManager.open(file, "rb") as opened:
        found = re.findall(rb'<image\b[^>]*\bsubset="([^"<>]*)"', opened.read())
    return [*dict.fromkeys(name.decode("utf-8", "replace") for name in found)]


def _task_labels(root: ElementTree.Element) -> list[str]:
    """Return the names of the labels in the file, without those of a skeleton's points."""
    labels = root.iterfind("meta/*/labels/label")
    names = (label.findtext("name", "").strip() for label in labels if label.find("parent") is None)
    return [*dict.fromkeys(name for name in names if name)]


def _read_images(
    file: str, images: list[ElementTree.Element], classes: list[str], as_rotated: bool
) -> RawSet:
    builder = RawSetBuilder(file)
    finders: dict[str, ImageFinder] = {}
    for element in images:
        name, subset = element.get("name", ""), element.get("subset", "")
        where = {"image": name, "action": "image dropped"}
        try:
            size = int(element.get("width", "")), int(element.get("height", ""))
        except ValueError:
            size = (0, 0)
        if not name or not all(0 < side <= MAX_SIDE for side in size):
            detail = f"name {name!r}, width {element.get('width')!r}, height {element.get('height')!r}"
            builder.raw.report("image-broken", f"an image has the {detail}"[:300], **where)
            continue
        if subset not in finders:
            folders = ("images", f"images/{subset}", "", subset) if subset else ("images", "")
            finders[subset] = ImageFinder(os.path.dirname(file), folders)
        path = finders[subset].find(name)
        if path is None:
            builder.raw.report("missing-image", f"{name} is not in {finders[subset].root}/images", **where)
            continue
        image = builder.add_image(os.path.splitext(name)[0], path, size)
        for number, shape in enumerate((s for s in element if s.tag in _SHAPES), start=1):
            label = shape.get("label", "").strip()
            location = f"{name}, {shape.tag} {number} ({label or 'no label'})"
            try:
                if not label:
                    raise ShapeError("annotation-broken", "has no label")
                found = DrawnObject(label, location)
                _add_shape(found, shape, as_rotated)
                builder.add_object(image, found, location)
            except ShapeError as error:
                detail = f"the shape {error}"
                builder.raw.report(
                    error.kind, detail, image=name, annotation=location, action="shape dropped"
                )
    return builder.finish(classes)


def _add_shape(found: DrawnObject, shape: ElementTree.Element, as_rotated: bool) -> None:
    if shape.tag in _NO_AREA:
        raise ShapeError("shape-without-area", _NO_AREA[shape.tag])
    if shape.tag == "polygon":
        found.add_polygon(_point_list(shape.get("points", "")))
    elif shape.tag == "box":
        x0, y0, x1, y1 = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
        (rotation,) = _numbers(shape, "rotation") if shape.get("rotation") else (0.0,)
        box = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, -rotation)  # CVAT turns clockwise
        if as_rotated:
            found.rotated_box = normalize_angle(box)
        elif rotation:
            found.add_polygon(corners(box))
        else:
            found.add_box([(x0, y0), (x1, y1)])
    elif shape.tag == "ellipse":
        x, y, a, b = _numbers(shape, "cx", "cy", "rx", "ry")
        (rotation,) = _numbers(shape, "rotation") if shape.get("rotation") else (0.0,)
        found.add_ellipse((x, y), (a, b), math.radians(rotation))
    elif shape.tag == "cuboid":
        keys = [
            f"{axis}{corner}{face}" for face in "12" for corner in ("tl", "bl", "tr", "br") for axis in "xy"
        ]
        values = _numbers(shape, *keys)
        found.add_box([*zip(values[0::2], values[1::2])])
    else:
        found.add_mask(*_mask(shape))


def _numbers(shape: ElementTree.Element, *keys: str) -> list[float]:
    try:
        values = [float(shape.get(key, "")) for key in keys]
    except ValueError:
        values = [math.nan]
    if not all(abs(value) <= MAX_COORDINATE for value in values):
        shown = {key: shape.get(key) for key in keys}
        raise ShapeError("bad-shape", f"needs numbers up to {MAX_COORDINATE}, not {shown}"[:300])
    return values


def _point_list(text: str) -> list[tuple[float, ...]]:
    try:
        return [tuple(float(value) for value in pair.split(",")) for pair in text.split(";") if pair.strip()]
    except ValueError as error:
        raise ShapeError("bad-shape", f"has the points {text[:100]!r}, not x,y;x,y;...") from error


def _mask(shape: ElementTree.Element) -> tuple[int, int, np.ndarray]:
    """Return the corner and the pixels of a mask, whose runs go row by row through its box."""
    try:
        x, y, width, height = (int(shape.get(key, "")) for key in ("left", "top", "width", "height"))
        runs = np.array([int(run) for run in shape.get("rle", "").split(",")], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ShapeError("bad-shape", f"is a mask whose numbers cannot be read: {error}"[:300]) from error
    if width <= 0 or height <= 0 or width * height > MAX_PIXELS or abs(x) + abs(y) > MAX_COORDINATE:
        raise ShapeError("bad-shape", f"is a mask of {width} x {height} pixels at ({x}, {y})")
    if (runs < 0).any() or (runs > width * height).any() or int(runs.sum()) != width * height:
        raise ShapeError("bad-shape", f"is a mask whose runs do not add up to {width} x {height} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return x, y, np.repeat(values, runs).reshape(height, width)


def find_cvat(path: str) -> list[Candidate]:
    """Find annotations.xml in a folder itself, with its subsets, or one in each of its folders."""
    file = _find_file(path)
    if file is not None:
        subsets = [name for name in _subsets(file) if name and name != "default"]
        if len(subsets) > 1:
            return [
                Candidate(f"cvat:{path}@{name}", name.lower(), f"found subset {name} in {_NAME} of CVAT")
                for name in subsets
            ]
        return [Candidate(f"cvat:{path}", "all", f"found {_NAME} of CVAT")]
    return [
        Candidate(f"cvat:{path}@{name}", name, f"found {name}/{_NAME} of CVAT")
        for name in subfolders(path)
        if _find_file(os.path.join(path, name)) is not None
    ]


register_format(
    Format(
        name="cvat",
        summary='XML of "CVAT for images": boxes, rotated boxes, polygons, ellipses, masks. `SUBSET` is one '
        "of the file or a folder in `DIR`; `cvat:DIR` and `cvat:FILE.xml` read all images",
        uri_class=CvatURI,
        find=find_cvat,
        uri_of_file=lambda path: f"cvat:{path}" if claims_file(path) else None,
        layout="annotations.xml of CVAT, here or in a split's folder, with images/",
        claims=claims_file,
    )
)
