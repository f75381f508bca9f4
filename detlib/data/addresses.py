"""Data sets by address: named in a config by what they consist of, with no Python to write.

    coco:ANNOTATIONS.json@IMAGE_DIR     COCO's instance format; ?empty_boxes=drop leaves out boxes of no area
    voc:DIR@SPLIT                       Pascal VOC's folder layout; boxes are taken as they stand in the XML
    shapes:train, shapes:val            generated pictures; shapes:train?num=500&size=128&seed=1;
                                        ?task=panoptic or ?task=stuff chooses what is evaluated;
                                        ?rotated=1 has rectangles with rotated boxes

Importing this module makes the catalogs understand them.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl

from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

from .catalog import register_address_scheme
from .datasets.coco import load_coco_json, read_categories, read_coco_json
from .datasets.pascal_voc import find_voc_class_names, load_voc_instances, read_voc_split
from .datasets.shapes import ShapesParameters, load_shapes, shapes_metadata

__all__ = ["CocoAddress", "ShapesAddress", "VocAddress"]


def _split_options(address: str, legal: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Splits `scheme:body?key=value&...` into body and options, of which only `legal` ones may occur."""
    body = address.partition(":")[2]
    head, mark, tail = body.rpartition("?")
    if not mark:
        return body, {}
    try:
        options = dict(parse_qsl(tail, strict_parsing=True, keep_blank_values=True))
    except ValueError as error:
        raise ValueError(f"Dataset address {address!r}: {tail!r} is not of the form key=value&...") from error
    for key in options:
        if key not in legal:
            raise ValueError(
                f"Dataset address {address!r}: there is no option {key!r}, only "
                f"{', '.join(legal)}.{suggest(key, legal)}"
            )
    return head, options


def _need_folder(address: str, what: str, path: str) -> None:
    if not PathManager.isdir(path):
        raise FileNotFoundError(f"Dataset address {address!r}: the {what} {path!r} does not exist.")


class CocoAddress:
    """`coco:ANNOTATIONS.json@IMAGE_DIR`: annotations in COCO's instance format."""

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = _split_options(address, ("empty_boxes",))
        self.empty_boxes = options.get("empty_boxes", "error")
        if self.empty_boxes not in ("error", "drop"):
            raise ValueError(
                f"Dataset address {address!r}: empty_boxes must be 'error' or 'drop', not "
                f"{self.empty_boxes!r}."
            )
        self.json_file, self.image_root = _split_at(body, address)

    def check(self) -> None:
        """Raises FileNotFoundError if the annotation file or the folder of the pictures does not exist."""
        if not PathManager.isfile(self.json_file):
            raise FileNotFoundError(
                f"Dataset address {self.address!r}: the annotation file {self.json_file!r} does not exist."
            )
        _need_folder(self.address, "folder of the pictures", self.image_root)

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""
        self.check()
        return load_coco_json(self.json_file, self.image_root, self.address, empty_boxes=self.empty_boxes)

    def metadata(self) -> dict[str, Any]:
        """Returns classes, and keypoints if a category has them, from the annotation file."""
        self.check()
        categories = read_coco_json(self.json_file)["categories"]
        thing_classes, id_map = read_categories(categories, self.json_file)
        return {
            "evaluator_type": "coco",
            "json_file": self.json_file,
            "image_root": self.image_root,
            "thing_classes": thing_classes,
            "thing_dataset_id_to_contiguous_id": id_map,
            **_keypoint_metadata(categories),
        }


def _split_at(body: str, address: str) -> tuple[str, str]:
    """Splits `FILE@FOLDER`, where either may contain an @ itself."""
    places = [i for i, letter in enumerate(body) if letter == "@"]
    pairs = [(os.path.expanduser(body[:i]), os.path.expanduser(body[i + 1 :])) for i in places]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        raise ValueError(
            f"Dataset address {address!r}: it must be coco:ANNOTATIONS.json@IMAGE_DIR; file or folder is "
            "missing."
        )
    files = [pair for pair in pairs if PathManager.isfile(pair[0])]
    return (files or [pair for pair in pairs if pair[0].endswith(".json")] or pairs)[0]


