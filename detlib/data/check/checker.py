"""The passes over a dataset that find its faults and build the repaired dataset."""

from __future__ import annotations

import copy
import io
import os
import struct
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from detlib.data.catalog import DatasetCatalog, MetadataCatalog, parse_dataset_uri
from detlib.data.check.annotation_checks import (
    check_box,
    check_keypoints,
    check_segmentation,
    is_number,
    states_center,
)
from detlib.data.datasets.file_values import MAX_COORDINATE, is_id, is_side
from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.datasets.keypoint_names import check_keypoint_names
from detlib.data.formats.base import FORMATS, ParsedURI
from detlib.data.formats.findings import Finding, RawSet, raw_from_records
from detlib.data.image_io import stored_size, to_8_bits, upright_size
from detlib.utils.file_io import PathManager

__all__ = ["Checked", "check_dataset", "read_raw"]

_DROP_IMAGE = "image dropped"
_DROP = "annotation dropped"
_MIN_CENTER_BOXES = 3  # fewer may be wrong by chance
_PROGRESS_SECONDS = 5.0  # between two lines of progress


@dataclass
class Checked:
    """The result of checking a dataset.

    Attributes:
        file: the annotation file or folder.
        image_root: folder that the file names are relative to.
        findings: all faults, in the order of the data.
        repaired: the content of a COCO annotation file, with faults repaired where possible and the rest left
            out.
        num_images: number of images, valid or not.
        num_annotations: number of annotations, valid or not.
        note: how the dataset was identified; may be empty.
    """

    file: str
    image_root: str
    findings: list[Finding]
    repaired: dict[str, Any] = field(default_factory=dict)
    num_images: int = 0
    num_annotations: int = 0
    note: str = ""

    @property
    def num_errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)


def check_dataset(name: str, *, images: bool = True) -> Checked:
    """Read an entire dataset and report all its faults.

    Args:
        name: a dataset URI or a registered name.
        images: whether to read the image files too, and not only their annotations.

    Raises:
        KeyError: The name is unknown.
        FileNotFoundError, ValueError: The dataset URI is malformed, or the dataset does not exist.
    """
    return _Checker(read_raw(name)).run(images)


def read_raw(name: str) -> RawSet:
    """Read a dataset without checking it; raises as `check_dataset` does."""
    if name not in DatasetCatalog:
        uri = parse_dataset_uri(name)
        return uri.read_raw() if isinstance(uri, ParsedURI) else raw_from_records(name)
    metadata = MetadataCatalog.get(name)
    for read_registered in (f.read_registered for f in FORMATS.values() if f.read_registered is not None):
        raw = read_registered(metadata)
        if raw is not None:
            return raw
    return raw_from_records(name)


@dataclass(frozen=True)
class _ImageFile:
    """The state of an image file.

    Attributes:
        fault: the kind of finding; empty for a valid image.
        detail: what was found.
        size: width and height after the EXIF rotation.
        stored_size: width and height before it.
        checksum: length and CRC-32 of the file.
    """

    fault: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    stored_size: tuple[int, int] = (0, 0)
    checksum: tuple[int, int] = (0, 0)


