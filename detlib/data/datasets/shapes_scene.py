"""The images of the generated shapes dataset: sampling a scene, and drawing it.

All geometry and color is computed in integers, and the random numbers come from numpy's `RandomState`, whose
streams are frozen. An image therefore depends on its seed only, not on the machine or on the version of any
library.

Lengths are in subpixels, `UNIT` per pixel. The origin is the top left corner of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["KEYPOINTS", "RECTANGLES", "SHAPES", "STUFF", "Scene", "Shape", "draw_scene", "sample_scene"]

SHAPES = ("circle", "square", "triangle")
RECTANGLES = ("brick", "plank")
KEYPOINTS = ("center", "top", "left", "right", "bottom")
STUFF = ("grass", "sand", "water")

UNIT = 16
_ONE = 1 << 14  # represents 1.0 in the tables of directions
_STUFF_COLORS = np.array([(60, 130, 55), (196, 170, 112), (50, 105, 165)], dtype=np.int64)
_MAX_TILT = 20  # degrees, for squares and triangles
_MAX_SHAPES = 5
_MAX_OVERLAP = 10  # of two boxes, in percent of the smaller one
_MIN_CONTRAST = 170  # between a shape and both backgrounds: sum of differences over R, G and B


def _direction(degrees: float) -> tuple[int, int]:
    """Return the unit vector at an angle, clockwise from the right, in integers."""
    radians = math.radians(degrees)
    return round(math.cos(radians) * _ONE), round(math.sin(radians) * _ONE)


_OUTLINES = {
    "circle": [_direction(15 * i) for i in range(24)],
    "square": [_direction(45 + 90 * i) for i in range(4)],
    "triangle": [_direction(-90 + 120 * i) for i in range(3)],
}
_HALF = _ONE // 2
_CORNER = _OUTLINES["square"][0][0]
_BASE = _OUTLINES["triangle"][1][0]
_KEYPOINTS_OF = {
    "circle": [(0, 0), (0, -_ONE), (-_ONE, 0), (_ONE, 0), (0, _ONE)],
    "square": [(0, 0), (0, -_CORNER), (-_CORNER, 0), (_CORNER, 0), (0, _CORNER)],
    "triangle": [(0, 0), (0, -_ONE), (-_BASE, _HALF), (_BASE, _HALF), (0, _HALF)],
}
_LENGTHS = (2, 5)  # of a brick and a plank, as multiples of their height
_TILTS = {degrees: _direction(degrees) for degrees in range(-_MAX_TILT, _MAX_TILT + 1)}


@dataclass(frozen=True)
class Shape:
    """One object in an image.

    Attributes:
        category: index into `SHAPES` or `RECTANGLES`.
        outline: (P, 2) int64, corners of the convex polygon in subpixels, clockwise.
        keypoints: (5, 2) int64, in subpixels, in the order of `KEYPOINTS`; (0, 2) for rectangles.
        color: (3,) int64, RGB.
        rotated_box: for rectangles, center x, center y, width and height in subpixels, and the angle in
            degrees, counter-clockwise.
    """

    category: int
    outline: np.ndarray
    keypoints: np.ndarray
    color: np.ndarray
    rotated_box: tuple[int, int, int, int, int] | None = None

    @property
    def box(self) -> np.ndarray:
        """Axis-aligned box: (4,) int64, x0, y0, x1, y1 in subpixels."""
        return np.concatenate([self.outline.min(axis=0), self.outline.max(axis=0)])


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Attributes:
        size: height and width in pixels.
        backgrounds: the two backgrounds, as indices into `STUFF`.
        background_colors: (2, 3) int64, RGB.
        border: a, b, c: the second background is where a * x + b * y > c, in pixels.
        shapes: from back to front.
    """

    size: int
    backgrounds: tuple[int, int]
    background_colors: np.ndarray
    border: tuple[int, int, int]
    shapes: list[Shape]


def _integer(random: np.random.RandomState, low: int, high: int) -> int:
    """Return a random integer from `low` to `high`, both included."""
    return int(random.randint(low, high + 1, dtype=np.int64))


