"""Reading the files of Pascal VOC's layout, as the many tools that write them leave them behind."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from detlib.utils.file_io import PathManager

__all__ = ["parse_xml", "read_lines", "read_split_names"]

_FLAGS = (["1"], ["-1"], ["0"])  # VOC's lists of one class say of each picture whether it has such objects


def read_lines(path: str) -> list[str]:
    """Returns the lines of a text file without what surrounds them, and without empty ones.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    with PathManager.open(path, "rb") as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not text in UTF-8: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_names(path: str, annotations: str) -> list[str]:
    """Returns the picture names of a list in `ImageSets/Main`.

    A line is a name, or a name and a flag. Names may have spaces in them, so where the flag could be the end
    of the name, the folder `annotations` decides.
    """
    lines = read_lines(path)
    there: set[str] = set()
    if any(len(line.split()) > 1 for line in lines) and PathManager.isdir(annotations):
        there = {name.removesuffix(".xml") for name in PathManager.ls(annotations)}
    words = [line.split() for line in lines]
    return [
        first if rest in _FLAGS and line not in there else line for line, (first, *rest) in zip(lines, words)
    ]


def parse_xml(path: str) -> ElementTree.Element:
    """Returns the root of an annotation file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not XML, or in an encoding that is not known.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"Annotation file {path!r} does not exist.")
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        return _parse(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"Annotation file {path!r} is not valid XML: {error}") from error


def _parse(content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)
    except (ValueError, LookupError):
        # The parser knows no encodings of several bytes a letter but Unicode's; given text, it asks for none.
        declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode("ascii")))
