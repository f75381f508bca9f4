"""COCO's instance format (https://cocodataset.org/#format-data): one JSON file for all images of a split."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from detlib.data.catalog import Metadata
from detlib.data.datasets.coco import (
    convert_to_coco_dict,
    load_coco_json,
    read_categories,
    read_coco_json,
)
from detlib.data.datasets.file_values import read_json
from detlib.data.datasets.image_paths import split_path
from detlib.data.datasets.keypoint_names import keypoint_metadata, left_right_pairs
from detlib.data.datasets.lvis import with_lvis_path
from detlib.data.formats.base import (
    CROWD,
    EMPTY_BOXES,
    Candidate,
    Format,
    ParsedURI,
    claimed_by_another_format,
    register_format,
)
from detlib.data.formats.findings import RawSet
from detlib.data.formats.writing import ConversionSource, write_text
from detlib.utils.file_io import PathManager

__all__ = ["CocoURI", "coco_uri", "read_raw_coco", "write_coco"]

logger = logging.getLogger(__name__)

_TRIED_IMAGES = 10  # of a file, to find the folder of its images


def coco_uri(json_file: str, image_root: str) -> str:
    """Return the URI of an annotation file and the folder of its images."""
    return f"coco:{json_file}@{image_root or '.'}"


class CocoURI(ParsedURI):
    """`coco:ANNOTATIONS.json@IMAGE_DIR`; file and folder may contain an @ themselves."""

    form = "coco:ANNOTATIONS.json@IMAGE_DIR"
    options = (CROWD, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.json_file, self.image_root = self._split_at()

    def _split_at(self) -> tuple[str, str]:
        ats = [i for i, letter in enumerate(self.body) if letter == "@"]
        pairs = [(os.path.expanduser(self.body[:i]), os.path.expanduser(self.body[i + 1 :])) for i in ats]
        pairs = [pair for pair in pairs if all(pair)]
        if not pairs:
            raise self.error(f"it must be {self.form}; file or folder is missing.")
        files = [pair for pair in pairs if PathManager.isfile(pair[0])]
        return (files or [pair for pair in pairs if pair[0].endswith(".json")] or pairs)[0]

    def check(self) -> None:
        """Raise FileNotFoundError if the annotation file or the image folder does not exist."""
        if not PathManager.isfile(self.json_file):
            raise FileNotFoundError(
                f"Dataset URI {self.uri!r}: the annotation file {self.json_file!r} does not exist."
            )
        self.require_folder(self.image_root, "image folder")

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format."""
        self.check()
        empty_boxes = self.values["empty_boxes"]
        return self.treat_crowd(
            load_coco_json(self.json_file, self.image_root, self.uri, empty_boxes=empty_boxes)
        )

    def metadata(self) -> dict[str, Any]:
        """Return the classes, and keypoints if a category has them, from the annotation file."""
        self.check()
        categories = read_coco_json(self.json_file)["categories"]
        thing_classes, id_map = read_categories(categories, self.json_file)
        return {
            "evaluator_type": "coco",
            "json_file": self.json_file,
            "image_root": self.image_root,
            "thing_classes": thing_classes,
            "thing_dataset_id_to_contiguous_id": id_map,
            **keypoint_metadata(categories, self.json_file),
        }

    def read_raw(self) -> RawSet:
        """Read the annotation file for the checker."""
        self.check()
        return read_raw_coco(self.json_file, self.image_root)


def read_raw_coco(json_file: str, image_root: str) -> RawSet:
    """Read an annotation file for the checker. Its content is not checked."""
    raw = RawSet(json_file, image_root)
    try:
        content = read_json(json_file)
    except ValueError as error:
        raw.report("bad-file", str(error))
        return raw
    if not isinstance(content, dict):
        raw.report("bad-file", f"must hold a JSON object, not a {type(content).__name__}")
        return raw
    raw.content = content
    return raw


def read_registered_coco(metadata: Metadata) -> RawSet | None:
    """Read a registered dataset with a COCO or LVIS annotation file for the checker."""
    if not metadata.get("json_file") or metadata.get("image_root") is None:
        return None
    raw = read_raw_coco(metadata.json_file, metadata.image_root)
    images = raw.content.get("images")
    is_lvis = metadata.get("evaluator_type") == "lvis"
    if is_lvis and isinstance(images, list) and all(isinstance(image, dict) for image in images):
        raw.content["images"] = [with_lvis_path(image) for image in images]
    return raw


def find_coco(path: str) -> list[Candidate]:
    """Find annotation files in a folder. The split is part of the name of the file or of its folder."""
    found = []
    for folder, name, coco in _annotation_files(path):
        file, split = os.path.join(folder, name), _split_of(name, folder, path)
        image_root = _image_folder(coco, path, folder, [_subset_of(name), split])
        if image_root is not None:
            shown = os.path.relpath(file, path) if "://" not in path else file
            found.append(Candidate(coco_uri(file, image_root), split, f"found {shown} and its images"))
    return found


