"""Addresses of annotations in COCO's instance format."""

from __future__ import annotations

import os
from typing import Any

from detlib.data.datasets.coco import load_coco_json, read_categories, read_coco_json
from detlib.data.datasets.keypoint_names import keypoint_metadata
from detlib.utils.file_io import PathManager

from .parts import need_folder, split_choice, split_options

__all__ = ["CocoAddress"]


class CocoAddress:
    """`coco:ANNOTATIONS.json@IMAGE_DIR`: annotations in COCO's instance format."""

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = split_options(address, ("empty_boxes",))
        self.empty_boxes = split_choice(address, options, "empty_boxes", ("error", "drop"))
        self.json_file, self.image_root = _split_at(body, address)

    def check(self) -> None:
        """Raises FileNotFoundError if the annotation file or the folder of the pictures does not exist."""
        if not PathManager.isfile(self.json_file):
            raise FileNotFoundError(
                f"Dataset address {self.address!r}: the annotation file {self.json_file!r} does not exist."
            )
        need_folder(self.address, "folder of the pictures", self.image_root)

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
            **keypoint_metadata(categories, self.json_file),
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
