"""Going through a whole data set: finding all that is wrong, and building what remains of it repaired."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from detlib.data.datasets.keypoint_names import check_keypoint_names

from .kinds import Finding
from .pictures import Picture, read_pictures
from .raw import RawSet, read_raw
from .shapes import check_box, check_keypoints, check_segmentation, is_number

__all__ = ["Checked", "check_dataset", "check_raw"]

_DROP_IMAGE = "image dropped"
_DROP = "annotation dropped"


@dataclass
class Checked:
    """What came of checking a data set.

    Attributes:
        file: the annotation file or folder.
        image_root: folder that the file names are relative to.
        findings: all that is wrong, in the order of the data.
        repaired: the content of a COCO annotation file, with what could be mended mended and the rest left
            out.
        num_images, num_annotations: how many there were, good or not.
    """

    file: str
    image_root: str
    findings: list[Finding]
    repaired: dict[str, Any] = field(default_factory=dict)
    num_images: int = 0
    num_annotations: int = 0

    @property
    def num_errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)


def check_dataset(name: str, *, pictures: bool = True) -> Checked:
    """Reads all of a data set and reports all that is wrong with it.

    Args:
        name: an address, or a registered name.
        pictures: read the pictures too; without, only their annotations are looked at.

    Raises:
        KeyError: the name is not known.
        FileNotFoundError, ValueError: the address is malformed, or leads nowhere.
    """
    return check_raw(read_raw(name), pictures=pictures)


def check_raw(raw: RawSet, *, pictures: bool = True) -> Checked:
    """`check_dataset` for what was read before."""
    return _Checker(raw).run(pictures)


def _key(value: Any) -> Any:
    """A value to look an id up by, whatever type it has."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else repr(value)


