"""Checks and repairs of the box, mask and keypoints of one annotation.

Each function takes a copy of the annotation, repairs it in place where possible, and returns it, or None if
it cannot be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from detlib.data.datasets.file_values import are_coordinates, is_coordinate
from detlib.structures.rle import rle_runs

__all__ = ["check_box", "check_keypoints", "check_segmentation", "states_center"]

Size = tuple[float, float] | None  # width and height of the image, if known
Report = Callable[..., None]  # kind, detail, action

_DROP = "annotation dropped"
# Boxes and polygons may extend beyond the image by this many pixels without a finding: those of COCO do.
_TOLERANCE = 1.0


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_numbers(values: Any) -> list | None:
    """Return a list of numbers, or of texts that are numbers, as numbers; None for anything else."""
    if not isinstance(values, list):
        return None
    numbers: list = []
    for value in values:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return None
        if not is_number(value):
            return None
        numbers.append(value)
    return numbers


def check_box(annotation: dict, size: Size, report: Report) -> dict | None:
    """Check `bbox`: (x, y, width, height), or (center x, center y, width, height, angle)."""
    kind, detail = _box_fault(annotation.get("bbox"))
    if kind == "bad-box" and (numbers := as_numbers(annotation["bbox"])) is not None:
        if not _box_fault(numbers)[0]:
            report(kind, detail, "texts read as numbers")
            annotation["bbox"], kind = numbers, ""
    if kind:
        extent = _mask_extent(annotation.get("segmentation"))
        if extent is None:
            report(kind, detail, _DROP)
            return None
        report(kind, detail, "box set to the extent of the mask")
        annotation["bbox"] = [extent[0], extent[1], extent[2] - extent[0], extent[3] - extent[1]]
    box = annotation["bbox"]
    if min(box[2], box[3]) < 1:
        report("box-below-one-pixel", f"the bbox is {box}")
    if size is None:
        return annotation
    return _compare_box_with_image(annotation, size, report)


def _box_fault(box: Any) -> tuple[str, str]:
    """Return kind and detail of a box's fault; empty if there is none."""
    if box is None:
        return "annotation-broken", "there is no 'bbox'"
    shown = f"the bbox is {box!r}"[:200]
    if not isinstance(box, list) or len(box) not in (4, 5) or not all(map(is_number, box)):
        return "bad-box", shown
    if not are_coordinates(box):
        return "box-not-finite", shown
    if not (box[2] > 0 and box[3] > 0):
        return "box-no-area", shown
    return "", ""


def _mask_extent(segmentation: Any) -> list[float] | None:
    """Return the extent [x0, y0, x1, y1] of valid polygons or of an RLE mask, or None."""
    if not isinstance(segmentation, dict):
        return _polygon_extent(_as_flat_polygons(segmentation) or segmentation)
    try:
        runs = rle_runs(segmentation)
    except ValueError:
        return None
    if not runs[1::2].any():
        return None
    from pycocotools import mask as mask_utils

    rle = segmentation
    if isinstance(rle["counts"], list):
        rle = mask_utils.frPyObjects(rle, *rle["size"])
    x, y, width, height = mask_utils.toBbox(rle).tolist()
    return [x, y, x + width, y + height]


def _as_flat_polygons(segmentation: Any) -> list | None:
    """Return polygons that tools write in another form as lists (x0, y0, x1, y1, ...), or None.

    The forms are a single flat list, points as pairs, and numbers as texts.
    """
    if not isinstance(segmentation, list) or not segmentation:
        return None
    if all(is_number(value) or isinstance(value, str) for value in segmentation):
        segmentation = [segmentation]
    elif all(_is_pair(point) for point in segmentation) and len(segmentation) >= 3:
        segmentation = [[value for point in segmentation for value in point]]
    flat = []
    for polygon in segmentation:
        if isinstance(polygon, list) and polygon and all(_is_pair(point) for point in polygon):
            polygon = [value for point in polygon for value in point]
        numbers = as_numbers(polygon)
        if numbers is None:
            return None
        flat.append(numbers)
    return flat


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and as_numbers(value) is not None


