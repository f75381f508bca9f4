"""The command `python -m detlib.data.check`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from detlib.data.catalog import DatasetCatalog, find_address
from detlib.utils.file_io import PathManager

from .checker import Checked, check_dataset
from .report import class_table, format_findings, format_repairs, kind_table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detlib.data.check",
        description="Reads all of a data set and reports all that is wrong with it. The exit code is 1 if "
        "there are errors, 0 with warnings only.",
    )
    parser.add_argument("dataset", help="an address, such as coco:ANN.json@DIR or dir:PATH, or a known name")
    parser.add_argument("--fix", metavar="OUT.json", help="write the repaired set in COCO's format")
    parser.add_argument("--all", action="store_true", help="show all findings, not 20 of each kind")
    parser.add_argument("--no-pictures", action="store_true", help="look at the annotations only: fast")
    return parser


def _write(checked: Checked, path: str) -> None:
    folder = os.path.dirname(path)
    if folder:
        PathManager.mkdirs(folder)
    with PathManager.open(path, "w") as file:
        file.write(json.dumps(checked.repaired))
    print(f"The repaired set is in {path}; its address is coco:{path}@{checked.image_root or '.'}")


def main(argv: list[str] | None = None) -> int:
    """Checks, prints, and returns the exit code: 1 with errors, 2 for a data set that is not there, or a file
    that cannot be written."""
    args = _parser().parse_args(argv)
    try:
        checked = check_dataset(args.dataset, pictures=not args.no_pictures)
    except (OSError, KeyError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        return 2
    if args.dataset not in DatasetCatalog and args.dataset.startswith("dir:"):
        print(find_address(args.dataset).explain())
    limit = 0 if args.all else 20
    for line in format_findings(checked, limit):
        print(line)
    num_warnings = len(checked.findings) - checked.num_errors
    print(f"\n{checked.num_images} images, {checked.num_annotations} annotations in {checked.file}")
    if checked.findings:
        print(f"\n{kind_table(checked)}")
    if checked.repaired.get("categories"):
        print(f"\nWhat is good:\n{class_table(checked)}")
    print(f"\n{checked.num_errors} errors, {num_warnings} warnings")
    if args.fix:
        print("", *format_repairs(checked, limit), sep="\n")
        try:
            _write(checked, args.fix)
        except OSError as error:
            print(f"error: {args.fix} cannot be written: {error}", file=sys.stderr)
            return 2
    return int(checked.num_errors > 0)


if __name__ == "__main__":
    sys.exit(main())