def _keypoint_metadata(categories: list[dict]) -> dict[str, Any]:
    """Returns names, flip map and connections from the first category with keypoints.

    COCO has no place for the flip map: names that differ in left and right only are taken as a pair.
    """
    category = next((category for category in categories if category.get("keypoints")), None)
    if category is None:
        return {}
    names = category["keypoints"]
    flip = [(name, name.replace("left", "right")) for name in names if "left" in name]
    colors = ((255, 128, 0), (51, 153, 255), (102, 204, 102))
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [pair for pair in flip if pair[1] in names],
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], colors[i % len(colors)])
            for i, (a, b) in enumerate(category.get("skeleton", ()))
        ],
    }


class VocAddress:
    """`voc:DIR@SPLIT`: Pascal VOC's folder layout, with boxes as they stand in the XML.

    The classes are the sorted names of all objects in DIR/Annotations, so that all splits agree on them.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        body, _ = _split_options(address, ())
        dirname, _, self.split = body.rpartition("@")
        self.dirname = os.path.expanduser(dirname)
        if not dirname or not self.split:
            raise ValueError(
                f"Dataset address {address!r}: it must be voc:DIR@SPLIT; folder or split is missing."
            )
        self._class_names: list[str] | None = None

    def check(self) -> None:
        """Raises FileNotFoundError if the folder, its parts or the split do not exist."""
        _need_folder(self.address, "folder", self.dirname)
        for part in ("Annotations", "JPEGImages"):
            _need_folder(self.address, "folder", os.path.join(self.dirname, part))
        read_voc_split(self.dirname, self.split)

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""
        self.check()
        classes = self._class_names or self._read_class_names()
        return load_voc_instances(self.dirname, self.split, classes, one_based=False)

    def metadata(self) -> dict[str, Any]:
        """Returns the classes, for which all annotations are read."""
        self.check()
        return {
            "evaluator_type": "coco",
            "dirname": self.dirname,
            "split": self.split,
            "thing_classes": self._read_class_names(),
        }

    def _read_class_names(self) -> list[str]:
        self._class_names = find_voc_class_names(self.dirname)
        return list(self._class_names)


class ShapesAddress:
    """`shapes:train` or `shapes:val`, with `?num=...&size=...&seed=...&rotated=1`: generated pictures.

    Their dicts always have instances, stuff and panoptic segments; `?task=...` says which metrics are
    computed.
    """

    EVALUATOR_TYPES = {"instances": "coco", "panoptic": "coco_panoptic_seg", "stuff": "sem_seg"}

    def __init__(self, address: str) -> None:
        numeric = tuple(field.name for field in fields(ShapesParameters) if field.name != "split")
        split, options = _split_options(address, (*numeric, "task"))
        self.task = options.pop("task", "instances")
        if self.task not in self.EVALUATOR_TYPES:
            raise ValueError(
                f"Dataset address {address!r}: there is no task {self.task!r}, only "
                f"{', '.join(self.EVALUATOR_TYPES)}.{suggest(self.task, self.EVALUATOR_TYPES)}"
            )
        numbers = {}
        for key, text in options.items():
            try:
                numbers[key] = int(text)
            except ValueError as error:
                raise ValueError(
                    f"Dataset address {address!r}: {key}={text!r} is not a whole number."
                ) from error
        try:
            self.parameters = ShapesParameters(split, **numbers)
        except ValueError as error:
            raise ValueError(f"Dataset address {address!r}: {error}.") from error

    def check(self) -> None:
        """Nothing is left to check: parsing did."""

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format, drawing the pictures the first time."""
        return load_shapes(self.parameters)

    def metadata(self) -> dict[str, Any]:
        """Returns things, stuff and keypoints with their names and colours."""
        return shapes_metadata(self.parameters) | {"evaluator_type": self.EVALUATOR_TYPES[self.task]}


register_address_scheme("coco", CocoAddress)
register_address_scheme("voc", VocAddress)
register_address_scheme("shapes", ShapesAddress)
