"""CSV files of boxes: one line for each object.

Roboflow, TensorFlow    filename,width,height,class,xmin,ymin,xmax,ymax    in pixels
Open Images             ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,
                        IsGroupOf,...    normalized; class-descriptions*.csv next to it names the labels

The columns are found by their names, in any order and in upper or lower case. A line of an image with an
empty class is an image without objects.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from detlib.data.datasets.file_values import MAX_FILE_BYTES
from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.datasets.voc_layout import IMAGE_SUFFIXES
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, register_format
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import (
    DrawnObject,
    DrawnURI,
    RawSetBuilder,
    ShapeError,
    find_image,
    find_split_folder,
    subfolders,
)
from detlib.utils.file_io import PathManager

__all__ = ["CsvURI"]

_BOX = ("xmin", "ymin", "xmax", "ymax")
_NAMES = {"filename": ("filename", "file_name", "image", "imageid"), "class": ("class", "label", "labelname")}


class CsvURI(DrawnURI):
    """`csv:FILE.csv`, `csv:FILE.csv@IMAGES`, `csv:DIR` or `csv:DIR@SPLIT`.

    In a folder, the file is the only one whose columns are known. A split is a folder in DIR. The classes are
    the lines of labels.txt next to the file or in DIR. Without that file they are the sorted names of all
    objects, in DIR those of all splits.
    """

    form = "csv:FILE@IMAGES"
    options = (EMPTY_BOXES,)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.path, self.tail = self.split_body_with_optional_split()

    def _source(self) -> tuple[str, str]:
        """Return the CSV file and the folder of the images."""
        if PathManager.isfile(self.path):
            images = os.path.expanduser(self.tail) or os.path.dirname(self.path)
            self.require_folder(images, "folder of images")
            return self.path, images
        if self.path.endswith(".csv"):
            raise FileNotFoundError(f"Dataset URI {self.uri!r}: the file {self.path!r} does not exist.")
        folder = find_split_folder(self, self.path, self.tail, lambda path: any(_csv_files(path)))
        files = [*_csv_files(folder)]
        if len(files) != 1:
            listed = ", ".join(files) or "none"
            raise FileNotFoundError(
                f"Dataset URI {self.uri!r}: {folder!r} must have one CSV file of boxes; it has {listed}."
            )
        return files[0], folder

    def check(self) -> None:
        """Raise FileNotFoundError if the file or the folder of the images does not exist."""
        self._source()

    def folder(self) -> str:
        """Return the folder of labels.txt."""
        return os.path.dirname(self.path) if PathManager.isfile(self.path) else self.path

    def find_classes(self) -> list[str]:
        """Return the sorted class names of the file, or of all files in DIR."""
        files = [self.path]
        if not PathManager.isfile(self.path):
            folders = [self.path, *(os.path.join(self.path, name) for name in subfolders(self.path))]
            files = [found for folder in folders for found in _csv_files(folder)]
        return sorted({row["class"] for file in files for _, row in read_rows(file)} - {""})

    def read(self, classes: list[str]) -> RawSet:
        """Read the file."""
        return read_raw_csv(*self._source(), classes)


def _read_text(file: str, limit: int = MAX_FILE_BYTES) -> str:
    with PathManager.open(file, "rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"Annotation file {file!r} has more than {limit} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Annotation file {file!r} is not UTF-8 text: {error}.") from error


def _parse(file: str, text: str) -> Iterator[list[str]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(f"Annotation file {file!r} is not valid CSV: {error}.") from error


def _columns(header: list[str]) -> dict[str, int]:
    """Return the index of each known column; {} if one that is needed is missing."""
    lower = [name.strip().lower() for name in header]
    found = {name: lower.index(name) for name in (*_BOX, "isgroupof") if name in lower}
    for name, aliases in _NAMES.items():
        used = [alias for alias in aliases if alias in lower]
        if used:
            found[name] = lower.index(used[0])
    if "imageid" in lower:
        found["normalized"] = found["filename"]
    return found if {*_BOX, *_NAMES} <= found.keys() else {}


def read_rows(file: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and values of each line by the names of the columns.

    The name of the class is that of a class-descriptions*.csv next to the file, if there is one.

    Raises:
        ValueError: The file is not CSV in UTF-8, or lacks a column.
    """
    lines = _parse(file, _read_text(file))
    header = next(lines, [])
    columns = _columns(header)
    if not columns:
        raise ValueError(
            f"Annotation file {file!r} must have the columns {', '.join((*_NAMES, *_BOX))}; its first line "
            f"is {','.join(header)[:200]!r}."
        )
    descriptions = _read_descriptions(os.path.dirname(file)) if "normalized" in columns else {}
    for number, values in enumerate(lines, start=2):
        if not any(values):
            continue
        row = {name: values[i].strip() if i < len(values) else "" for name, i in columns.items()}
        row["class"] = descriptions.get(row["class"], row["class"])
        yield number, row


