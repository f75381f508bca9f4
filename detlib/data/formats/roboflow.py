"""Roboflow's COCO export: a folder for each split, with its images and one JSON file."""

from __future__ import annotations

import os
from typing import Any

from detlib.data.datasets.roboflow import (
    ANNOTATION_FILE,
    find_roboflow_split,
    load_roboflow,
    roboflow_metadata,
    roboflow_splits,
    without_root_category,
)
from detlib.data.formats.base import CROWD, EMPTY_BOXES, Candidate, Format, ParsedURI, register_format
from detlib.data.formats.coco import read_raw_coco
from detlib.data.formats.findings import RawSet
from detlib.utils.file_io import PathManager

__all__ = ["RoboflowURI"]


class RoboflowURI(ParsedURI):
    """`roboflow:DIR@SPLIT`. The category that stands for the entire dataset is not a class."""

    form = "roboflow:DIR@SPLIT"
    options = (CROWD, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.split = self.split_body()

    def check(self) -> None:
        """Raise FileNotFoundError if the folder or the split does not exist."""
        self.require_folder(self.dirname)
        find_roboflow_split(self.dirname, self.split)

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format."""
        self.check()
        empty_boxes = self.values["empty_boxes"]
        return self.treat_crowd(load_roboflow(self.dirname, self.split, self.uri, empty_boxes=empty_boxes))

    def metadata(self) -> dict[str, Any]:
        """Return the classes from the annotation file."""
        self.check()
        return roboflow_metadata(find_roboflow_split(self.dirname, self.split))

    def read_raw(self) -> RawSet:
        """Read the annotation file for the checker."""
        folder = find_roboflow_split(self.dirname, self.split)
        raw = read_raw_coco(os.path.join(folder, ANNOTATION_FILE), folder)
        parts = [raw.content.get(key) for key in ("categories", "annotations")]
        if all(isinstance(part, list) and all(isinstance(x, dict) for x in part) for part in parts):
            raw.content = without_root_category(raw.content)
        return raw


def find_roboflow(path: str) -> list[Candidate]:
    """Find the splits of an export in a folder."""
    found = [
        Candidate(f"roboflow:{path}@{split}", split, f"found {split}/{ANNOTATION_FILE}")
        for split in roboflow_splits(path)
    ]
    if not found and PathManager.isfile(os.path.join(path, ANNOTATION_FILE)):
        parent, name = os.path.split(path.rstrip("/"))
        found = [Candidate(f"roboflow:{parent or '.'}@{name}", name, f"found {ANNOTATION_FILE}")]
    return found


register_format(
    Format(
        name="roboflow",
        summary=f"Roboflow's COCO export: `DIR/SPLIT/{ANNOTATION_FILE}` next to the images",
        uri_class=RoboflowURI,
        find=find_roboflow,
        layout=f"SPLIT/{ANNOTATION_FILE}",
        claims=lambda path: os.path.basename(path) == ANNOTATION_FILE,
    )
)