def sample_scene(random: np.random.RandomState, size: int, rectangles: bool = False) -> Scene:
    """Sample the content of an image of `size` x `size` pixels, with `SHAPES` or `RECTANGLES`."""
    first = _integer(random, 0, len(STUFF) - 1)
    second = (first + _integer(random, 1, len(STUFF) - 1)) % len(STUFF)
    colors = _STUFF_COLORS[[first, second]] + random.randint(-18, 19, size=(2, 3), dtype=np.int64)
    a, b = _direction(_integer(random, 0, 359))
    x, y = _integer(random, size // 4, 3 * size // 4), _integer(random, size // 4, 3 * size // 4)
    shapes: list[Shape] = []
    wanted = _integer(random, 1, _MAX_SHAPES)
    for _ in range(4 * wanted):
        shape = (_sample_rectangle if rectangles else _sample_shape)(random, size, colors)
        if not any(_overlap_too_much(shape.box, other.box) for other in shapes):
            shapes.append(shape)
        if len(shapes) == wanted:
            break
    return Scene(size, (first, second), colors, (a, b, a * x + b * y), shapes)


def _sample_shape(random: np.random.RandomState, size: int, background_colors: np.ndarray) -> Shape:
    category = _integer(random, 0, len(SHAPES) - 1)
    name = SHAPES[category]
    radius = _integer(random, size * UNIT // 10, size * UNIT // 4)
    cos, sin = _TILTS[0 if name == "circle" else _integer(random, -_MAX_TILT, _MAX_TILT)]
    margin = radius + UNIT
    center = np.array([_integer(random, margin, size * UNIT - margin) for _ in range(2)])
    rotation = np.array([[cos, sin], [-sin, cos]], dtype=np.int64)

    def transform(points: list[tuple[int, int]]) -> np.ndarray:
        rotated = np.array(points, dtype=np.int64) @ rotation
        return center + (rotated * radius + _ONE * _ONE // 2) // (_ONE * _ONE)

    color = _sample_color(random, background_colors)
    return Shape(category, transform(_OUTLINES[name]), transform(_KEYPOINTS_OF[name]), color)


def _sample_rectangle(random: np.random.RandomState, size: int, background_colors: np.ndarray) -> Shape:
    """Sample a rectangle of any direction. The longer side is the width, the angle is from -90 to 89."""
    category = _integer(random, 0, len(RECTANGLES) - 1)
    half_width = _integer(random, size * UNIT // 8, size * UNIT // 4)
    half_height = half_width // _LENGTHS[category]
    angle = _integer(random, -90, 89)
    cos, sin = _direction(angle)
    margin = half_width + half_height + UNIT
    center = np.array([_integer(random, margin, size * UNIT - margin) for _ in range(2)])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.int64) * [half_width, half_height]
    rotated = corners @ np.array([[cos, -sin], [sin, cos]], dtype=np.int64)
    outline = center + (rotated + _ONE // 2) // _ONE
    box = (int(center[0]), int(center[1]), 2 * half_width, 2 * half_height, angle)
    color = _sample_color(random, background_colors)
    return Shape(category, outline, np.zeros((0, 2), dtype=np.int64), color, box)


def _sample_color(random: np.random.RandomState, background_colors: np.ndarray) -> np.ndarray:
    while True:
        color = random.randint(0, 256, size=3, dtype=np.int64)
        if np.abs(background_colors - color).sum(axis=1).min() >= _MIN_CONTRAST:
            return color


def _overlap_too_much(box: np.ndarray, other: np.ndarray) -> bool:
    width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    smaller = min(int(np.prod(b[2:] - b[:2])) for b in (box, other))
    return width > 0 and height > 0 and 100 * int(width) * int(height) > _MAX_OVERLAP * smaller


def draw_scene(random: np.random.RandomState, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw an image.

    Returns:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8: 0 for shapes, else 1 + the index into `STUFF`.
        owners: (H, W) int64: index of the visible shape, -1 for the background.
    """
    size = scene.size
    y, x = np.mgrid[:size, :size]
    a, b, c = scene.border
    side = (a * x + b * y > c).astype(np.int64)
    image = np.stack([_texture(random, stuff, x, y) for stuff in scene.backgrounds])
    image = np.take_along_axis(image, side[None], axis=0)[0][..., None] + scene.background_colors[side]
    labels = 1 + np.array(scene.backgrounds)[side]
    owners = np.full((size, size), -1, dtype=np.int64)
    for i, shape in enumerate(scene.shapes):
        (x0, y0), (x1, y1) = shape.box[:2] // UNIT, -(-shape.box[2:] // UNIT)
        region = (slice(y0, y1), slice(x0, x1))
        covered = _coverage(shape.outline, x0, y0, x1, y1)
        paint = shape.color + random.randint(-10, 11, size=(*covered.shape, 1), dtype=np.int64)
        weight = covered[..., None]
        image[region] = (image[region] * (4 - weight) + paint * weight) // 4
        labels[region][covered >= 2] = 0
        owners[region][covered >= 2] = i
    return np.clip(image, 0, 255).astype(np.uint8), labels.astype(np.uint8), owners


def _coverage(outline: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Return how many of the 2 x 2 sample points of each pixel are in a clockwise convex polygon.

    Args:
        outline: (P, 2) int64, in subpixels.
        x0, y0, x1, y1: the region in pixels.

    Returns:
        (y1 - y0, x1 - x0) int64, from 0 to 4.
    """
    step = UNIT // 2
    xs = np.arange(x0 * UNIT + step // 2, x1 * UNIT, step)
    ys = np.arange(y0 * UNIT + step // 2, y1 * UNIT, step)[:, None]
    inside = np.ones((len(ys), len(xs)), dtype=bool)
    for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, axis=0)):
        inside &= (bx - ax) * (ys - ay) >= (by - ay) * (xs - ax)
    return inside.reshape(y1 - y0, 2, x1 - x0, 2).sum(axis=(1, 3))


def _texture(random: np.random.RandomState, stuff: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the brightness that a background adds to its color, (H, W) int64."""
    size = len(x)
    if STUFF[stuff] == "water":
        period = _integer(random, 6, 14)
        waves = (2 * y + np.abs(x % 16 - 8) // 2) % (2 * period)
        return 36 * np.abs(waves - period) // period - 18
    grain = 1 if STUFF[stuff] == "grass" else 4
    cells = random.randint(-20, 21, size=(-(-size // grain),) * 2, dtype=np.int64)
    return cells[y // grain, x // grain]