def _read_descriptions(folder: str) -> dict[str, str]:
    """Return the names of Open Images' labels, such as {"/m/0199g": "Bicycle"}."""
    names: dict[str, str] = {}
    for name in sorted(PathManager.ls(folder)):
        if name.startswith("class-descriptions") and name.endswith(".csv"):
            file = os.path.join(folder, name)
            names |= {row[0]: row[1] for row in _parse(file, _read_text(file)) if len(row) == 2}
    return names


def read_raw_csv(file: str, images: str, classes: list[str]) -> RawSet:
    """Read images and objects of a CSV file, images in the order in which they first occur.

    Args:
        file: the CSV file.
        images: folder of the images; those of Open Images are named without a suffix.
        classes: the class names in order; empty to use the sorted names of the objects.
    """
    builder = RawSetBuilder(file)
    builder.raw.states_sizes = False
    groups: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in read_rows(file):
        groups.setdefault(row["filename"], []).append((number, row))
    finder = ImageFinder(images, ("", "images", "data"))
    with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
        found = list(pool.map(_find_with_suffix, repeat(finder), groups))
    for (name, rows), (path, size, fault) in zip(groups.items(), found):
        if path is None or size is None:
            kind = "missing-image" if path is None else "unreadable-image"
            builder.raw.report(kind, fault, image=name, action="image dropped")
            continue
        image = builder.add_image(os.path.splitext(name)[0], path, size)
        for number, row in rows:
            location = f"line {number} ({row['class'] or 'no class'})"
            try:
                new = _parse_row(row, location, size)
                if new is not None:
                    builder.add_object(image, new, location)
            except ShapeError as error:
                where = {"image": name, "annotation": location, "action": "line dropped"}
                builder.raw.report(error.kind, f"the line {error}", **where)
    return builder.finish(classes)


def _find_with_suffix(finder: ImageFinder, name: str) -> tuple[str | None, tuple[int, int] | None, str]:
    """Return what `find_image` does for an image whose suffix may be left out."""
    result = find_image(finder, name)
    if result[0] is None and name and not name.lower().endswith(IMAGE_SUFFIXES):
        found = (find_image(finder, name + suffix) for suffix in IMAGE_SUFFIXES)
        return next((other for other in found if other[0] is not None), result)
    return result


def _parse_row(row: dict[str, str], location: str, size: tuple[int, int]) -> DrawnObject | None:
    """Return the object of a line, or None if the line only names an image."""
    texts = [row[key] for key in _BOX]
    if not any(texts) and not row["class"]:
        return None
    if not row["class"]:
        raise ShapeError("annotation-broken", "has no class")
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except ValueError as error:
        raise ShapeError("bad-box", f"has the box {texts}"[:200]) from error
    if "normalized" in row:
        if not all(-0.01 <= value <= 1.01 for value in (x0, y0, x1, y1)):
            raise ShapeError("not-normalized", f"has the box {texts}, which is not in 0..1"[:200])
        x0, y0, x1, y1 = x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1]
    if x1 < x0 or y1 < y0:
        raise ShapeError("box-no-area", f"has the box {texts} with its maximum below its minimum"[:200])
    found = DrawnObject(row["class"], location)
    found.add_box([(x0, y0), (x1, y1)])
    if row.get("isgroupof") == "1":
        found.marks["iscrowd"] = 1
    return found


def _csv_files(folder: str) -> Iterator[str]:
    for name in sorted(PathManager.ls(folder)):
        path = os.path.join(folder, name)
        if name.endswith(".csv") and _has_known_columns(path):
            yield path


def _has_known_columns(path: str) -> bool:
    with PathManager.open(path, "rb") as file:
        head = file.read(4096).decode("utf-8-sig", "replace").splitlines()
    try:
        return bool(head) and bool(_columns(next(_parse(path, head[0]), [])))
    except ValueError:
        return False


def find_csv(path: str) -> list[Candidate]:
    """Find the CSV files of boxes in a folder itself, and in each of its folders."""
    found = []
    files = [*_csv_files(path)]
    for file in files:
        stem = os.path.basename(file).removesuffix(".csv")
        split = "all" if len(files) == 1 else stem.split("-")[0].removesuffix("_labels")
        found.append(Candidate(f"csv:{file}", split, f"found {os.path.basename(file)}"))
    for name in subfolders(path):
        if len([*_csv_files(os.path.join(path, name))]) == 1:
            found.append(Candidate(f"csv:{path}@{name}", name, f"found a CSV file of boxes in {name}"))
    return found


register_format(
    Format(
        name="csv",
        summary="CSV files of boxes, as Roboflow and TensorFlow write them, or Open Images; `IMAGES` is by "
        "default the file's folder. `csv:DIR@SPLIT` reads the CSV file in a split's folder",
        uri_class=CsvURI,
        find=find_csv,
        uri_of_file=lambda path: f"csv:{path}" if path.endswith(".csv") else None,
        layout="a .csv with the columns filename, class, xmin, ymin, xmax, ymax, here or in a split's folder",
    )
)