def _compare_box_with_image(annotation: dict, size: tuple[float, float], report: Report) -> dict | None:
    """Compare a valid box with the size of the image."""
    box, (width, height) = annotation["bbox"], size
    detail = f"the bbox is {box}, the image {width} x {height}"
    if len(box) == 5:
        if 0 <= box[0] <= width and 0 <= box[1] <= height:
            return annotation
        report("box-outside", detail, _DROP)
        return None
    x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    inside = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if not (inside[2] > inside[0] and inside[3] > inside[1]):
        report("box-outside", detail, _DROP)
        return None
    if inside != [x0, y0, x1, y1]:
        clipped = [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]
        if max(-x0, -y0, x1 - width, y1 - height) > _TOLERANCE:
            report("box-sticks-out", detail, f"box clipped to {clipped}")
        annotation["bbox"] = clipped
    return annotation


def check_segmentation(annotation: dict, size: Size, report: Report) -> dict | None:
    """Check `segmentation`: a list of polygons (x0, y0, x1, y1, ...), or an RLE mask."""
    segmentation = annotation.get("segmentation")
    if segmentation is None or segmentation in ([], {}):
        annotation.pop("segmentation", None)
        return annotation
    if isinstance(segmentation, dict):
        return _check_rle(annotation, size, report)
    flat = _as_flat_polygons(segmentation)
    if flat is not None and flat != segmentation and not all(_polygon_fault(p)[0] for p in flat):
        report("bad-segmentation", f"{segmentation!r}"[:100], "read as lists of numbers x0, y0, x1, y1, ...")
        annotation["segmentation"] = segmentation = flat
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        report("bad-segmentation", f"the segmentation is a {type(segmentation).__name__}", _DROP)
        return None
    kept = []
    for polygon in segmentation:
        kind, detail = _polygon_fault(polygon)
        if kind:
            report(kind, detail, "polygon dropped" if len(segmentation) > 1 else _DROP)
        else:
            kept.append(polygon if size is None else _clip_polygon(polygon, size, report))
    if not kept:
        return None
    annotation["segmentation"] = kept
    _compare_with_box(annotation, report)
    return annotation


def _polygon_fault(polygon: list) -> tuple[str, str]:
    """Return kind and detail of a polygon's fault; empty if there is none."""
    shown = f"{polygon[:8]}{'...' if len(polygon) > 8 else ''}"
    if not all(map(is_coordinate, polygon)):
        return "polygon-not-finite", shown
    if len(polygon) % 2:
        return "polygon-odd", f"{len(polygon)} values: {shown}"
    if len(polygon) < 6:
        return "polygon-too-short", f"{len(polygon) // 2} points: {shown}"
    if _on_one_line(polygon):
        return "polygon-no-area", shown
    return "", ""


def _on_one_line(polygon: list) -> bool:
    """Return whether all points are on one line. A self-crossing polygon may have area 0, too."""
    x0, y0 = polygon[:2]
    offsets = [(x - x0, y - y0) for x, y in zip(polygon[0::2], polygon[1::2])]
    far = max(offsets, key=lambda offset: offset[0] ** 2 + offset[1] ** 2)
    return all(abs(far[0] * y - far[1] * x) < 1e-9 for x, y in offsets)


def _clip_polygon(polygon: list, size: tuple[float, float], report: Report) -> list:
    """Move points outside the image to its edge."""
    clipped = [min(max(value, 0), size[i % 2]) for i, value in enumerate(polygon)]
    if max(abs(a - b) for a, b in zip(polygon, clipped)) <= _TOLERANCE:
        return polygon
    extent = _polygon_extent([polygon])
    report(
        "polygon-sticks-out", f"its extent is {extent}, the image {size[0]} x {size[1]}", "polygon clipped"
    )
    return polygon if _polygon_fault(clipped)[0] else clipped


def _polygon_extent(segmentation: Any) -> list[float] | None:
    """Return the extent [x0, y0, x1, y1] of all valid polygons, or None if there are none."""
    if not isinstance(segmentation, list):
        return None
    valid = [p for p in segmentation if isinstance(p, list) and not _polygon_fault(p)[0]]
    x, y = [v for p in valid for v in p[0::2]], [v for p in valid for v in p[1::2]]
    return [min(x), min(y), max(x), max(y)] if valid else None


