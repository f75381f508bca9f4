"""From any data set to COCO's, Pascal VOC's or YOLO's format, with its pictures.

python -m detlib.data.convert ADDRESS_OR_NAME --to coco|voc|yolo OUT [--split train] [--link]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager, is_remote

from .convert_writers import write_coco, write_voc, write_yolo

__all__ = ["Source", "convert_dataset"]

logger = logging.getLogger(__name__)

_WRITERS: dict[str, Callable] = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@dataclass
class Source:
    """A data set that is to be written.

    Attributes:
        name: its address or name.
        split: what the split is called in the result.
        dicts: the data set in the standard format.
        metadata: its classes and keypoints.
        stems: a name for each picture, without folder and suffix.
        lost: how many of what the new format has no place for.
    """

    name: str
    split: str
    dicts: list[dict]
    metadata: Metadata
    stems: list[str]
    lost: Counter[str] = field(default_factory=Counter)

    def file_name(self, index: int) -> str:
        """Returns the new name of a picture, without folder."""
        return self.stems[index] + os.path.splitext(self.dicts[index]["file_name"])[1]

    def box(self, annotation: dict) -> list[float]:
        """Returns the box as (x0, y0, x1, y1).

        Raises:
            ValueError: it is a rotated one.
        """
        if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
            raise ValueError(f"Dataset {self.name!r} has rotated boxes; only --to coco can hold them.")
        box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        return [float(value) for value in box]


def convert_dataset(
    name: str, to: str, out: str, *, split: str = "train", link: bool = False, masks: str = "auto"
) -> str:
    """Writes a data set into a folder, in another format.

    A folder may take several splits, one call each; they must have the same classes.

    Args:
        name: an address, or a registered name.
        to: "coco", "voc" or "yolo".
        out: the folder, which is made if need be; may lie in an object store.
        split: what the split is called there.
        link: link to the pictures instead of copying them.
        masks: for "yolo": "polygons" writes polygons instead of boxes, "boxes" never does; "auto" writes
            polygons where that loses no box, i.e. each object has one and it has the box's extent.

    Returns:
        The address of what was written.

    Raises:
        ValueError: an argument is none of those above, or the format cannot hold the data.
        KeyError, FileNotFoundError: there is no such data set.
    """
    if to not in _WRITERS:
        raise ValueError(f"to must be one of {', '.join(_WRITERS)}, not {to!r}.")
    if masks not in ("auto", "polygons", "boxes"):
        raise ValueError(f"masks must be 'auto', 'polygons' or 'boxes', not {masks!r}.")
    dicts = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise ValueError(f"Dataset {name!r} has no thing_classes in its metadata: there is nothing to write.")
    source = Source(name, split, dicts, metadata, _stems(dicts))
    address, places = _WRITERS[to](source, out, masks)
    for record, place in zip(dicts, places):
        _transfer(record["file_name"], place, link)
    for what, count in source.lost.items():
        logger.warning("%s cannot hold everything: %d %s", to, count, what)
    logger.info("Wrote %d images of %s into %s; the address is %s", len(dicts), name, out, address)
    return address


def _stems(dicts: list[dict]) -> list[str]:
    """Names of the pictures, which become longer by their folders where several have one."""
    paths = [os.path.splitext(str(record["file_name"]))[0] for record in dicts]
    stems = [os.path.basename(path) for path in paths]
    if len(set(stems)) < len(stems):
        folder = os.path.commonprefix([os.path.dirname(path) + "/" for path in paths]).rpartition("/")[0]
        stems = [path[len(folder) :].strip("/").replace("/", "_") for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}_{i}" for i, stem in enumerate(stems)]
    return stems


def _transfer(source: str, target: str, link: bool) -> None:
    PathManager.mkdirs(os.path.dirname(target))
    if is_remote(source) or is_remote(target):
        with PathManager.open(source, "rb") as file, PathManager.open(target, "wb") as out:
            shutil.copyfileobj(file, out)
        return
    if os.path.lexists(target):
        if os.path.realpath(source) == os.path.realpath(target):
            return
        os.remove(target)
    if link:
        os.symlink(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit code: 0, or 2 for data that cannot be converted."""
    parser = argparse.ArgumentParser(prog="python -m detlib.data.convert", description=__doc__)
    parser.add_argument("dataset", help="an address, such as voc:DIR@train or dir:PATH, or a known name")
    parser.add_argument("--to", required=True, choices=[*_WRITERS], help="the format")
    parser.add_argument("out", metavar="OUT", help="the folder to write into")
    parser.add_argument("--split", default="train", help="what the split is called there (train)")
    parser.add_argument("--link", action="store_true", help="link to the pictures instead of copying them")
    parser.add_argument(
        "--masks",
        default="auto",
        choices=("auto", "polygons", "boxes"),
        help="yolo: polygons, boxes, or polygons where that loses no box (auto)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        address = convert_dataset(
            args.dataset, args.to, args.out, split=args.split, link=args.link, masks=args.masks
        )
    except (OSError, KeyError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
