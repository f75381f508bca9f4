"""Addresses of folders whose format is found out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from detlib.data.catalog import Address
from detlib.data.datasets.coco import read_coco_json
from detlib.data.datasets.roboflow import ANNOTATION_FILE, roboflow_splits
from detlib.data.datasets.yolo_layout import read_yolo_config
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

from .coco import CocoAddress
from .parts import need_folder, split_choice, split_options
from .roboflow import RoboflowAddress
from .voc import VocAddress
from .yolo import YoloAddress

__all__ = ["FolderAddress", "find_datasets"]

logger = logging.getLogger(__name__)

_SAME_SPLIT = {"valid": "val", "validation": "val"}

# What was looked for, said where nothing is found.
_LAYOUTS = (
    ("yolo", "data.yaml (or another .yaml with 'names' and 'train', 'val' or 'test')"),
    ("roboflow", f"SPLIT/{ANNOTATION_FILE}"),
    ("voc", "Annotations/*.xml with ImageSets/Main/SPLIT.txt and JPEGImages/"),
    ("coco", "*.json with 'images' and 'categories', here, in annotations/ or in a split's folder"),
)


@dataclass(frozen=True)
class Candidate:
    """One data set in a folder.

    Attributes:
        address: what names it exactly, without options.
        split: its name.
        reason: what was found, for the log.
    """

    address: str
    split: str
    reason: str

    @property
    def scheme(self) -> str:
        """The format."""
        return self.address.partition(":")[0]


class FolderAddress:
    """`dir:PATH` or `dir:PATH@SPLIT`: a data set whose format is found out.

    Without a split, the only one is taken, or "train" where there are several.
    """

    PARSERS = {"yolo": YoloAddress, "roboflow": RoboflowAddress, "voc": VocAddress, "coco": CocoAddress}

    def __init__(self, address: str) -> None:
        self.address = address
        body, options = split_options(address, ("empty_boxes",))
        split_choice(address, options, "empty_boxes", ("error", "drop"))
        self._options = "".join(f"?{key}={value}" for key, value in options.items())
        body = os.path.expanduser(body)
        head, mark, tail = body.rpartition("@")
        is_whole = not mark or not head or PathManager.isdir(body)
        self.path, self.split = (body, "") if is_whole else (head, tail)
        if not self.path:
            raise ValueError(f"Dataset address {address!r}: it must be dir:PATH or dir:PATH@SPLIT.")
        self._found: Address | None = None
        self._explanation = ""

    def resolve(self) -> Address:
        """Returns the address that this one stands for.

        Raises:
            FileNotFoundError: the folder does not exist, or holds no data set that is known.
            ValueError: it holds several that could be meant, or has no such split.
        """
        if self._found is None:
            need_folder(self.address, "folder", self.path)
            chosen = self._choose(find_datasets(self.path))
            self._found = self.PARSERS[chosen.scheme](chosen.address + self._options)
            self._explanation = f"{self.address} is taken as {chosen.address}: {chosen.reason}"
        return self._found

    def explain(self) -> str:
        """Returns a sentence on what this address stands for and why; raises as `resolve` does."""
        self.resolve()
        return self._explanation

    def _choose(self, candidates: list[Candidate]) -> Candidate:
        if not candidates:
            raise FileNotFoundError(
                f"Dataset address {self.address!r}: no known data set was found in {self.path!r}. Looked for:"
                + "".join(f"\n  {scheme}: {what}" for scheme, what in _LAYOUTS)
                + f"\nThere is: {_listing(self.path)}."
                + _without_pictures(self.path)
            )
        schemes = [*dict.fromkeys(candidate.scheme for candidate in candidates)]
        if len(schemes) > 1:
            listed = " or ".join(candidate.address for candidate in _first_of_each(candidates))
            raise ValueError(
                f"Dataset address {self.address!r}: {self.path!r} looks like {' and like '.join(schemes)}; "
                f"say which is meant: {listed}."
            )
        wanted = self.split or (candidates[0].split if len(candidates) == 1 else "train")
        matching = [c for c in candidates if _same(c.split) == _same(wanted)]
        splits = [*dict.fromkeys(candidate.split for candidate in candidates)]
        if not matching:
            raise ValueError(
                f"Dataset address {self.address!r}: {schemes[0]} data were found in {self.path!r}, but no "
                f"split {wanted!r}, only: {', '.join(splits)}.{suggest(wanted, splits)} Write "
                f"dir:{self.path}@SPLIT."
            )
        if len(matching) > 1:
            listed = " or ".join(candidate.address for candidate in matching)
            raise ValueError(
                f"Dataset address {self.address!r}: there are several for split {wanted!r}; say which is "
                f"meant: {listed}."
            )
        return matching[0]

    def check(self) -> None:
        """Raises FileNotFoundError or ValueError where `resolve` or what it finds does."""
        self.resolve().check()

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format; says in the log what was taken for it."""
        logger.info(self.explain())
        return self.resolve().load()

    def metadata(self) -> dict[str, Any]:
        """Returns what the address that this one stands for returns."""
        return self.resolve().metadata()


