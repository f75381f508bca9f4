"""Folders whose format is detected, with the detectors of all registered formats."""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import parse_qsl, urlencode

from detlib.data.catalog import register_path_parser
from detlib.data.formats.base import (
    FOLDER_HINTS,
    FORMATS,
    Candidate,
    Format,
    ParsedURI,
    register_format,
)
from detlib.data.formats.findings import RawSet
from detlib.data.formats.objects import subfolders
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["FolderURI", "find_datasets"]

logger = logging.getLogger(__name__)

_SAME_SPLIT = {"valid": "val", "validation": "val"}
_SPLITS = ("train", "val", "valid", "validation", "test", "train2017", "val2017", "test2017", "default")
_MAX_FOLDERS = 50  # that are searched one level below


class FolderURI(ParsedURI):
    """`dir:PATH` or `dir:PATH@SPLIT`, with the options of the format that is found.

    Without a split it is the only one, or "train" if there are several. If PATH has no dataset, but the only
    dataset below it, or is the folder of a split, that is read.
    """

    form = "dir:PATH@SPLIT"

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.path, self.split = self.split_body_with_optional_split()
        self._resolved: tuple[ParsedURI, str] | None = None

    def _parse_options(self, text: str) -> dict[str, str]:
        try:
            return dict(parse_qsl(text, strict_parsing=True, keep_blank_values=True))
        except ValueError as error:
            raise self.error(f"{text!r} is not of the form key=value&...") from error

    def resolve(self) -> tuple[ParsedURI, str]:
        """Return the dataset in the folder, and a sentence that states what it is and why.

        Raises:
            FileNotFoundError: The folder does not exist, or has no dataset in a known format.
            ValueError: It has several that could be meant, or does not have the split.
        """
        if self._resolved is None:
            if PathManager.isfile(self.path) and self.path.lower().endswith(".zip"):
                folder = os.path.splitext(self.path)[0]
                raise self.error(
                    f"{self.path!r} is a zip archive. Unpack it with: unzip {self.path} -d {folder}\n"
                    f"Then read dir:{folder}."
                )
            self.require_folder(self.path)
            chosen = self._choose(find_datasets(self.path) or self._find_nearby())
            tail = "?" + urlencode(self.values) if self.values else ""
            parsed = FORMATS[chosen.scheme].uri_class(chosen.uri + tail)
            self._resolved = parsed, f"{self.uri} is read as {chosen.uri}: {chosen.reason}"
        return self._resolved

    def _find_nearby(self) -> list[Candidate]:
        """Return the datasets of which the folder is a split, or those of the only folder that has some."""
        name = os.path.basename(self.path.rstrip("/"))
        if name.lower() in _SPLITS and not self.split:
            folder = os.path.dirname(self.path.rstrip("/"))
            for above in filter(None, (folder, os.path.dirname(folder))):
                found = [c for c in find_datasets(above) if _same(c.split) == _same(name)]
                if found:
                    return found
        below = subfolders(self.path)
        if len(below) > _MAX_FOLDERS:
            return []
        found_below = [find_datasets(os.path.join(self.path, folder)) for folder in below]
        having = [found for found in found_below if found]
        return having[0] if len(having) == 1 else []

    def _choose(self, candidates: list[Candidate]) -> Candidate:
        if not candidates:
            detectable = [f for f in FORMATS.values() if f.find is not None]
            raise FileNotFoundError(
                f"Dataset URI {self.uri!r}: no dataset in a known format was found in {self.path!r}. Looked "
                "for:"
                + "".join(f"\n  {f.name}: {f.layout}" for f in detectable)
                + f"\nThe folder has: {_listing(self.path)}."
                + "".join(f.hint(self.path) for f in detectable if f.hint is not None)
                + "".join(hint(self.path) for hint in FOLDER_HINTS)
            )
        schemes = [*dict.fromkeys(candidate.scheme for candidate in candidates)]
        if len(schemes) > 1:
            first_of_each = {candidate.scheme: candidate.uri for candidate in reversed(candidates)}
            listed = " or ".join(first_of_each[scheme] for scheme in schemes)
            raise self.error(
                f"{self.path!r} looks like {' and like '.join(schemes)}; specify which is meant: {listed}."
            )
        wanted = self.split or (candidates[0].split if len(candidates) == 1 else "train")
        matching = [c for c in candidates if _same(c.split) == _same(wanted)]
        splits = [*dict.fromkeys(candidate.split for candidate in candidates)]
        if not matching:
            raise self.error(
                f"{schemes[0]} data were found in {self.path!r}, but no split {wanted!r}, only: "
                f"{', '.join(splits)}.{suggest(wanted, splits)} Write dir:{self.path}@SPLIT."
            )
        if len(matching) > 1:
            listed = " or ".join(candidate.uri for candidate in matching)
            raise self.error(f"there are several for split {wanted!r}; specify which is meant: {listed}.")
        return matching[0]

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError if there is no dataset, or several."""
        self.resolve()[0].check()

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format, and log what it was read as."""
        resolved, explanation = self.resolve()
        logger.info(explanation)
        return resolved.load()

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the dataset found."""
        return self.resolve()[0].metadata()

    def read_raw(self) -> RawSet:
        """Read the dataset found for the checker."""
        resolved, explanation = self.resolve()
        raw = resolved.read_raw()
        raw.note = explanation
        return raw


def _same(split: str) -> str:
    return _SAME_SPLIT.get(split, split)


def _listing(path: str, limit: int = 12) -> str:
    names = sorted(PathManager.ls(path))
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "nothing"


def find_datasets(path: str) -> list[Candidate]:
    """Return all datasets in a folder that have a known format."""
    return [candidate for f in FORMATS.values() if f.find is not None for candidate in f.find(path)]


def parse_path(path: str) -> ParsedURI | None:
    """Return the dataset in a folder or file that is named by its path; None if it is not a dataset's.

    Args:
        path: a folder, as for `dir:`, or a file that a format's `uri_of_file` knows.
    """
    path = os.path.expanduser(path)
    if PathManager.isdir(path) or (path.lower().endswith(".zip") and PathManager.isfile(path)):
        return FolderURI(f"dir:{path}")
    if not PathManager.isfile(path):
        return None
    for f in FORMATS.values():
        uri = f.uri_of_file(path) if f.uri_of_file is not None else None
        if uri is not None:
            logger.info("%s is read as %s", path, uri)
            return f.uri_class(uri)
    return None


register_path_parser(parse_path)
register_format(
    Format(
        name="dir",
        summary="a folder whose format is detected; the log states what it was read as and why. Without "
        "`@SPLIT` it is the only split, or `train`",
        uri_class=FolderURI,
    )
)
