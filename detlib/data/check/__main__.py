"""The command `python -m detlib.data.check`: prints findings, tables and repairs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict

from tabulate import tabulate

from detlib.data.check.checker import Checked, check_dataset
from detlib.data.formats.coco import coco_uri
from detlib.data.formats.findings import FINDING_KINDS
from detlib.utils.file_io import PathManager

# COCO's bounds of small and medium objects, in square pixels.
_SMALL, _MEDIUM = 32**2, 96**2


def format_findings(checked: Checked, limit: int) -> list[str]:
    """Return one line for each finding, errors first, at most `limit` of each kind; 0 for all."""
    by_kind = defaultdict(list)
    for finding in checked.findings:
        by_kind[finding.kind].append(finding)
    lines = []
    for kind in sorted(by_kind, key=lambda kind: (FINDING_KINDS[kind][0], [*FINDING_KINDS].index(kind))):
        found = by_kind[kind]
        shown = found[:limit] if limit else found
        lines += [str(finding) for finding in shown]
        if len(shown) < len(found):
            severity, hidden = FINDING_KINDS[kind][0], len(found) - len(shown)
            lines.append(f"{severity}: {kind}: and {hidden} more (--all shows them)")
    return lines


def kind_table(checked: Checked) -> str:
    """Return a table of the kinds of findings, with their numbers and meanings."""
    counts = Counter(finding.kind for finding in checked.findings)
    rows = []
    for kind, count in counts.most_common():
        severity, meaning = FINDING_KINDS[kind]
        rows.append((count, severity, kind, meaning))
    rows.sort(key=lambda row: row[1])
    return tabulate(rows, headers=("found", "", "kind", "meaning"), tablefmt="simple")


def class_table(checked: Checked) -> str:
    """Return a table of the valid objects by class and COCO's size ranges (bounds 32 x 32 and 96 x 96)."""
    content = checked.repaired
    names = {category["id"]: category["name"] for category in content["categories"]}
    counts = {key: [0] * 5 for key in names}
    images = defaultdict(set)
    for annotation in content["annotations"]:
        row, area = counts[annotation["category_id"]], annotation["area"]
        images[annotation["category_id"]].add(annotation["image_id"])
        row[0] += 1
        row[1 if annotation["iscrowd"] else 2 if area < _SMALL else 3 if area < _MEDIUM else 4] += 1
    rows = [(names[key], len(images[key]), *row) for key, row in counts.items()]
    rows.append(("all", len(content["images"]), *(sum(row[i] for row in counts.values()) for i in range(5))))
    headers = ("class", "images", "objects", "crowds", "small", "medium", "large")
    return tabulate(rows, headers=headers, tablefmt="simple")


def format_repairs(checked: Checked, limit: int) -> list[str]:
    """Return one line for each change in the repaired dataset, at most `limit`, and the totals."""
    changed = [finding for finding in checked.findings if finding.action]
    changed.sort(key=lambda finding: finding.severity)
    shown = changed[:limit] if limit else changed
    lines = [f"repaired: {finding.location}: {finding.action} ({finding.kind})" for finding in shown]
    if len(shown) < len(changed):
        lines.append(f"repaired: and {len(changed) - len(shown)} more (--all shows them)")
    content = checked.repaired
    lines.append(
        f"kept {len(content['images'])} of {checked.num_images} images and {len(content['annotations'])} of "
        f"{checked.num_annotations} annotations"
    )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detlib.data.check",
        description="Read an entire dataset and report all its faults. The exit code is 1 if there are "
        "errors, 0 with warnings only, and 2 for a dataset that does not exist.",
    )
    parser.add_argument("dataset", help="dataset URI, such as dir:PATH@train, or a registered name")
    parser.add_argument("--fix", metavar="OUT.json", help="write the repaired dataset in COCO's format")
    parser.add_argument("--all", action="store_true", help="show all findings, not 20 of each kind")
    parser.add_argument("--no-images", action="store_true", help="check the annotations only: fast")
    return parser


def _print(*lines: str) -> None:
    """Print lines to standard output, whose encoding may lack characters of names and file paths."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def _write(checked: Checked, path: str) -> None:
    folder = os.path.dirname(path)
    if folder:
        PathManager.mkdirs(folder)
    with PathManager.open(path, "w") as file:
        file.write(json.dumps(checked.repaired))
    _print(f"The repaired dataset is in {path}; its URI is {coco_uri(path, checked.image_root)}")


def main(argv: list[str] | None = None) -> int:
    """Check a dataset, print the result, and return the exit code.

    Returns:
        0 without errors, 1 with errors, 2 if the dataset does not exist or a file cannot be written.
    """
    args = _parser().parse_args(argv)
    try:
        checked = check_dataset(args.dataset, images=not args.no_images)
    except (OSError, KeyError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        return 2
    if checked.note:
        _print(checked.note)
    limit = 0 if args.all else 20
    _print(*format_findings(checked, limit))
    num_warnings = len(checked.findings) - checked.num_errors
    _print(f"\n{checked.num_images} images, {checked.num_annotations} annotations in {checked.file}")
    if checked.findings:
        _print(f"\n{kind_table(checked)}")
    if checked.repaired.get("categories"):
        _print(f"\nValid objects:\n{class_table(checked)}")
    _print(f"\n{checked.num_errors} errors, {num_warnings} warnings")
    if args.fix:
        _print("", *format_repairs(checked, limit))
        try:
            _write(checked, args.fix)
        except OSError as error:
            print(f"error: {args.fix} cannot be written: {error}", file=sys.stderr)
            return 2
    return int(checked.num_errors > 0)


if __name__ == "__main__":
    sys.exit(main())
