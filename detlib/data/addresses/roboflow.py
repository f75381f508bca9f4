"""Addresses of Roboflow's COCO exports."""

from __future__ import annotations

from typing import Any

from detlib.data.datasets.roboflow import find_roboflow_split, load_roboflow, roboflow_metadata

from .parts import need_folder, split_choice, split_folder_and_split, split_options

__all__ = ["RoboflowAddress"]


class RoboflowAddress:
    """`roboflow:DIR@SPLIT`: Roboflow's COCO export, without the category that stands for the whole set."""

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = split_options(address, ("empty_boxes",))
        self.empty_boxes = split_choice(address, options, "empty_boxes", ("error", "drop"))
        self.dirname, self.split = split_folder_and_split(address, body, "roboflow:DIR@SPLIT")

    def check(self) -> None:
        """Raises FileNotFoundError if the folder or the split does not exist."""
        need_folder(self.address, "folder", self.dirname)
        find_roboflow_split(self.dirname, self.split)

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""
        self.check()
        return load_roboflow(self.dirname, self.split, self.address, empty_boxes=self.empty_boxes)

    def metadata(self) -> dict[str, Any]:
        """Returns the classes from the annotation file."""
        self.check()
        return roboflow_metadata(find_roboflow_split(self.dirname, self.split))