def _read_image_file(path: str) -> _ImageFile:
    try:
        with PathManager.open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError, ValueError):  # the last for a null character
        return _ImageFile("missing-image", f"{path!r} does not exist")
    except OSError as error:
        return _ImageFile("unreadable-image", f"{path}: {error}")
    checksum = (len(data), zlib.crc32(data))
    size = None
    try:
        image = Image.open(io.BytesIO(data))
        size, stored = upright_size(image), stored_size(image)
        image.load()
        to_8_bits(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        # Pillow raises any of these for a broken file. If it could read the header, the message says why.
        kind = "truncated-image" if size and "truncated" in str(error) else "unreadable-image"
        return _ImageFile(kind, f"{path}: {error}", checksum=checksum)
    except Image.DecompressionBombError as error:
        return _ImageFile("unreadable-image", f"{path}: {error}", checksum=checksum)
    return _ImageFile("", "", size, stored, checksum)


def _read_image_files(paths: Iterable[str], num_threads: int = 8) -> Iterator[_ImageFile]:
    """Yield the state of each file in order, and print the progress to stderr if this takes long."""
    paths = list(paths)
    last_printed = time.monotonic()
    with ThreadPoolExecutor(num_threads) as pool:
        for number, image_file in enumerate(pool.map(_read_image_file, paths), start=1):
            if time.monotonic() - last_printed > _PROGRESS_SECONDS:
                last_printed = time.monotonic()
                print(f"read {number} of {len(paths)} images", file=sys.stderr, flush=True)
            yield image_file


def _key(value: Any) -> Any:
    """Return a hashable value to look up an id by, whatever its type."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else repr(value)


def _is_integer_text(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19


def _from_center(annotation: Any) -> Any:
    """Return a copy of an annotation whose box, if it has one, states the corner instead of the center."""
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return annotation
    return {**annotation, "bbox": [box[0] - box[2] / 2, box[1] - box[3] / 2, *box[2:]]}


class _Checker:
    """The passes over one dataset. Each pass refers to what the earlier passes found valid."""

    def __init__(self, raw: RawSet) -> None:
        self.raw = raw
        self.images: dict[Any, dict] = {}
        self.categories: dict[Any, dict] = {}
        self.annotations: list[dict] = []
        # Images that the reader has a finding about: a missing size is not reported again.
        self.reported = {f.image for f in raw.findings if f.image and not f.annotation}
        self.all_images: set = set()  # valid or not: annotations of invalid images need no finding themselves

    def run(self, read_images: bool) -> Checked:
        """Run all passes."""
        images, categories = self._part("images"), self._part("categories")
        annotations = self._part("annotations")
        self._check_categories(categories)
        self._check_images(images)
        if read_images:
            self._check_image_files()
        self._check_sizes()
        self._check_annotations(annotations)
        self._check_together()
        content = {k: v for k, v in self.raw.content.items() if k not in ("images", "annotations")}
        repaired = {
            **content,
            "categories": [*self.categories.values()],
            "images": [*self.images.values()],
            "annotations": self.annotations,
        }
        raw = self.raw
        return Checked(
            raw.file, raw.image_root, raw.findings, repaired, len(images), len(annotations), raw.note
        )

    def _part(self, key: str) -> list:
        value = self.raw.content.get(key)
        if isinstance(value, list) and (value or key == "annotations"):
            return value
        if not any(finding.kind == "bad-file" and not finding.image for finding in self.raw.findings):
            fault = "empty" if value == [] else "missing or not a list"
            self.raw.report("missing-part", f"{key!r} is {fault}")
        return []

    def _check_categories(self, categories: list) -> None:
        names: dict[str, Any] = {}
        for category in categories:
            if isinstance(category, dict) and _is_integer_text(category.get("id")):
                detail = f"the id of {category.get('name')!r} is the text {category['id']!r}"
                self.raw.report("category-broken", detail, action="read as a number")
                category = {**category, "id": int(category["id"])}
            valid = isinstance(category, dict) and is_id(category.get("id"), (int,))
            if not valid or not isinstance(category.get("name"), str):
                self.raw.report("category-broken", f"{category!r}"[:200], action="category dropped")
                continue
            number, name = category["id"], category["name"]
            try:
                check_keypoint_names(category.get("keypoints") or [])
            except ValueError as error:
                self.raw.report(
                    "category-broken", f"{name!r}: {error}", action="keypoints of the category dropped"
                )
                category = {key: value for key, value in category.items() if key != "keypoints"}
            if number in self.categories:
                detail = f"id {number} is {self.categories[number]['name']!r} and {name!r}"
                self.raw.report("duplicate-category-id", detail, action=f"{name!r} dropped")
                continue
            if name in names:
                self.raw.report("duplicate-category-name", f"{name!r} has the ids {names[name]} and {number}")
            names[name] = number
            self.categories[number] = dict(category)

    def _check_images(self, images: list) -> None:
        files: dict[str, Any] = {}
        for number, image in enumerate(images):
            if not isinstance(image, dict) or image.get("id") is None or image.get("file_name") in (None, ""):
                detail = f"image number {number}: {image!r}"[:200]
                self.raw.report("image-broken", f"{detail} has no id or no file name", action=_DROP_IMAGE)
                continue
            name, key = str(image["file_name"]), _key(image["id"])
            if not isinstance(image["file_name"], str) or not is_id(image["id"]):
                detail = f"the id is {image['id']!r}, the file name {image['file_name']!r}"
                self.raw.report("image-wrong-type", detail, image=name, action=_DROP_IMAGE)
                self.all_images.add(key)
                continue
            if key in self.all_images:
                self.raw.report("duplicate-image-id", f"id {key!r}", image=name, action=_DROP_IMAGE)
                continue
            self.all_images.add(key)
            if name in files:
                self.raw.report("duplicate-file-name", f"ids {files[name]!r} and {key!r}", image=name)
            files[name] = key
            image = self.images[key] = dict(image)
            texts = [side for side in ("width", "height") if _is_integer_text(image.get(side))]
            if texts:
                detail = f"width and height are {image.get('width')!r} and {image.get('height')!r}"
                self.raw.report("image-wrong-type", detail, image=name, action="read as numbers")
                image.update({side: int(image[side]) for side in texts})
        if len({type(key) for key in self.images}) > 1:
            self.raw.report(
                "mixed-image-ids", "some are numbers, others strings", action="all ids turned into strings"
            )
            for image in self.images.values():
                image["id"] = str(image["id"])

    def _check_image_files(self) -> None:
        seen: dict[tuple, str] = {}
        root, images = self.raw.image_root, list(self.images.items())
        finder = ImageFinder(root)
        paths = (os.path.join(root, image["file_name"]) for _, image in images)
        for (key, image), image_file in zip(images, _read_image_files(paths)):
            name = image["file_name"]
            found = finder.find(name) if image_file.fault == "missing-image" else None
            if found is not None:
                image_file = _read_image_file(found)
                image["file_name"] = os.path.relpath(found, root)
                action = f"path changed to {image['file_name']!r}"
                self.raw.report("image-path", f"found as {found}", image=name, action=action)
                name = image["file_name"]
            if image_file.fault:
                self.raw.report(image_file.fault, image_file.detail, image=name, action=_DROP_IMAGE)
                del self.images[key]
                continue
            twin = seen.setdefault(image_file.checksum, name)
            if twin != name:
                self.raw.report("duplicate-image", f"the same content as {twin!r}", image=name)
            self._compare_size(key, image, image_file)

    def _compare_size(self, key: Any, image: dict, image_file: _ImageFile) -> None:
        """Compare the stated size with that of the image file, which is right."""
        stated: tuple[Any, Any] = image.get("width"), image.get("height")
        size = image_file.size
        if stated == size:
            return
        if None not in stated and all(is_number(number) and number > 0 for number in stated):
            rotated = size != image_file.stored_size and stated == image_file.stored_size
            hint = " (width and height swapped?)" if stated == size[::-1] and not rotated else ""
            self.raw.report(
                "size-mismatch-exif" if rotated else "size-mismatch",
                f"the annotation states {stated[0]} x {stated[1]}, the image is {size[0]} x {size[1]}{hint}",
                image=image["file_name"],
                action=_DROP_IMAGE if rotated else "size of the image file used",
            )
            if rotated:  # boxes drawn before the rotation are not where the objects are
                del self.images[key]
                return
        else:
            self._report_size(image, "size of the image file used")
        image["width"], image["height"] = size

    def _report_size(self, image: dict, action: str) -> None:
        """Report a width or height that is missing or invalid."""
        stated: list[Any] = [image.get("width"), image.get("height")]
        name = image["file_name"]
        detail = f"width and height are {stated[0]!r} and {stated[1]!r}"
        if None in stated:
            if self.raw.states_sizes and name not in self.reported:
                self.raw.report("image-broken", detail, image=name, action=action)
        elif not all(is_number(number) and (number <= 0 or is_side(number)) for number in stated):
            self.raw.report("image-wrong-type", detail, image=name, action=action)
        else:
            self.raw.report("image-size-not-positive", detail, image=name, action=action)

    def _check_sizes(self) -> None:
        """Drop images whose size is still invalid, as no image file was read."""
        for key, image in list(self.images.items()):
            stated: tuple[Any, Any] = image.get("width"), image.get("height")
            if all(map(is_side, stated)):
                image["width"], image["height"] = map(int, stated)
            else:
                self._report_size(image, _DROP_IMAGE)
                del self.images[key]

    def _check_annotations(self, annotations: list) -> None:
        annotations = self._move_center_boxes(annotations)
        ids: set = set()
        used: set = set()
        boxes: dict[tuple, str] = {}
        for number, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                detail = f"annotation number {number} is a {type(annotation).__name__}"
                self.raw.report("annotation-broken", detail, action=_DROP)
                continue
            used.add(_key(annotation.get("category_id")))
            shown_id = annotation.get("id", f"number {number}")
            location = self.raw.locations.get(number, f"annotation {shown_id!r}")
            repaired = self._check_annotation(copy.copy(annotation), location, ids, boxes)
            if repaired is not None:
                self.annotations.append(repaired)
        for key, category in self.categories.items():
            if key not in used:
                self.raw.report("unused-category", f"{category['name']!r} (id {key})")

    def _check_annotation(self, annotation: dict, location: str, ids: set, boxes: dict) -> dict | None:
        """Return the repaired annotation, or None if it is dropped."""
        image_key = self._known_key(annotation.get("image_id"), self.all_images)
        category_key = self._known_key(annotation.get("category_id"), self.categories)
        image, category = self.images.get(image_key), self.categories.get(category_key)
        name = image["file_name"] if image else ""

        def report(kind: str, detail: str, action: str = "") -> None:
            self.raw.report(kind, detail, image=name, annotation=location, action=action)

        for key, found, kind in (
            ("image_id", image_key, "unknown-image"),
            ("category_id", category_key, "unknown-category"),
        ):
            if found != _key(annotation.get(key)):
                report(kind, f"{key} is {annotation[key]!r}, listed is {found!r}", f"{found!r} used")
                annotation[key] = found
        missing = [key for key in ("image_id", "category_id") if annotation.get(key) is None]
        if missing:
            report("annotation-broken", f"there is no {' and no '.join(map(repr, missing))}", _DROP)
            return None
        if image is None:
            if image_key not in self.all_images:
                report("unknown-image", f"image id {annotation['image_id']!r} is not listed", _DROP)
            return None
        if category is None:
            report("unknown-category", f"category {annotation['category_id']!r} is not listed", _DROP)
            return None
        self._check_id(annotation, ids, report)
        self._check_crowd(annotation, report)
        size = image["width"], image["height"]
        repaired = check_box(annotation, size, report)
        repaired = repaired and check_segmentation(repaired, size, report)
        names = category.get("keypoints")
        wanted = len(names) if isinstance(names, list) else None
        repaired = repaired and check_keypoints(repaired, size, wanted, report)
        if not repaired:
            return None
        repaired["image_id"] = image["id"]
        self._check_area(repaired, report)
        same = (image_key, category_key, *repaired["bbox"])
        if same in boxes:
            report("duplicate-annotation", f"the same as {boxes[same]}", _DROP)
            return None
        boxes[same] = location
        return repaired

    def _move_center_boxes(self, annotations: list) -> list:
        """Report boxes that state their center, if most boxes with polygons do, and return them mended."""
        found = [states_center(annotation) for annotation in annotations]
        count, total = found.count(True), len(found) - found.count(None)
        if count < _MIN_CENTER_BOXES or count < 0.8 * total:
            return annotations
        self.raw.report(
            "center-boxes",
            f"{count} of {total} boxes fit their polygons only if their first two numbers are the center",
            action="all boxes moved by half of their size",
        )
        return [_from_center(annotation) for annotation in annotations]

    def _known_key(self, value: Any, known: Container) -> Any:
        """Return the key of an id. If it is not known, but is as a text or as a number, return that."""
        key = _key(value)
        if key in known:
            return key
        other = int(value) if _is_integer_text(value) else str(value) if type(value) is int else key
        return other if other in known else key

    def _check_id(self, annotation: dict, ids: set, report: Any) -> None:
        key = _key(annotation.get("id"))
        if annotation.get("id") is None or key in ids:
            fresh = len(ids) + 1
            while fresh in ids:
                fresh += 1
            if annotation.get("id") is not None:
                report("duplicate-annotation-id", f"id {key!r}", f"id {fresh} used instead")
            annotation["id"] = key = fresh
        ids.add(key)

    def _check_crowd(self, annotation: dict, report: Any) -> None:
        crowd = annotation.setdefault("iscrowd", 0)
        if crowd not in (0, 1):
            annotation["iscrowd"] = int(crowd is not None and crowd not in ("0", "", "false", "False"))
            report("bad-iscrowd", f"iscrowd is {crowd!r}", f"set to {annotation['iscrowd']}")

    def _check_area(self, annotation: dict, report: Any) -> None:
        box_area = annotation["bbox"][2] * annotation["bbox"][3]
        area = annotation.setdefault("area", box_area)
        if not is_number(area) or not 0 < area <= MAX_COORDINATE**2:
            report("bad-area", f"the area is {area!r}", "set to the area of the box")
            annotation["area"] = box_area

    def _check_crowd_regions(self) -> None:
        """Report crowd regions, which are not trained on, if they are many. If all are, make them objects."""
        totals = Counter(_key(annotation["category_id"]) for annotation in self.annotations)
        crowds = Counter(_key(a["category_id"]) for a in self.annotations if a["iscrowd"])
        if self.annotations and crowds == totals:
            self.raw.report(
                "all-crowd",
                f"all {len(self.annotations)} objects have iscrowd 1; ?crowd=objects reads them as objects",
                action="iscrowd set to 0",
            )
            for annotation in self.annotations:
                annotation["iscrowd"] = 0
            return
        for key, count in crowds.items():
            if count > 0.2 * totals[key]:
                name = self.categories[key]["name"]
                detail = f"{count} of {totals[key]} objects of {name!r} have iscrowd 1"
                self.raw.report("mostly-crowd", detail)

    def _check_together(self) -> None:
        """Check what concerns all annotations of an image."""
        by_image: defaultdict[Any, list[dict]] = defaultdict(list)
        for annotation in self.annotations:
            by_image[_key(annotation["image_id"])].append(annotation)
        self._check_crowd_regions()
        for image in self.images.values():
            objects, name = by_image[_key(image["id"])], image["file_name"]
            if not objects:
                self.raw.report("empty-image", "the image has no objects", image=name)
            for kind, key in (("mixed-masks", "segmentation"), ("mixed-keypoints", "keypoints")):
                having = Counter(bool(annotation.get(key)) for annotation in objects)
                if len(having) > 1:
                    detail = f"{having[True]} of {len(objects)} objects have {key}"
                    self.raw.report(kind, detail, image=name)
