"""Telling what a check found: each finding, tables of kinds and classes, and what was repaired."""

from __future__ import annotations

from collections import Counter, defaultdict

from tabulate import tabulate

from .checker import Checked
from .kinds import KINDS

__all__ = ["class_table", "format_findings", "format_repairs", "kind_table"]

# COCO's bounds of small and medium objects, in square pixels.
_SMALL, _MEDIUM = 32**2, 96**2


def format_findings(checked: Checked, limit: int) -> list[str]:
    """Returns one line for each finding, errors first, at most `limit` of each kind; 0 for all."""
    by_kind = defaultdict(list)
    for finding in checked.findings:
        by_kind[finding.kind].append(finding)
    lines = []
    for kind in sorted(by_kind, key=lambda kind: (KINDS[kind][0], [*KINDS].index(kind))):
        found = by_kind[kind]
        shown = found[:limit] if limit else found
        lines += [str(finding) for finding in shown]
        if len(shown) < len(found):
            lines.append(f"{KINDS[kind][0]}: {kind}: and {len(found) - len(shown)} more (--all shows them)")
    return lines


def kind_table(checked: Checked) -> str:
    """Returns a table of the kinds that were found."""
    counts = Counter(finding.kind for finding in checked.findings)
    rows = [(count, KINDS[kind][0], kind, KINDS[kind][1]) for kind, count in counts.most_common()]
    rows.sort(key=lambda row: row[1])
    return tabulate(rows, headers=("found", "", "kind", "what it means"), tablefmt="simple")


def class_table(checked: Checked) -> str:
    """Returns a table of the good objects by class and size; the bounds are COCO's, 32 x 32 and 96 x 96."""
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
    """Returns one line for each thing that the repaired set has otherwise, and the sums."""
    changed = [finding for finding in checked.findings if finding.action]
    changed.sort(key=lambda finding: finding.severity)
    shown = changed[:limit] if limit else changed
    lines = [f"repaired: {finding.place}: {finding.action} ({finding.kind})" for finding in shown]
    if len(shown) < len(changed):
        lines.append(f"repaired: and {len(changed) - len(shown)} more (--all shows them)")
    content = checked.repaired
    lines.append(
        f"kept {len(content['images'])} of {checked.num_images} images and {len(content['annotations'])} of "
        f"{checked.num_annotations} annotations"
    )
    return lines
