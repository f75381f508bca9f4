"""Conversion of a dataset into another annotation format, with its images.

python -m detlib.data.convert URI_OR_NAME --to FORMAT OUT [--split train] [--link]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.formats.base import FORMATS
from detlib.data.formats.writing import ConversionSource
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager, is_remote

__all__ = ["convert_dataset", "main"]

logger = logging.getLogger(__name__)


def convert_dataset(
    name: str, to: str, out: str, *, split: str = "train", link: bool = False, masks: str = "auto"
) -> str:
    """Write a dataset into a folder, in another format.

    A folder may take several splits, one call each; they must have the same classes.

    Args:
        name: a dataset URI or a registered name.
        to: a format with a writer, such as "coco"; see docs/data.md.
        out: the output folder, created if needed; may be in an object store.
        split: name of the split in the result.
        link: create symbolic links to the images instead of copies.
        masks: for formats where an object has either a box or a polygon: "polygons" writes polygons, "boxes"
            writes boxes, "auto" writes polygons only where their extent is the box, so that no box changes.

    Returns:
        The URI of the result.

    Raises:
        ValueError: An argument is not one of those above, or the format cannot hold the data.
        KeyError, FileNotFoundError: The dataset does not exist.
    """
    writers = {f.name: f for f in FORMATS.values() if f.write is not None}
    if to not in writers:
        raise ValueError(f"to must be one of {', '.join(writers)}, not {to!r}.")
    if masks not in ("auto", "polygons", "boxes"):
        raise ValueError(f"masks must be 'auto', 'polygons' or 'boxes', not {masks!r}.")
    dicts = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise ValueError(f"Dataset {name!r} has no thing_classes in its metadata: there is nothing to write.")
    annotations = (a for record in dicts for a in record.get("annotations", ()))
    if not writers[to].holds_rotated_boxes and any(a["bbox_mode"] == BoxMode.XYWHA_ABS for a in annotations):
        able = " or ".join(f"--to {f.name}" for f in writers.values() if f.holds_rotated_boxes)
        raise ValueError(f"Dataset {name!r} has rotated boxes; only {able} can hold them.")
    source = ConversionSource(name, split, dicts, metadata, _stems(dicts))
    write = writers[to].write
    assert write is not None, "`writers` are the formats that can write"
    uri, paths = write(source, out, masks)
    for record, path in zip(dicts, paths):
        _transfer(record["file_name"], path, link)
    for what, count in source.lost.items():
        logger.warning("%s cannot hold everything: %d %s", to, count, what)
    logger.info("Wrote %d images of %s into %s; its URI is %s", len(dicts), name, out, uri)
    return uri


def _stems(dicts: list[dict]) -> list[str]:
    """Return a unique name for each image, with its folders if several files have the same name."""
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
    """Convert and return the exit code: 0, or 2 for data that cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="python -m detlib.data.convert",
        description="Convert a dataset into another annotation format, with its images.",
    )
    parser.add_argument("dataset", help="dataset URI, such as dir:PATH@train, or a registered name")
    parser.add_argument(
        "--to", required=True, choices=[f.name for f in FORMATS.values() if f.write], help="format"
    )
    parser.add_argument("out", metavar="OUT", help="output folder")
    parser.add_argument("--split", default="train", help="name of the split in the result (train)")
    parser.add_argument("--link", action="store_true", help="link to the images instead of copying them")
    parser.add_argument(
        "--masks",
        default="auto",
        choices=("auto", "polygons", "boxes"),
        help="what to write in formats that store either a box or a polygon per object; auto writes polygons "
        "only where that changes no box (auto)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        uri = convert_dataset(
            args.dataset, args.to, args.out, split=args.split, link=args.link, masks=args.masks
        )
    except (OSError, KeyError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
