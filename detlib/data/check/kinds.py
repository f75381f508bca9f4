"""The sorts of faults that are looked for, and how one that was found is told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Finding"]

# By name: whether it is an error, and what it means. docs/data.md says what loaders do with each.
KINDS: dict[str, tuple[str, str]] = {
    "bad-file": ("error", "the annotation file cannot be read, or is not of its format"),
    "missing-part": ("error", "the list of images, categories or annotations is missing or no list"),
    "missing-annotation-file": ("error", "there is no annotation file for a picture"),
    "category-broken": ("error", "a category is no object, or lacks id or name, or they have a wrong type"),
    "duplicate-category-id": ("error", "two categories have one id"),
    "duplicate-category-name": ("warning", "two categories have one name"),
    "unused-category": ("warning", "no annotation has the category"),
    "image-broken": ("error", "an image is no object, or lacks id, file name or size"),
    "image-wrong-type": ("error", "an image's id, file name or size has a wrong type"),
    "image-size-not-positive": ("error", "an image's width or height is not above 0"),
    "image-without-size": ("warning", "the annotation file does not say the picture's size"),
    "duplicate-image-id": ("error", "two images have one id"),
    "mixed-image-ids": ("error", "some image ids are numbers, others strings"),
    "duplicate-file-name": ("warning", "two images have one file"),
    "duplicate-picture": ("warning", "two files have the same content"),
    "missing-picture": ("error", "the picture's file does not exist"),
    "unreadable-picture": ("error", "the file is no picture that can be read"),
    "truncated-picture": ("error", "the picture's file ends too early"),
    "size-mismatch": ("error", "the annotation says another size than the picture has"),
    "size-mismatch-exif": ("error", "the annotation says the size before the picture's EXIF turn"),
    "empty-image": ("warning", "no object is on the picture"),
    "label-without-picture": ("warning", "a label file belongs to no picture"),
    "annotation-broken": ("error", "an annotation is no object, or lacks image_id, category_id or bbox"),
    "unknown-image": ("error", "an annotation belongs to no image of the file"),
    "unknown-category": ("error", "an annotation's category is not listed"),
    "duplicate-annotation-id": ("error", "two annotations have one id"),
    "duplicate-annotation": ("warning", "two annotations have the same image, category and box"),
    "bad-iscrowd": ("error", "iscrowd is neither 0 nor 1"),
    "bad-area": ("warning", "the area is no number above 0"),
    "bad-label-line": ("error", "a label line has a wrong number of values, or one that is no number"),
    "not-shares": ("error", "a label line's coordinates are not within 0..1"),
    "bad-box": ("error", "a box is not of 4 numbers (5 for a rotated one)"),
    "box-not-finite": ("error", "a box has a value that is not finite"),
    "box-no-area": ("error", "a box has no area"),
    "box-outside": ("error", "a box lies outside the picture"),
    "box-sticks-out": ("warning", "a box sticks out of the picture by more than a pixel"),
    "box-below-one-pixel": ("warning", "a box is narrower or lower than a pixel"),
    "bad-segmentation": ("error", "a segmentation is neither polygons nor an RLE mask"),
    "polygon-too-short": ("error", "a polygon has fewer than three points"),
    "polygon-odd": ("error", "a polygon has an odd number of values"),
    "polygon-not-finite": ("error", "a polygon has a value that is not a finite number"),
    "polygon-no-area": ("error", "a polygon has no area"),
    "polygon-sticks-out": ("warning", "a polygon sticks out of the picture by more than a pixel"),
    "rle-broken": ("error", "an RLE mask's runs are malformed or do not fill its size"),
    "rle-wrong-size": ("error", "an RLE mask has another size than the image"),
    "rle-empty": ("warning", "an RLE mask has no pixel"),
    "mask-box-mismatch": ("warning", "a box differs much from the extent of its polygons"),
    "mixed-masks": ("warning", "some objects of a picture have masks, others none"),
    "keypoint-length": ("error", "keypoints are not triples, or not as many as the category names"),
    "keypoint-not-finite": ("error", "a keypoint has a value that is not a finite number"),
    "keypoint-visibility": ("warning", "a keypoint's visibility is none of 0, 1, 2"),
    "keypoint-outside": ("warning", "a labelled keypoint lies outside the picture"),
    "keypoint-count": ("warning", "num_keypoints is not the number of labelled keypoints"),
    "mixed-keypoints": ("warning", "some objects of a picture have keypoints, others none"),
}


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        kind: a key of `KINDS`.
        file: the annotation file.
        detail: what was found.
        image: file name of the image; empty where it concerns none.
        annotation: what names the annotation, or the line.
        action: what the repaired set has instead; empty where nothing is changed.
    """

    kind: str
    file: str
    detail: str
    image: str = ""
    annotation: str = ""
    action: str = ""

    @property
    def severity(self) -> str:
        """ "error" or "warning"."""
        return KINDS[self.kind][0]

    @property
    def place(self) -> str:
        """File, image and annotation."""
        parts = [self.file, self.image and f"image {self.image!r}", self.annotation]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind}: {self.place}: {self.detail}"
