"""The JSON files of the VGG Image Annotator, VIA 1 and 2 (https://www.robots.ox.ac.uk/~vgg/software/via/).

A file maps a key to each image: `filename`, `size` (in bytes) and `regions`, a list, or a dict by number. A
project file has this table under `_via_img_metadata`. A region has `shape_attributes` (its shape, in pixels)
and `region_attributes` (names and values that the user chose, one of which is the class). What the shapes
become:

polygon                 a polygon; the box is its extent
rect                    a box
circle, ellipse         a polygon of 64 points
point, polyline, line   left out with a warning: they have no area
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from detlib.data.datasets.file_values import MAX_FILE_BYTES, read_json
from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, URIOption, register_format
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import (
    DrawnObject,
    DrawnURI,
    RawSetBuilder,
    ShapeError,
    find_image,
    find_split_folder,
    subfolders,
)
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["ViaURI", "read_raw_via"]

logger = logging.getLogger(__name__)

_WITHOUT_AREA = ("point", "polyline", "line")
# The class of all objects of a dataset whose regions have no attribute.
_ONLY_CLASS = "object"
# Names that people give to the attribute of the class, if there are several attributes.
_USUAL_NAMES = ("class", "label", "category", "name", "type")


class ViaURI(DrawnURI):
    """`via:DIR`, `via:DIR@SPLIT` or `via:FILE.json`.

    A split is a folder in DIR with a JSON file and the images, or the images in its folder `images`. The
    classes are the lines of DIR/labels.txt. Without that file they are the sorted values of the class
    attribute in all files in DIR, so that all splits agree on them.
    """

    form = "via:DIR@SPLIT"
    options = (
        URIOption(
            "attribute",
            "the region attribute that holds the class; by default the only one, or the one named `class`, "
            "`label`, `category`, `name` or `type`",
        ),
        EMPTY_BOXES,
    )

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.split = self.split_body_with_optional_split()

    def _files(self, all_splits: bool = False) -> list[str]:
        """Return the annotation files of the split, or of all splits."""
        if PathManager.isfile(self.dirname) and not self.split:
            return [self.dirname]
        folder = find_split_folder(self, self.dirname, "" if all_splits else self.split, _has_via_file)
        files = [*_via_files(folder)]
        if not files or all_splits:
            files += [file for name in subfolders(folder) for file in _via_files(os.path.join(folder, name))]
        if not files:
            raise FileNotFoundError(f"Dataset URI {self.uri!r}: {folder!r} has no JSON file of VIA.")
        return files

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the split or its files do not exist."""
        self._files()

    def folder(self) -> str:
        """Return the folder of labels.txt."""
        return os.path.dirname(self.dirname) if PathManager.isfile(self.dirname) else self.dirname

    def find_classes(self) -> list[str]:
        """Return the sorted values of the class attribute in all files in DIR."""
        tables = self._tables(all_splits=True)
        attribute = self._attribute(tables)
        names = {_label(region, attribute) for table in tables.values() for region in _all_regions(table)}
        return sorted(names - {""})

    def _tables(self, all_splits: bool = False) -> dict[str, dict[str, dict]]:
        return {file: read_via_file(file) for file in self._files(all_splits)}

    def _attribute(self, tables: dict[str, dict[str, dict]]) -> str:
        """Return the attribute that holds the class; "" if no region has any attribute."""
        regions = (region for table in tables.values() for region in _all_regions(table))
        counts = Counter(name for region in regions for name in _attributes(region))
        wanted = self.values.get("attribute")
        if wanted:
            if wanted not in counts:
                raise self.error(
                    f"no region has the attribute {wanted!r}, only {', '.join(map(repr, counts)) or 'none'}."
                    f"{suggest(wanted, counts)}"
                )
            return wanted
        usual = [name for name in counts if str(name).lower() in _USUAL_NAMES]
        if len(counts) > 1 and len(usual) != 1:
            first = next(iter(counts))
            raise self.error(
                f"the regions have the attributes {', '.join(map(repr, counts))}; specify which one "
                f"holds the class, for example ?attribute={first}."
            )
        return str((usual or [*counts] or [""])[0])

    def read(self, classes: list[str]) -> RawSet:
        """Read the split; the class attribute is that of all splits."""
        attribute = self._attribute(self._tables(all_splits=True))
        return read_raw_via(self._tables(), attribute, classes)


def read_via_file(file: str) -> dict[str, dict]:
    """Return the table of images in a JSON file, of a project or of an export.

    Raises:
        ValueError: The file is not JSON, or is not VIA's.
    """
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    table = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("filename"), str) and "regions" in entry
        for entry in table.values()
    ):
        raise ValueError(
            f"Annotation file {file!r} is not VIA's: it must map keys to images with 'filename' and "
            "'regions'."
        )
    return table


def _regions(entry: dict) -> list[Any]:
    regions = entry["regions"]
    return [*regions.values()] if isinstance(regions, dict) else regions if isinstance(regions, list) else []


def _all_regions(table: dict[str, dict]) -> Iterator[Any]:
    for entry in table.values():
        yield from _regions(entry)


def _attributes(region: Any) -> dict:
    found = region.get("region_attributes") if isinstance(region, dict) else None
    return found if isinstance(found, dict) else {}


def _label(region: Any, attribute: str) -> str:
    """Return the class of a region; "" if it has none."""
    if not attribute:
        return _ONLY_CLASS
    value = _attributes(region).get(attribute)
    if isinstance(value, dict):  # a group of check boxes: {"name": true}
        chosen = [str(key) for key, marked in value.items() if marked]
        value = chosen[0] if len(chosen) == 1 else None
    return value.strip() if isinstance(value, str) else ""


