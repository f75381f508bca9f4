"""Addresses of data sets in YOLO's format."""

from __future__ import annotations

from typing import Any

from detlib.data.datasets.yolo import load_yolo, yolo_metadata
from detlib.data.datasets.yolo_layout import find_yolo_pictures, read_yolo_config

from .parts import split_choice, split_folder_and_split, split_options

__all__ = ["YoloAddress"]


class YoloAddress:
    """`yolo:DATA.yaml@SPLIT`: boxes, polygons or poses in Ultralytics' layout."""

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = split_options(address, ("empty_boxes",))
        self.empty_boxes = split_choice(address, options, "empty_boxes", ("error", "drop"))
        self.yaml_file, self.split = split_folder_and_split(address, body, "yolo:DATA.yaml@SPLIT")

    def check(self) -> None:
        """Raises FileNotFoundError or ValueError if the file, the split or its pictures do not exist."""
        find_yolo_pictures(read_yolo_config(self.yaml_file), self.split)

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""
        return load_yolo(self.yaml_file, self.split, empty_boxes=self.empty_boxes)

    def metadata(self) -> dict[str, Any]:
        """Returns classes and keypoints from the data.yaml."""
        config = read_yolo_config(self.yaml_file)
        config.split_name(self.split)
        return yolo_metadata(config, self.split)
