"""Rotated boxes and their corners, one box at a time, for the readers of annotations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["RotatedBox", "corners", "fit_rotated_box", "normalize_angle"]

RotatedBox = tuple[float, float, float, float, float]
"""Center x, center y, width, height in pixels, and the angle in degrees, counter-clockwise."""


def normalize_angle(box: RotatedBox) -> RotatedBox:
    """Return a rotated box with its angle in [-180, 180) degrees."""
    return (*box[:4], (box[4] + 180.0) % 360.0 - 180.0)


def corners(box: RotatedBox) -> list[tuple[float, float]]:
    """Return the four corners of a rotated box (center x, center y, width, height, angle in degrees)."""
    x, y, width, height, angle = box
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    offsets = [
        (-width / 2, -height / 2),
        (width / 2, -height / 2),
        (width / 2, height / 2),
        (-width / 2, height / 2),
    ]
    # The angle is counter-clockwise, and the y axis points down.
    return [(x + dx * c + dy * s, y - dx * s + dy * c) for dx, dy in offsets]


def fit_rotated_box(points: Sequence[tuple[float, float]]) -> RotatedBox:
    """Return the smallest rotated box around four corners.

    Args:
        points: the corners in order, in pixels. Those of a rectangle give this rectangle: its width is the
            length of the first side, and the angle is that of the first side.

    Returns:
        Center x, center y, width, height, and the angle in degrees, counter-clockwise, in [-180, 180).
    """
    array = np.array(points, dtype=np.float64)
    sides = np.roll(array, -1, axis=0) - array
    lengths = np.hypot(sides[:, 0], sides[:, 1])
    best: tuple[float, RotatedBox] | None = None
    for (dx, dy), length in zip(sides.tolist(), lengths.tolist()):
        if length == 0:
            continue
        c, s = dx / length, dy / length
        along, across = array @ [c, s], array @ [-s, c]
        width, height = float(np.ptp(along)), float(np.ptp(across))
        u, v = float(along.max() + along.min()) / 2, float(across.max() + across.min()) / 2
        box = normalize_angle((u * c - v * s, u * s + v * c, width, height, -math.degrees(math.atan2(s, c))))
        # The first side decides among boxes of equal area, but for rounding.
        if best is None or width * height < best[0] * (1 - 1e-6):
            best = width * height, box
    if best is None:
        return (float(array[0, 0]), float(array[0, 1]), 0.0, 0.0, 0.0)
    return best[1]
