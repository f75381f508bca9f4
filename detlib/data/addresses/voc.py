"""Addresses of folders in Pascal VOC's layout."""

from __future__ import annotations

import os
from typing import Any

from detlib.data.datasets.pascal_voc import find_voc_class_names, load_voc_instances, read_voc_split

from .parts import need_folder, split_choice, split_folder_and_split, split_options

__all__ = ["VocAddress"]


class VocAddress:
    """`voc:DIR@SPLIT`: Pascal VOC's folder layout, with boxes as they stand in the XML.

    The classes are the lines of DIR/labels.txt, or the sorted names of all objects in DIR/Annotations where
    there is no such file, so that all splits agree on them.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = split_options(address, ("one_based", "empty_boxes"))
        self.one_based = split_choice(address, options, "one_based", ("0", "1")) == "1"
        self.empty_boxes = split_choice(address, options, "empty_boxes", ("error", "drop"))
        self.dirname, self.split = split_folder_and_split(address, body, "voc:DIR@SPLIT")
        self._class_names: list[str] | None = None

    def check(self) -> None:
        """Raises FileNotFoundError if the folder, its parts or the split do not exist."""
        need_folder(self.address, "folder", self.dirname)
        for part in ("Annotations", "JPEGImages"):
            need_folder(self.address, "folder", os.path.join(self.dirname, part))
        read_voc_split(self.dirname, self.split)

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""
        self.check()
        classes = self._class_names or self._read_class_names()
        return load_voc_instances(
            self.dirname, self.split, classes, one_based=self.one_based, empty_boxes=self.empty_boxes
        )

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
