"""The command `python -m detlib.data.prepare`."""

from __future__ import annotations

import argparse
import sys

from detlib.data.datasets.builtin import _root
from detlib.data.prepare.cityscapes import prepare_cityscapes
from detlib.data.prepare.label_maps import prepare_ade20k, prepare_coco_stuff
from detlib.data.prepare.lvis import prepare_lvis_cocofied

COMMANDS = {
    "ade20k": (prepare_ade20k, "label maps of ade20k_sem_seg_*: annotations_detectron2"),
    "cityscapes": (prepare_cityscapes, "labelTrainIds and cityscapes_panoptic_* of cityscapes_fine_*"),
    "coco-stuff": (prepare_coco_stuff, "panoptic_stuff_* of coco_*_panoptic_{separated,stuffonly}"),
    "lvis-cocofied": (prepare_lvis_cocofied, "lvis_v0.5_*_cocofied.json"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detlib.data.prepare",
        description="Derive files of built-in datasets that are not published from the downloads. Existing "
        "files are kept.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:14s} {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="the dataset, see below")
    parser.add_argument("--root", default=_root(), help="folder of the datasets (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="number of processes (default: the number of processors)")
    parser.add_argument("--overwrite", action="store_true", help="write existing files again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the files and return the exit code: 0, or 2 if the download is missing or malformed."""
    args = _parser().parse_args(argv)
    prepare, _ = COMMANDS[args.command]
    try:
        count = prepare(args.root, workers=args.workers, overwrite=args.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.command}: {count} files written below {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
