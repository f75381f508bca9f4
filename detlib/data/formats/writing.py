"""Shared by the formats' writers: the dataset to write, and small helpers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from detlib.data.catalog import Metadata
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = ["ConversionSource", "format_number", "write_text"]

# Tools write coordinates with two digits or more.
_ROUNDING = 0.011


@dataclass
class ConversionSource:
    """A dataset to write in another format.

    Attributes:
        name: its dataset URI or registered name.
        split: name of the split in the result.
        dicts: the dataset in the standard format.
        metadata: its classes and keypoints.
        stems: a file name for each image, without folder and suffix. All differ.
        lost: counts, by description, of what the new format cannot hold.
    """

    name: str
    split: str
    dicts: list[dict]
    metadata: Metadata
    stems: list[str]
    lost: Counter[str] = field(default_factory=Counter)

    def file_name(self, index: int) -> str:
        """Return the new file name of an image, without folder."""
        return self.stems[index] + os.path.splitext(self.dicts[index]["file_name"])[1]

    def box(self, annotation: dict) -> list[float]:
        """Return the axis-aligned box of an annotation as [x0, y0, x1, y1] in pixels."""
        box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        return [float(value) for value in box]

    def count_lost(self, what: str, number: int = 1) -> None:
        """Count objects that lose something in the new format."""
        if number:
            self.lost[what] += number

    def is_extent(self, annotation: dict, extent: Sequence[float]) -> bool:
        """Return whether the box of an object is the extent [x0, y0, x1, y1] of its mask, up to a pixel."""
        return self._offset(annotation, extent) <= 1.0

    def count_moved_box(self, annotation: dict, extent: Sequence[float]) -> None:
        """Count an object whose box becomes the extent of its mask, if they differ."""
        moves = _ROUNDING < self._offset(annotation, extent)
        self.count_lost("boxes become the extent of their masks, from which they differ", moves)

    def _offset(self, annotation: dict, extent: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(extent, self.box(annotation)))

    def count_lost_difficult(self) -> None:
        """Count the objects marked as difficult, for formats that have no such mark.

        Crowd regions are not counted: they keep a mark of their own.
        """
        objects = [a for record in self.dicts for a in record.get("annotations", ())]
        self.count_lost(
            "objects are no longer marked as difficult",
            sum(bool(a.get("difficult")) and not a.get("iscrowd") for a in objects),
        )

    def write_class_list(self, path: str) -> list[str]:
        """Write the class names into a text file, one a line, and return them. Call this before other files.

        Raises:
            ValueError: The file cannot tell the names apart, or exists with other names from another split.
        """
        classes = list(self.metadata.thing_classes)
        bad = [n for n in classes if not n.isprintable() or not n or n != n.strip() or classes.count(n) > 1]
        if bad:
            raise ValueError(
                f"Dataset {self.name!r} has classes that {os.path.basename(path)} cannot tell apart: their "
                f"names are equal, empty, or have line breaks or surrounding spaces: {bad[:10]}."
            )
        text = "\n".join(classes) + "\n"
        if PathManager.isfile(path):
            with PathManager.open(path, "rb") as file:
                existing = file.read().decode("utf-8")
            if existing != text:
                raise ValueError(
                    f"{path} lists other classes ({', '.join(existing.split())}) than this dataset has "
                    f"({', '.join(classes)}); write into another folder."
                )
        write_text(path, text)
        return classes

    def check_keypoint_counts(self) -> list[str] | None:
        """Return the keypoint names of the metadata, None if there are none.

        Raises:
            ValueError: An object has another number of keypoints than there are names.
        """
        names = self.metadata.get("keypoint_names")
        for record in self.dicts if names else ():
            for annotation in record.get("annotations", ()):
                points = annotation.get("keypoints")
                if points is not None and np.size(points) not in (0, 3 * len(names)):
                    raise ValueError(
                        f"Dataset {self.name!r}: an object of {record['file_name']} has "
                        f"{np.size(points) // 3} keypoints, but the metadata names {len(names)}; it cannot "
                        "be written."
                    )
        return names


def write_text(path: str, text: str) -> None:
    """Write a text file as UTF-8 and create its folder."""
    PathManager.mkdirs(os.path.dirname(path))
    with PathManager.open(path, "wb") as file:
        file.write(text.encode("utf-8"))


def format_number(value: float) -> str:
    """Return the shortest text that reads back as the same number."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))
