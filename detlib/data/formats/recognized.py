"""Formats that detlib does not read: `dir:` recognizes them and says how to get one that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from detlib.data.formats.base import FOLDER_HINTS
from detlib.data.formats.objects import subfolders
from detlib.utils.file_io import PathManager

__all__ = ["RECOGNIZED", "Recognized", "recognize"]

_HEAD_BYTES = 65536
_MAX_FILES = 20  # whose first bytes are read in a folder


@dataclass(frozen=True)
class Recognized:
    """A format that is recognized but not read.

    Attributes:
        name: its name.
        find: returns what it was recognized by in a folder, or "".
        advice: how to read such data.
    """

    name: str
    find: Callable[[str], str]
    advice: str


def _files(path: str, *suffixes: str) -> Iterator[str]:
    """Yield the names of the files in a folder, and in its folders, that end in one of `suffixes`."""
    for folder in ("", *subfolders(path)):
        for name in sorted(PathManager.ls(os.path.join(path, folder))):
            if name.lower().endswith(suffixes):
                yield os.path.join(folder, name)


def _with_suffix(*suffixes: str) -> Callable[[str], str]:
    return lambda path: next(_files(path, *suffixes), "")


def _with_keys(*keys: str, suffix: str = ".json") -> Callable[[str], str]:
    """Return a function that finds a file with all `keys` in its first bytes."""

    def find(path: str) -> str:
        for _, name in zip(range(_MAX_FILES), _files(path, suffix)):
            with PathManager.open(os.path.join(path, name), "rb") as file:
                head = file.read(_HEAD_BYTES)
            if all(f'"{key}"'.encode() in head for key in keys):
                return name
        return ""

    return find


def _with_folder(*names: str) -> Callable[[str], str]:
    """Return a function that finds a folder of one of these names, here or one level below."""

    def find(path: str) -> str:
        folders = subfolders(path)
        below = [os.path.join(a, b) for a in folders for b in subfolders(os.path.join(path, a))]
        return next((folder for folder in [*folders, *below] if os.path.basename(folder) in names), "")

    return find


def _supervisely(path: str) -> str:
    return "meta.json" if PathManager.isfile(f"{path}/meta.json") and _with_folder("ann")(path) else ""


RECOGNIZED = (
    Recognized(
        "COCO panoptic",
        _with_keys("segments_info"),
        "register it with detlib.data.datasets.register_coco_panoptic, or "
        "register_coco_panoptic_separated for Panoptic FPN",
    ),
    Recognized(
        "Label Studio",
        _with_keys("from_name", "to_name"),
        "export the project as COCO (coco:) or as YOLO with images (dir:)",
    ),
    Recognized(
        "CreateML",
        _with_suffix(".createml.json"),
        "export the dataset as COCO (coco:) or Pascal VOC (voc:) instead",
    ),
    Recognized(
        "Supervisely", _supervisely, "export the project as COCO with Supervisely's app 'Export to COCO'"
    ),
    Recognized(
        "VoTT",
        _with_suffix(".vott", "-export.json"),
        "choose CSV (csv:) or Pascal VOC (voc:) in VoTT's export settings",
    ),
    Recognized(
        "Datumaro",
        _with_keys("infos", "categories", "items"),
        "convert it with Datumaro: datum convert -i FOLDER -f coco --save-media",
    ),
    Recognized(
        "KITTI",
        _with_folder("label_2"),
        "convert it with Datumaro: datum convert -i FOLDER -if kitti -f coco --save-media",
    ),
    Recognized(
        "WIDER FACE",
        _with_suffix("_bbx_gt.txt"),
        "convert it with Datumaro: datum convert -i FOLDER -if wider_face -f coco --save-media",
    ),
    Recognized("CrowdHuman", _with_suffix(".odgt"), "write its boxes as COCO (coco:) or as CSV (csv:)"),
)


def recognize(path: str) -> str:
    """Return a sentence for each recognized format in a folder."""
    found = ((known, known.find(path)) for known in RECOGNIZED)
    return "".join(
        f"\nThis looks like {known.name} ({evidence}), which is not read: {known.advice}."
        for known, evidence in found
        if evidence
    )


FOLDER_HINTS.append(recognize)
