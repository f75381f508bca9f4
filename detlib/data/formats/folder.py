"""Folders whose format is detected, with the detectors of all registered formats."""

from __future__ import annotations

import logging
from typing import Any

from detlib.data.formats.base import (
    EMPTY_BOXES,
    FOLDER_HINTS,
    FORMATS,
    Candidate,
    Format,
    ParsedURI,
    register_format,
)
from detlib.data.formats.findings import RawSet
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["FolderURI", "find_datasets"]

logger = logging.getLogger(__name__)

_SAME_SPLIT = {"valid": "val", "validation": "val"}


class FolderURI(ParsedURI):
    """`dir:PATH` or `dir:PATH@SPLIT`.

    Without a split it is the only one, or "train" if there are several.
    """

    form = "dir:PATH@SPLIT"
    options = (EMPTY_BOXES,)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.path, self.split = self.split_body_with_optional_split()
        self._resolved: tuple[ParsedURI, str] | None = None

    def resolve(self) -> tuple[ParsedURI, str]:
        """Return the dataset in the folder, and a sentence that states what it is and why.

        Raises:
            FileNotFoundError: The folder does not exist, or has no dataset in a known format.
            ValueError: It has several that could be meant, or does not have the split.
        """
        if self._resolved is None:
            self.require_folder(self.path)
            chosen = self._choose(find_datasets(self.path))
            changed = {k: v for k, v in self.values.items() if v != EMPTY_BOXES.values[0]}
            tail = "".join(f"?{key}={value}" for key, value in changed.items())
            parsed = FORMATS[chosen.scheme].uri_class(chosen.uri + tail)
            self._resolved = parsed, f"{self.uri} is read as {chosen.uri}: {chosen.reason}"
        return self._resolved

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


register_format(
    Format(
        name="dir",
        summary="a folder whose format is detected; the log states what it was read as and why. Without "
        "`@SPLIT` it is the only split, or `train`",
        uri_class=FolderURI,
    )
)