def _compare_with_box(annotation: dict, report: Report) -> None:
    box = annotation["bbox"]
    if len(box) != 4:
        return
    extent = _polygon_extent(annotation["segmentation"])
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    off = max(abs(a - b) for a, b in zip(corners, cast(list[float], extent)))
    if off > max(5.0, 0.1 * max(box[2], box[3])):
        report(
            "mask-box-mismatch", f"the box is {corners}, the extent of the polygons {extent} (x0, y0, x1, y1)"
        )


def states_center(annotation: Any) -> bool | None:
    """Return whether the first two numbers of a box are its center, as its polygons show.

    Returns:
        True if the box fits its polygons only so, False if it does not; None without a box or polygons.
    """
    if not isinstance(annotation, dict) or _box_fault(annotation.get("bbox"))[0]:
        return None
    x, y, width, height = annotation["bbox"][:4]
    segmentation = annotation.get("segmentation")
    extent = _polygon_extent(segmentation) if len(annotation["bbox"]) == 4 else None
    if extent is None:
        return None

    def fits(left: float, top: float) -> bool:
        corners = (left, top, left + width, top + height)
        return max(abs(a - b) for a, b in zip(corners, extent)) <= max(2.0, 0.05 * max(width, height))

    return fits(x - width / 2, y - height / 2) and not fits(x, y)


def _check_rle(annotation: dict, size: Size, report: Report) -> dict | None:
    rle = annotation["segmentation"]
    try:
        runs = rle_runs(rle)
    except ValueError as error:
        report("rle-broken", str(error), _DROP)
        return None
    if size is not None and (rle["size"][1], rle["size"][0]) != size:
        report(
            "rle-wrong-size", f"[height, width] is {rle['size']}, the image is {size[1]} x {size[0]}", _DROP
        )
        return None
    if not runs[1::2].any():
        report("rle-empty", "the mask has no pixels", _DROP)
        return None
    return annotation


def check_keypoints(annotation: dict, size: Size, wanted: int | None, report: Report) -> dict | None:
    """Check `keypoints`, a flat list of x, y, visibility. `wanted` is the number that the category names."""
    keypoints = annotation.get("keypoints")
    if keypoints is None or keypoints == []:
        return annotation
    if not isinstance(keypoints, list) or len(keypoints) % 3 or (wanted and len(keypoints) != 3 * wanted):
        count = len(keypoints) if isinstance(keypoints, list) else repr(keypoints)
        named = f", the category names {wanted} keypoints" if wanted else ""
        report("keypoint-length", f"{count} values{named}", _DROP)
        return None
    if not all(map(is_coordinate, keypoints)):
        report("keypoint-not-finite", f"{keypoints[:9]}", _DROP)
        return None
    keypoints = annotation["keypoints"] = list(keypoints)
    odd = sorted({v for v in keypoints[2::3] if v not in (0, 1, 2)})
    if odd:
        report("keypoint-visibility", f"it is {odd[:5]}", "set to 2 for values above 0, else to 0")
        keypoints[2::3] = [v if v in (0, 1, 2) else 2 * (v > 0) for v in keypoints[2::3]]
    if size is not None:
        _check_inside(keypoints, size, report)
    labeled = sum(v > 0 for v in keypoints[2::3])
    if annotation.get("num_keypoints", labeled) != labeled:
        report(
            "keypoint-count", f"it is {annotation['num_keypoints']!r}, but {labeled} are labeled", "corrected"
        )
    annotation["num_keypoints"] = labeled
    return annotation


def _check_inside(keypoints: list, size: tuple[float, float], report: Report) -> None:
    for i in range(0, len(keypoints), 3):
        x, y, visibility = keypoints[i : i + 3]
        if visibility > 0 and not (
            -_TOLERANCE <= x <= size[0] + _TOLERANCE and -_TOLERANCE <= y <= size[1] + _TOLERANCE
        ):
            report(
                "keypoint-outside",
                f"keypoint {i // 3} is at ({x}, {y}), the image is {size[0]} x {size[1]}",
                "marked as not labeled",
            )
            keypoints[i : i + 3] = [0, 0, 0]