class _Checker:
    """The passes over one data set; what each finds good is what the next ones refer to."""

    def __init__(self, raw: RawSet) -> None:
        self.raw = raw
        self.images: dict[Any, dict] = {}
        self.categories: dict[Any, dict] = {}
        self.annotations: list[dict] = []
        # Images of which it was said already that the annotation file has no size.
        kinds = ("image-without-size", "missing-annotation-file", "bad-file")
        self.told = {finding.image for finding in raw.findings if finding.kind in kinds}
        self.all_images: set = set()  # good or not: annotations of bad ones need no finding of their own

    def run(self, pictures: bool) -> Checked:
        images, categories = self._part("images"), self._part("categories")
        annotations = self._part("annotations")
        self._check_categories(categories)
        self._check_images(images)
        if pictures:
            self._check_pictures()
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
        return Checked(raw.file, raw.image_root, raw.findings, repaired, len(images), len(annotations))

    def _part(self, key: str) -> list:
        value = self.raw.content.get(key)
        if isinstance(value, list) and (value or key == "annotations"):
            return value
        if not any(finding.kind == "bad-file" and not finding.image for finding in self.raw.findings):
            self.raw.report("missing-part", f"{key!r} is {'empty' if value == [] else 'missing or no list'}")
        return []

    def _check_categories(self, categories: list) -> None:
        names: dict[str, Any] = {}
        for category in categories:
            good = isinstance(category, dict) and type(category.get("id")) is int
            if not good or not isinstance(category.get("name"), str):
                self.raw.report("category-broken", f"{category!r}"[:200], action="category dropped")
                continue
            number, name = category["id"], category["name"]
            try:
                check_keypoint_names(category.get("keypoints") or [])
            except ValueError as error:
                self.raw.report("category-broken", f"{name!r}: {error}", action="its keypoints dropped")
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
            id_is_good = isinstance(image["id"], int | str) and not isinstance(image["id"], bool)
            if not isinstance(image["file_name"], str) or not id_is_good:
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
            self.images[key] = dict(image)
        if len({type(key) for key in self.images}) > 1:
            self.raw.report("mixed-image-ids", "numbers and strings", action="strings throughout")
            for image in self.images.values():
                image["id"] = str(image["id"])

    def _check_pictures(self) -> None:
        seen: dict[tuple, str] = {}
        root, images = self.raw.image_root, list(self.images.items())
        paths = (os.path.join(root, image["file_name"]) for _, image in images)
        for (key, image), picture in zip(images, read_pictures(paths)):
            name = image["file_name"]
            if picture.fault:
                self.raw.report(picture.fault, picture.detail, image=name, action=_DROP_IMAGE)
                del self.images[key]
                continue
            twin = seen.setdefault(picture.checksum, name)
            if twin != name:
                self.raw.report("duplicate-picture", f"the same content as {twin!r}", image=name)
            self._compare_size(key, image, picture)

    def _compare_size(self, key: Any, image: dict, picture: Picture) -> None:
        """Compares what the annotation says with the picture; the picture is right."""
        said = image.get("width"), image.get("height")
        if said == picture.size:
            return
        if None not in said and all(is_number(number) and number > 0 for number in said):
            turned = picture.size != picture.stored_size and said == picture.stored_size
            hint = " (width and height swapped?)" if said == picture.size[::-1] and not turned else ""
            detail = f"the annotation says {said[0]} x {said[1]}, the picture is {picture.size[0]} x "
            kind = "size-mismatch-exif" if turned else "size-mismatch"
            # Boxes that were drawn on a turned picture are not where the objects are.
            action = _DROP_IMAGE if turned else "the picture's size taken"
            detail = f"{detail}{picture.size[1]}{hint}"
            self.raw.report(kind, detail, image=image["file_name"], action=action)
            if turned:
                del self.images[key]
                return
        else:
            self._report_size(image, "the picture's size taken")
        image["width"], image["height"] = picture.size

    def _report_size(self, image: dict, action: str) -> None:
        """Reports a width or height that is missing, or is none."""
        said = [image.get("width"), image.get("height")]
        name = image["file_name"]
        detail = f"width and height are {said[0]!r} and {said[1]!r}"
        if None in said:
            if name not in self.told and not self._sizes_come_from_pictures():
                self.raw.report("image-broken", detail, image=name, action=action)
        elif not all(is_number(number) and float(number).is_integer() for number in said):
            self.raw.report("image-wrong-type", detail, image=name, action=action)
        else:
            self.raw.report("image-size-not-positive", detail, image=name, action=action)

    def _sizes_come_from_pictures(self) -> bool:
        """Whether the format has no place for sizes."""
        return self.raw.file.endswith((".yaml", ".yml"))

    def _check_sizes(self) -> None:
        """Drops images whose size is bad still, as no picture told it."""
        for key, image in list(self.images.items()):
            said = image.get("width"), image.get("height")
            if all(is_number(number) and float(number).is_integer() and number > 0 for number in said):
                image["width"], image["height"] = map(int, said)
            else:
                self._report_size(image, _DROP_IMAGE)
                del self.images[key]

    def _check_annotations(self, annotations: list) -> None:
        ids: set = set()
        used: set = set()
        boxes: dict[tuple, str] = {}
        for number, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                detail = f"annotation number {number} is a {type(annotation).__name__}"
                self.raw.report("annotation-broken", detail, action=_DROP)
                continue
            used.add(_key(annotation.get("category_id")))
            place = self.raw.places.get(number, f"annotation {annotation.get('id', f'number {number}')!r}")
            good = self._check_annotation(copy.copy(annotation), place, ids, boxes)
            if good is not None:
                self.annotations.append(good)
        for key, category in self.categories.items():
            if key not in used:
                self.raw.report("unused-category", f"{category['name']!r} (id {key})")

    def _check_annotation(self, annotation: dict, place: str, ids: set, boxes: dict) -> dict | None:
        """Returns the annotation mended, or None if it is to be dropped."""
        image_key, category_key = _key(annotation.get("image_id")), _key(annotation.get("category_id"))
        image, category = self.images.get(image_key), self.categories.get(category_key)
        name = image["file_name"] if image else ""

        def report(kind: str, detail: str, action: str = "") -> None:
            self.raw.report(kind, detail, image=name, annotation=place, action=action)

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
        good = check_box(annotation, size, report)
        good = good and check_segmentation(good, size, report)
        names = category.get("keypoints")
        wanted = len(names) if isinstance(names, list) else None
        good = good and check_keypoints(good, size, wanted, report)
        if not good:
            return None
        good["image_id"] = image["id"]
        self._check_area(good, report)
        same = (image_key, category_key, *good["bbox"])
        if same in boxes:
            report("duplicate-annotation", f"the same as {boxes[same]}", _DROP)
            return None
        boxes[same] = place
        return good

    def _check_id(self, annotation: dict, ids: set, report: Any) -> None:
        key = _key(annotation.get("id"))
        if annotation.get("id") is None or key in ids:
            fresh = len(ids) + 1
            while fresh in ids:
                fresh += 1
            if annotation.get("id") is not None:
                report("duplicate-annotation-id", f"id {key!r}", f"id {fresh} instead")
            annotation["id"] = key = fresh
        ids.add(key)

    def _check_crowd(self, annotation: dict, report: Any) -> None:
        crowd = annotation.setdefault("iscrowd", 0)
        if crowd not in (0, 1):
            annotation["iscrowd"] = int(crowd is not None and crowd not in ("0", "", "false", "False"))
            report("bad-iscrowd", f"it is {crowd!r}", f"{annotation['iscrowd']} instead")

    def _check_area(self, annotation: dict, report: Any) -> None:
        box_area = annotation["bbox"][2] * annotation["bbox"][3]
        area = annotation.setdefault("area", box_area)
        if not is_number(area) or not math.isfinite(area) or area <= 0:
            report("bad-area", f"it is {area!r}", "the box's instead")
            annotation["area"] = box_area

    def _check_together(self) -> None:
        """What concerns all annotations of a picture."""
        of_image: defaultdict[Any, list[dict]] = defaultdict(list)
        for annotation in self.annotations:
            of_image[_key(annotation["image_id"])].append(annotation)
        for image in self.images.values():
            mine, name = of_image[_key(image["id"])], image["file_name"]
            if not mine:
                self.raw.report("empty-image", "it has no objects", image=name)
            for kind, key in (("mixed-masks", "segmentation"), ("mixed-keypoints", "keypoints")):
                having = Counter(bool(annotation.get(key)) for annotation in mine)
                if len(having) > 1:
                    detail = f"{having[True]} of {len(mine)} objects have {key}"
                    self.raw.report(kind, detail, image=name)