def _uri_of_file(path: str) -> str | None:
    """Return the URI of an annotation file whose images are in one of the usual folders."""
    if not path.endswith(".json") or claimed_by_another_format(path, "coco"):
        return None
    folder, name = os.path.split(path)
    coco = read_coco_json(path)
    splits = [_subset_of(name), _split_of(name, folder, folder)]
    for root in (folder, os.path.dirname(folder)):
        image_root = _image_folder(coco, root, folder, splits)
        if image_root is not None:
            return coco_uri(path, image_root)
    raise FileNotFoundError(
        f"{path!r} is in COCO's format, but none of its first images, such as "
        f"{coco['images'][0].get('file_name')!r}, is in the usual folders. Name theirs: "
        f"coco:{path}@IMAGE_DIR."
    )


def hint_coco(path: str) -> str:
    """Name the annotation files whose images were not found."""
    return "".join(
        f"\n{os.path.join(folder, name)!r} is in COCO's format, but its first image, "
        f"{coco['images'][0].get('file_name')!r}, is in none of the usual folders. Name its folder: "
        f"coco:{os.path.join(folder, name)}@IMAGE_DIR."
        for folder, name, coco in _annotation_files(path)
    )


def _annotation_files(path: str) -> Iterator[tuple[str, str, dict]]:
    """Yield folder, name and content of the annotation files in the usual folders."""
    folders = [path, os.path.join(path, "annotations")]
    folders += [os.path.join(path, name) for name in ("train", "val", "valid", "test")]
    for folder in filter(PathManager.isdir, folders):
        for name in sorted(PathManager.ls(folder)):
            file = os.path.join(folder, name)
            if not name.endswith(".json") or claimed_by_another_format(file, "coco"):
                continue
            try:
                yield folder, name, read_coco_json(file)
            except ValueError as error:
                logger.debug("%s is not a COCO annotation file: %s", file, error)


def _subset_of(name: str) -> str:
    """Return the part of a file name that names the subset: "Train" of "instances_Train.json"."""
    prefixes = r"(?:instances|person_keypoints|annotations?)[_-]"
    return re.sub(rf"^{prefixes}(?=.)", "", name.removesuffix(".json"), flags=re.IGNORECASE)


def _split_of(name: str, folder: str, path: str) -> str:
    found = re.search(r"trainval|train|minival|valid|val|test", name.lower())
    if found:
        return found[0]
    inner = os.path.basename(folder)
    return inner if folder != path and inner != "annotations" else _subset_of(name)


def _image_folder(coco: dict, path: str, folder: str, splits: list[str]) -> str | None:
    """Return the first of the usual folders that has an image of the file; None if none has one.

    The first images are tried, as single files may be missing.
    """
    forms = ("{}", "images/{}", "{}/images", "{}2017", "images/{}2017")
    names = ["images", "data", *dict.fromkeys(form.format(split) for split in splits for form in forms)]
    folders = [folder, path, *(os.path.join(path, name) for name in names), os.path.join(folder, "images")]
    stated = [str(image.get("file_name", "")) for image in coco["images"][:_TRIED_IMAGES]]
    for file_name in stated:
        parts = split_path(file_name)
        tails = ["/".join(parts[i:]) for i in range(len(parts))]
        for tail in dict.fromkeys([file_name, *tails]):
            for place in folders:
                if tail and PathManager.isfile(os.path.join(place, tail)):
                    return place
    return None


def write_coco(source: ConversionSource, out: str, masks: str) -> tuple[str, list[str]]:
    """Write OUT/annotations/SPLIT.json; the images go to OUT/images/SPLIT."""
    content = convert_to_coco_dict(source.name)
    source.count_lost_difficult()
    folder = os.path.join(out, "images", source.split)
    for i, image in enumerate(content["images"]):
        image["file_name"] = source.file_name(i)
    if not all(isinstance(image["id"], int) for image in content["images"]):
        # Tools for COCO's format expect integers. Readers sort by id, so this keeps the order.
        ids = {image["id"]: i for i, image in enumerate(content["images"], start=1)}
        for image in content["images"]:
            image["id"] = ids[image["id"]]
        for annotation in content.get("annotations", ()):
            annotation["image_id"] = ids[annotation["image_id"]]
    names = source.check_keypoint_counts()
    if names:
        rules = source.metadata.get("keypoint_connection_rules") or []
        implied = {frozenset(pair) for pair in left_right_pairs(list(names))}
        swapped = {frozenset(pair) for pair in source.metadata.get("keypoint_flip_map") or ()}
        source.count_lost(
            "pairs of keypoints are no longer known to swap under a horizontal flip, as their names do not "
            "differ only in left and right",
            len(swapped - implied),
        )
        skeleton = [[names.index(a) + 1, names.index(b) + 1] for a, b, _ in rules]
        for category in content["categories"]:
            category.update(keypoints=list(names), skeleton=skeleton)
    file = os.path.join(out, "annotations", f"{source.split}.json")
    write_text(file, json.dumps(content))
    return coco_uri(file, folder), [os.path.join(folder, image["file_name"]) for image in content["images"]]


register_format(
    Format(
        name="coco",
        summary="COCO's instance format: boxes, rotated boxes (5 numbers), polygons, RLE masks, keypoints",
        uri_class=CocoURI,
        read_registered=read_registered_coco,
        write=write_coco,
        holds_rotated_boxes=True,
        find=find_coco,
        uri_of_file=_uri_of_file,
        layout="*.json with 'images' and 'categories', here, in annotations/ or in a split's folder",
        hint=hint_coco,
    )
)
