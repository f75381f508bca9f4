"""What the checker can find in a dataset, and a dataset as a lenient reader returns it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.structures import BoxMode

__all__ = ["FINDING_KINDS", "Finding", "RawSet", "raw_from_records", "split_common_folder"]

# Severity and meaning of each kind of finding. `register_format` adds the kinds of single formats.
# docs/data.md states what loaders do with each.
FINDING_KINDS: dict[str, tuple[str, str]] = {
    "bad-file": ("error", "the annotation file cannot be read, or is not in its format"),
    "missing-part": ("error", "the list of images, categories or annotations is missing or not a list"),
    "category-broken": (
        "error",
        "a category is not an object, or has no valid id or name",
    ),
    "duplicate-category-id": ("error", "two categories have the same id"),
    "duplicate-category-name": ("warning", "two categories have the same name"),
    "unused-category": ("warning", "no annotation has the category"),
    "image-broken": ("error", "an image is not an object, or has no id, file name or size"),
    "image-wrong-type": ("error", "an image's id, file name or size has a wrong type"),
    "image-size-not-positive": ("error", "an image's width or height is not above 0"),
    "image-without-size": ("warning", "the annotation file does not state the image's size"),
    "duplicate-image-id": ("error", "two images have the same id"),
    "mixed-image-ids": ("error", "some image ids are numbers, others strings"),
    "duplicate-file-name": ("warning", "two images have the same file"),
    "duplicate-image": ("warning", "two image files have the same content"),
    "image-path": (
        "warning",
        "an image does not exist under its path, which may be of another machine, but below the image folder",
    ),
    "missing-image": ("error", "the image file does not exist"),
    "unreadable-image": ("error", "the file cannot be read as an image"),
    "truncated-image": ("error", "the image file ends too early"),
    "size-mismatch": ("error", "the annotation states another size than the image has"),
    "size-mismatch-exif": ("error", "the annotation states the size before the image's EXIF rotation"),
    "empty-image": ("warning", "the image has no objects"),
    "annotation-broken": ("error", "an annotation is not an object, or has no image_id, category_id or bbox"),
    "unknown-image": ("error", "an annotation belongs to an image that is not listed"),
    "unknown-category": ("error", "an annotation's category is not listed"),
    "duplicate-annotation-id": ("error", "two annotations have the same id"),
    "duplicate-annotation": ("warning", "two annotations have the same image, category and box"),
    "bad-iscrowd": ("error", "iscrowd is neither 0 nor 1"),
    "all-crowd": ("error", "all objects are crowd regions (`iscrowd: 1`), which are not trained on"),
    "mostly-crowd": ("warning", "more than a fifth of a class's objects are crowd regions"),
    "bad-area": ("warning", "the area is not a number above 0"),
    "bad-box": ("error", "a box does not consist of 4 numbers (5 for a rotated box)"),
    "box-not-finite": ("error", "a box has a value that is not a finite number up to 10 million"),
    "box-no-area": ("error", "a box has no area"),
    "box-outside": ("error", "a box lies outside the image"),
    "box-sticks-out": ("warning", "a box extends beyond the image by more than a pixel"),
    "box-below-one-pixel": ("warning", "a box is less than a pixel wide or high"),
    "bad-label-line": ("error", "a label line has a wrong number of values, or one is not a number"),
    "not-normalized": ("error", "a label line's coordinates are not in 0..1"),
    "bad-shape": ("error", "a shape has an unknown type, or points or a mask that do not fit its type"),
    "shape-without-area": ("warning", "a shape is a point or a line, which has no area"),
    "bad-segmentation": ("error", "a segmentation is neither polygons nor an RLE mask"),
    "polygon-too-short": ("error", "a polygon has fewer than three points"),
    "polygon-odd": ("error", "a polygon has an odd number of values"),
    "polygon-not-finite": ("error", "a polygon has a value that is not a finite number up to 10 million"),
    "polygon-no-area": ("error", "a polygon has no area"),
    "polygon-sticks-out": ("warning", "a polygon extends beyond the image by more than a pixel"),
    "rle-broken": ("error", "an RLE mask's runs are malformed or do not fill its size"),
    "rle-wrong-size": ("error", "an RLE mask has another size than the image"),
    "rle-empty": ("warning", "an RLE mask has no pixel"),
    "mask-box-mismatch": ("warning", "a box differs much from the extent of its polygons"),
    "center-boxes": (
        "error",
        "the boxes of the dataset state their center, not their corner, as their polygons show",
    ),
    "mixed-masks": ("warning", "some objects of an image have masks, others have none"),
    "keypoint-length": ("error", "keypoints are not triples, or not as many as the category names"),
    "keypoint-not-finite": ("error", "a keypoint has a value that is not a finite number up to 10 million"),
    "keypoint-visibility": ("warning", "a keypoint's visibility is not 0, 1 or 2"),
    "keypoint-outside": ("warning", "a labeled keypoint lies outside the image"),
    "keypoint-count": ("warning", "num_keypoints is not the number of labeled keypoints"),
    "mixed-keypoints": ("warning", "some objects of an image have keypoints, others have none"),
}


@dataclass(frozen=True)
class Finding:
    """One fault in a dataset.

    Attributes:
        kind: a key of `FINDING_KINDS`.
        file: the annotation file.
        detail: what was found.
        image: file name of the image; empty if it concerns no single image.
        annotation: identifies the annotation or the line.
        action: what the repaired dataset has instead; empty if nothing changes.
    """

    kind: str
    file: str
    detail: str
    image: str = ""
    annotation: str = ""
    action: str = ""

    @property
    def severity(self) -> str:
        """Either "error" or "warning"."""
        return FINDING_KINDS[self.kind][0]

    @property
    def location(self) -> str:
        """File, image and annotation."""
        parts = [self.file, self.image and f"image {self.image!r}", self.annotation]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind}: {self.location}: {self.detail}"


@dataclass
class RawSet:
    """A dataset as it was found, in the structure of a COCO annotation file.

    Loaders refuse the first fault. A lenient reader goes on, keeps what is wrong in `content`, and adds what
    COCO's structure cannot express to `findings`.

    Attributes:
        file: the annotation file or folder, for the messages.
        image_root: folder that file names are relative to.
        content: what a COCO annotation file holds. Any of it may be malformed.
        findings: the faults found while reading.
        locations: for some annotations, by index in the list, what identifies them better than their id.
        states_sizes: whether the format states the size of an image.
        note: how the dataset was identified, for the user; may be empty.
    """

    file: str
    image_root: str
    content: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    locations: dict[int, str] = field(default_factory=dict)
    states_sizes: bool = True
    note: str = ""

    def report(self, kind: str, detail: str, **where: str) -> None:
        """Add a finding; `where` holds further attributes of `Finding`."""
        where.setdefault("file", self.file)
        self.findings.append(Finding(kind, detail=detail, **where))


def split_common_folder(paths: list[str]) -> tuple[str, list[str]]:
    """Return the folder that all paths share, and the paths relative to it."""
    folder = os.path.commonprefix([os.path.dirname(path) + "/" for path in paths]).rpartition("/")[0]
    return folder, [path[len(folder) + 1 :] if folder else path for path in paths]


def raw_from_records(name: str) -> RawSet:
    """Load a dataset by its own function, and turn the standard dicts into COCO's structure."""
    dicts, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    root, file_names = split_common_folder([str(record.get("file_name", "")) for record in dicts])
    raw = RawSet(name, root)
    images: list[dict] = []
    annotations: list[dict] = []
    for index, (record, file_name) in enumerate(zip(dicts, file_names)):
        image = {key: record[key] for key in ("height", "width") if key in record}
        image["file_name"] = file_name
        image["id"] = record.get("image_id", index)
        images.append(image)
        for annotation in record.get("annotations", ()):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **_to_coco(annotation)})
    classes = metadata.get("thing_classes")
    if classes is None:
        used = {annotation.get("category_id") for annotation in annotations}
        classes = [str(i) for i in range(1 + max((i for i in used if isinstance(i, int)), default=-1))]
    categories: list[dict] = [{"id": i, "name": str(name)} for i, name in enumerate(classes)]
    if metadata.get("keypoint_names"):
        for category in categories:
            category["keypoints"] = list(metadata.keypoint_names)
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def _to_coco(annotation: dict) -> dict:
    result = {key: value for key, value in annotation.items() if key != "bbox_mode"}
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if isinstance(box, np.ndarray):
        box = result["bbox"] = box.tolist()
    if isinstance(box, list | tuple) and mode is not None and len(box) in (4, 5):
        wanted = BoxMode.XYWHA_ABS if mode == BoxMode.XYWHA_ABS else BoxMode.XYWH_ABS
        result["bbox"] = list(BoxMode.convert(list(box), mode, wanted))
    if isinstance(annotation.get("segmentation"), list):
        result["segmentation"] = [
            np.asarray(polygon).ravel().tolist() for polygon in annotation["segmentation"]
        ]
    if annotation.get("keypoints") is not None:
        keypoints = np.array(annotation["keypoints"], dtype=np.float64).ravel()
        result["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(keypoints.tolist())]
    return result