def read_raw_via(tables: dict[str, dict[str, dict]], attribute: str, classes: list[str]) -> RawSet:
    """Read images and objects of annotation files.

    Args:
        tables: the tables of `read_via_file` by file.
        attribute: the region attribute that holds the class; empty if there is only one class.
        classes: the class names in order; empty to use the sorted labels of the objects.
    """
    files = [*tables]
    builder = RawSetBuilder(files[0] if len(files) == 1 else os.path.dirname(files[0]))
    builder.raw.states_sizes = False
    for file, table in tables.items():
        finder = ImageFinder(os.path.dirname(file))
        with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
            names = [entry["filename"] for entry in table.values()]
            images = list(pool.map(find_image, repeat(finder), names))
        for entry, (path, size, fault) in zip(table.values(), images):
            name = entry["filename"]
            if path is None or size is None:
                kind = "missing-image" if path is None else "unreadable-image"
                builder.raw.report(kind, fault, file=file, image=name, action="image dropped")
                continue
            image = builder.add_image(os.path.splitext(name)[0], path, size)
            _add_regions(builder, file, entry, image, attribute)
    return builder.finish(classes)


def _add_regions(builder: RawSetBuilder, file: str, entry: dict, image: dict, attribute: str) -> None:
    name = entry["filename"]
    if not isinstance(entry["regions"], dict | list):
        detail = f"'regions' is a {type(entry['regions']).__name__}"
        builder.raw.report("missing-part", detail, file=file, image=name, action="image without objects")
    for number, region in enumerate(_regions(entry), start=1):
        label = _label(region, attribute)
        location = f"{name}, region {number}" + (f" ({label})" if label else "")
        try:
            if not label:
                value = _attributes(region).get(attribute)
                detail = f"has no single class in {attribute!r}: {value!r}"
                raise ShapeError("annotation-broken", detail[:200])
            if not isinstance(region, dict):
                raise ShapeError("annotation-broken", f"is a {type(region).__name__}")
            found = DrawnObject(label, location)
            _add_shape(found, region.get("shape_attributes"))
            builder.add_object(image, found, location)
        except ShapeError as error:
            where = {"file": file, "image": name, "annotation": location, "action": "region dropped"}
            builder.raw.report(error.kind, f"the region {error}", **where)


def _add_shape(found: DrawnObject, shape: Any) -> None:
    kind = shape.get("name") if isinstance(shape, dict) else None
    if kind in _WITHOUT_AREA:
        raise ShapeError("shape-without-area", f"is a {kind}, which has no area")
    if kind == "polygon":
        x, y = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            raise ShapeError("bad-shape", "needs 'all_points_x' and 'all_points_y', lists of the same length")
        points = [*zip(x, y)]
        if len(points) > 3 and points[0] == points[-1]:
            points.pop()  # VIA 1 repeats the first point
        found.add_polygon(points)
    elif kind == "rect":
        x, y, width, height = (_number(shape, key) for key in ("x", "y", "width", "height"))
        found.add_box([(x, y), (x + width, y + height)])
    elif kind == "circle":
        radius = _number(shape, "r")
        found.add_ellipse((_number(shape, "cx"), _number(shape, "cy")), (radius, radius))
    elif kind == "ellipse":
        angle = _number(shape, "theta") if "theta" in shape else 0.0  # in radians, clockwise
        x, y, a, b = (_number(shape, key) for key in ("cx", "cy", "rx", "ry"))
        found.add_ellipse((x, y), (a, b), angle)
    else:
        raise ShapeError("bad-shape", f"has the unknown shape {kind!r}"[:200])


def _number(shape: dict, key: str) -> float:
    value = shape.get(key)
    if type(value) not in (int, float):
        raise ShapeError("bad-shape", f"is a {shape.get('name')} with {key} = {value!r}"[:200])
    return value  # type: ignore[return-value]


def claims_file(path: str) -> bool:
    """Return whether a file is VIA's, by its first bytes."""
    if not path.endswith(".json"):
        return False
    with PathManager.open(path, "rb") as file:
        head = file.read(4096)
    is_export = all(key in head for key in (b'"filename"', b'"size"', b'"regions"'))
    return is_export or b'"_via_settings"' in head or b'"_via_img_metadata"' in head


def _via_files(folder: str) -> Iterator[str]:
    for name in sorted(PathManager.ls(folder)):
        if name.endswith(".json") and claims_file(os.path.join(folder, name)):
            yield os.path.join(folder, name)


def _has_via_file(folder: str) -> bool:
    return next(_via_files(folder), None) is not None


def find_via(path: str) -> list[Candidate]:
    """Find the JSON files in a folder itself, and one split for each of its folders."""
    found = []
    files = [*_via_files(path)]
    for file in files:
        uri = f"via:{path}" if len(files) == 1 else f"via:{file}"
        split = "all" if len(files) == 1 else os.path.basename(file).removesuffix(".json")
        found.append(Candidate(uri, split, f"found {os.path.basename(file)} of VIA"))
    for name in subfolders(path):
        if _has_via_file(os.path.join(path, name)):
            found.append(Candidate(f"via:{path}@{name}", name, f"found a JSON file of VIA in {name}"))
    return found


register_format(
    Format(
        name="via",
        summary="JSON of the VGG Image Annotator: polygons, rectangles, circles, ellipses. `SPLIT` is a "
        "folder in `DIR`; `via:DIR` and `via:FILE.json` read the files there",
        uri_class=ViaURI,
        find=find_via,
        uri_of_file=lambda path: f"via:{path}" if claims_file(path) else None,
        layout="a JSON file of VIA (via_region_data.json, via_project.json), here or in a split's folder",
        claims=claims_file,
    )
)
