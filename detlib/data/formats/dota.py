"""DOTA's text files of rotated boxes (https://captain-whu.github.io/DOTA/).

DIR/SPLIT/images/NAME.png
DIR/SPLIT/labelTxt/NAME.txt    or labelTxt-v1.0, labelTxt-v1.5, ... ; also without SPLIT

A text file may begin with the lines `imagesource:...` and `gsd:...`. Each other line is an object, with the
corners in pixels: `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from detlib.data.datasets.rotated_corners import fit_rotated_box
from detlib.data.datasets.voc_layout import IMAGE_SUFFIXES, read_lines
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, register_format
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import (
    ROTATED_BOXES,
    DrawnObject,
    DrawnURI,
    RawSetBuilder,
    ShapeError,
    check_points,
    find_split_folder,
    subfolders,
)
from detlib.data.image_io import read_image_size
from detlib.utils.file_io import PathManager

__all__ = ["DotaURI"]

logger = logging.getLogger(__name__)

_LABELS = "labelTxt"


class DotaURI(DrawnURI):
    """`dota:DIR` or `dota:DIR@SPLIT`.

    A split is a folder in DIR with `images` and `labelTxt`. The classes are the lines of DIR/labels.txt.
    Without that file they are the sorted names in all files in DIR, so that all splits agree on them.
    """

    form = "dota:DIR@SPLIT"
    options = (ROTATED_BOXES, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.dirname, self.split = self.split_body_with_optional_split()

    def _folder(self) -> str:
        folder = find_split_folder(self, self.dirname, self.split, lambda path: bool(_label_folders(path)))
        if not _label_folders(folder):
            splits = [name for name in subfolders(folder) if _label_folders(os.path.join(folder, name))]
            hint = f" It has the splits: {', '.join(splits)}." if splits else ""
            raise FileNotFoundError(f"Dataset URI {self.uri!r}: {folder!r} has no folder {_LABELS}.{hint}")
        return folder

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the split or its files do not exist."""
        _find_files(self._folder())

    def folder(self) -> str:
        """Return the folder of labels.txt."""
        return self.dirname

    def evaluator_type(self) -> str:
        """Return the type of the evaluator, which depends on the option `boxes`."""
        return "rotated_coco" if self.values["boxes"] == "rotated" else "coco"

    def find_classes(self) -> list[str]:
        """Return the sorted names in all files in DIR."""
        folders = [self.dirname, *(os.path.join(self.dirname, name) for name in subfolders(self.dirname))]
        files = [file for folder in folders if _label_folders(folder) for file in _find_files(folder)]
        with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
            rows = [row for found in pool.map(_read_rows, files) for _, row in found]
        return sorted({row[8] for row in rows if len(row) in (9, 10)})

    def read(self, classes: list[str]) -> RawSet:
        """Read the split."""
        return read_raw_dota(self._folder(), classes, rotated=self.values["boxes"] == "rotated")


def _label_folders(folder: str) -> list[str]:
    return [name for name in subfolders(folder) if name.startswith(_LABELS)]


def _find_files(folder: str) -> list[str]:
    """Return the label files of a split, sorted; of several versions the last one."""
    labels = os.path.join(folder, _label_folders(folder)[-1])
    if _label_folders(labels):  # as unpacked: labelTxt-v1.0/labelTxt
        labels = os.path.join(labels, _label_folders(labels)[-1])
    names = sorted(name for name in PathManager.ls(labels) if name.endswith(".txt"))
    if not names:
        raise FileNotFoundError(f"Folder {labels!r} has no label files (*.txt).")
    return [os.path.join(labels, name) for name in names]


def _read_rows(file: str) -> list[tuple[int, list[str]]]:
    """Return number and words of each line with an object."""
    rows = [(number, line.split()) for number, line in enumerate(read_lines(file), start=1)]
    return [(number, row) for number, row in rows if not row[0].startswith(("imagesource:", "gsd:"))]


def read_raw_dota(folder: str, classes: list[str], *, rotated: bool = True) -> RawSet:
    """Read a split.

    Args:
        folder: the folder with `images` and `labelTxt`.
        classes: the class names in order; empty to use the sorted names of the objects.
        rotated: whether boxes are rotated; else polygons with their extents.
    """
    builder = RawSetBuilder(folder)
    builder.raw.states_sizes = False
    images = os.path.join(folder, "images")
    names = PathManager.ls(images) if PathManager.isdir(images) else []
    paths = {os.path.splitext(n)[0]: n for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)}
    files = _find_files(folder)
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    unlabeled = [name for stem, name in paths.items() if stem not in {*stems}]
    if unlabeled:
        logger.warning("%s: left out %d images without label files", folder, len(unlabeled))
    for file, stem in zip(files, stems):
        try:
            if stem not in paths:
                raise FileNotFoundError(f"{images} has no image {stem!r}")
            path = os.path.join(images, paths[stem])
            image = builder.add_image(stem, path, read_image_size(path))
        except (OSError, ValueError) as error:
            kind = "missing-image" if isinstance(error, FileNotFoundError) else "unreadable-image"
            builder.raw.report(kind, str(error), file=file, image=stem, action="image dropped")
            continue
        try:
            rows = _read_rows(file)
        except ValueError as error:
            builder.raw.report("bad-file", str(error), file=file, action="image without objects")
            continue
        for number, row in rows:
            location = f"{os.path.basename(file)}, line {number}"
            try:
                builder.add_object(image, _parse_row(row, location, rotated), location)
            except ShapeError as error:
                where = {"file": file, "image": stem, "annotation": location, "action": "line dropped"}
                builder.raw.report(error.kind, f"the line {error}", **where)
    return builder.finish(classes)


def _parse_row(row: list[str], location: str, rotated: bool) -> DrawnObject:
    shown = " ".join(row[:12])[:100]
    if len(row) not in (9, 10):
        raise ShapeError("bad-label-line", f"{shown!r} has {len(row)} words, not 8 numbers, class, difficult")
    try:
        values = [float(word) for word in row[:8]]
    except ValueError as error:
        raise ShapeError("bad-label-line", f"{shown!r} does not begin with 8 numbers") from error
    found = DrawnObject(row[8], location)
    if row[9:] and row[9] != "0":
        found.marks["difficult"] = 1
    points = check_points([*zip(values[0::2], values[1::2])])
    if rotated:
        found.rotated_box = fit_rotated_box(points)
    else:
        found.add_polygon(points)
    return found


def find_dota(path: str) -> list[Candidate]:
    """Find the folder labelTxt in a folder itself, or in each of its folders."""
    if _label_folders(path):
        return [Candidate(f"dota:{path}", "all", f"found {_label_folders(path)[-1]}")]
    return [
        Candidate(f"dota:{path}@{name}", name, f"found {name}/{_label_folders(os.path.join(path, name))[-1]}")
        for name in subfolders(path)
        if _label_folders(os.path.join(path, name))
    ]


register_format(
    Format(
        name="dota",
        summary="DOTA's text files `labelTxt/*.txt` of rotated boxes, next to `images/`. `SPLIT` is a folder "
        "in `DIR`; `dota:DIR` reads DIR/labelTxt",
        uri_class=DotaURI,
        find=find_dota,
        layout="labelTxt/*.txt and images/, here or in a split's folder",
    )
)