def _same(split: str) -> str:
    return _SAME_SPLIT.get(split, split)


def _first_of_each(candidates: list[Candidate]) -> list[Candidate]:
    return [*{candidate.scheme: candidate for candidate in reversed(candidates)}.values()][::-1]


def _listing(path: str, limit: int = 12) -> str:
    names = sorted(PathManager.ls(path))
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "nothing"


def find_datasets(path: str) -> list[Candidate]:
    """Returns all data sets in a folder that have a known format."""
    finders: tuple[Callable[[str], list[Candidate]], ...] = (_yolo, _roboflow, _voc, _coco)
    return [candidate for find in finders for candidate in find(path)]


def _yolo(path: str) -> list[Candidate]:
    found = []
    for name in sorted(PathManager.ls(path)):
        if not name.endswith((".yaml", ".yml")):
            continue
        file = os.path.join(path, name)
        try:
            config = read_yolo_config(file)
        except ValueError as error:
            if name == "data.yaml":
                raise
            logger.debug("%s is not taken for a data set: %s", file, error)
            continue
        found += [Candidate(f"yolo:{file}@{split}", split, f"found {name}") for split in config.splits]
    return found


def _roboflow(path: str) -> list[Candidate]:
    return [
        Candidate(f"roboflow:{path}@{split}", split, f"found {split}/{ANNOTATION_FILE}")
        for split in roboflow_splits(path)
    ]


def _voc(path: str) -> list[Candidate]:
    lists = os.path.join(path, "ImageSets", "Main")
    folders = (os.path.join(path, "Annotations"), os.path.join(path, "JPEGImages"), lists)
    if not all(map(PathManager.isdir, folders)):
        return []
    splits = sorted(name.removesuffix(".txt") for name in PathManager.ls(lists) if name.endswith(".txt"))
    return [
        Candidate(f"voc:{path}@{split}", split, f"found Annotations, JPEGImages, ImageSets/Main/{split}.txt")
        for split in splits
    ]


def _coco_files(path: str) -> Iterator[tuple[str, str, dict]]:
    """Yields folder, name and content of the annotation files at the usual places."""
    folders = [path, os.path.join(path, "annotations")]
    folders += [os.path.join(path, name) for name in ("train", "val", "valid", "test")]
    for folder in filter(PathManager.isdir, folders):
        for name in sorted(PathManager.ls(folder)):
            if not name.endswith(".json") or name == ANNOTATION_FILE:
                continue
            file = os.path.join(folder, name)
            try:
                yield folder, name, read_coco_json(file)
            except ValueError as error:
                logger.debug("%s is not taken for a data set: %s", file, error)


def _coco(path: str) -> list[Candidate]:
    """The split is in the name of the file or of its folder."""
    found = []
    for folder, name, coco in _coco_files(path):
        file, split = os.path.join(folder, name), _split_of(name, folder, path)
        pictures = _picture_folder(coco, path, folder, split)
        if pictures is not None:
            place = os.path.relpath(file, path) if "://" not in path else file
            found.append(Candidate(f"coco:{file}@{pictures}", split, f"found {place} and its pictures"))
    return found


def _without_pictures(path: str) -> str:
    """Says which annotation files are there; called where no pictures of theirs were found."""
    return "".join(
        f"\n{os.path.join(folder, name)!r} is in COCO's format, but its first picture, "
        f"{coco['images'][0].get('file_name')!r}, is at none of the usual places. Say where: "
        f"coco:{os.path.join(folder, name)}@IMAGE_DIR."
        for folder, name, coco in _coco_files(path)
    )


def _split_of(name: str, folder: str, path: str) -> str:
    found = re.search(r"trainval|train|minival|valid|val|test", name.lower())
    if found:
        return found[0]
    inner = os.path.basename(folder)
    return inner if folder != path and inner != "annotations" else name.removesuffix(".json")


def _picture_folder(coco: dict, path: str, folder: str, split: str) -> str | None:
    """Returns the first of the usual folders that has the file's first picture; None if none has."""
    first = str(coco["images"][0].get("file_name", ""))
    names = (
        "images",
        "data",
        split,
        f"images/{split}",
        f"{split}/images",
        f"{split}2017",
        f"images/{split}2017",
    )
    places = [folder, path, *(os.path.join(path, name) for name in names)]
    places += [os.path.join(folder, "images")]
    return next((place for place in places if PathManager.isfile(os.path.join(place, first))), None)
