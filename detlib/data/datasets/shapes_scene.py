"""The pictures of the generated shapes data set: what is on one, and how it is drawn.

All geometry and colour is computed in integers, and the random numbers come from numpy's `RandomState`, whose
streams are frozen. So a picture depends on nothing but its seed: not on machine, numpy or a drawing library.

Lengths are in sub-pixels, `UNIT` to a pixel, in a frame whose origin is the picture's top left corner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["KINDS", "KEYPOINTS", "RECTANGLES", "STUFF", "Scene", "Shape", "draw_scene", "sample_scene"]

KINDS = ("circle", "square", "triangle")
RECTANGLES = ("brick", "plank")
KEYPOINTS = ("center", "top", "left", "right", "bottom")
STUFF = ("grass", "sand", "water")

UNIT = 16
_ONE = 1 << 14  # what stands for 1.0 in the tables of directions
_STUFF_COLORS = np.array([(60, 130, 55), (196, 170, 112), (50, 105, 165)], dtype=np.int64)
_MAX_TILT = 20  # degrees, for squares and triangles
_MAX_SHAPES = 5
_MAX_OVERLAP = 10  # the part of the smaller of two boxes that may be hidden, in percent
_MIN_CONTRAST = 170  # between a shape and the ground it may lie on: sum of differences over R, G and B


def _direction(degrees: float) -> tuple[int, int]:
    """Returns the unit vector at an angle, clockwise from the right, in integers."""
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
_LENGTHS = (2, 5)  # of a brick and of a plank, as multiples of their height
_TILTS = {degrees: _direction(degrees) for degrees in range(-_MAX_TILT, _MAX_TILT + 1)}


@dataclass(frozen=True)
class Shape:
    """One thing in a picture.

    Attributes:
        kind: index into `KINDS`, or into `RECTANGLES`.
        outline: (P, 2) int64, the convex polygon's corners in sub-pixels, clockwise.
        keypoints: (5, 2) int64, in sub-pixels, in the order of `KEYPOINTS`; (0, 2) for rectangles.
        color: (3,) int64, RGB.
        rotated_box: of a rectangle, center x, center y, width and height in sub-pixels, and the angle in
            degrees, counter-clockwise.
    """

    kind: int
    outline: np.ndarray
    keypoints: np.ndarray
    color: np.ndarray
    rotated_box: tuple[int, int, int, int, int] | None = None

    @property
    def box(self) -> np.ndarray:
        """(4,) int64: x0, y0, x1, y1 in sub-pixels."""
        return np.concatenate([self.outline.min(axis=0), self.outline.max(axis=0)])


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
        size: height and width in pixels.
        grounds: the two kinds of ground, as indices into `STUFF`, and their colours, (2, 3) int64.
        border: a, b, c: the second ground is where a * x + b * y > c, in pixels.
        shapes: from back to front.
    """

    size: int
    grounds: tuple[int, int]
    ground_colors: np.ndarray
    border: tuple[int, int, int]
    shapes: list[Shape]


def _integer(random: np.random.RandomState, low: int, high: int) -> int:
    """Returns a random integer from `low` to `high`, both included."""
    return int(random.randint(low, high + 1, dtype=np.int64))


def sample_scene(random: np.random.RandomState, size: int, rectangles: bool = False) -> Scene:
    """Invents a picture of `size` x `size` pixels, of `KINDS` or of `RECTANGLES`."""
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


def _sample_shape(random: np.random.RandomState, size: int, ground_colors: np.ndarray) -> Shape:
    kind = _integer(random, 0, len(KINDS) - 1)
    name = KINDS[kind]
    radius = _integer(random, size * UNIT // 10, size * UNIT // 4)
    cos, sin = _TILTS[0 if name == "circle" else _integer(random, -_MAX_TILT, _MAX_TILT)]
    margin = radius + UNIT
    center = np.array([_integer(random, margin, size * UNIT - margin) for _ in range(2)])
    turn = np.array([[cos, sin], [-sin, cos]], dtype=np.int64)

    def place(points: list[tuple[int, int]]) -> np.ndarray:
        turned = np.array(points, dtype=np.int64) @ turn
        return center + (turned * radius + _ONE * _ONE // 2) // (_ONE * _ONE)

    color = _sample_color(random, ground_colors)
    return Shape(kind, place(_OUTLINES[name]), place(_KEYPOINTS_OF[name]), color)


def _sample_rectangle(random: np.random.RandomState, size: int, ground_colors: np.ndarray) -> Shape:
    """A rectangle of any direction: its longer sides are the width, and its angle is from -90 to 89."""
    kind = _integer(random, 0, len(RECTANGLES) - 1)
    half_width = _integer(random, size * UNIT // 8, size * UNIT // 4)
    half_height = half_width // _LENGTHS[kind]
    angle = _integer(random, -90, 89)
    cos, sin = _direction(angle)
    margin = half_width + half_height + UNIT
    center = np.array([_integer(random, margin, size * UNIT - margin) for _ in range(2)])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.int64) * [half_width, half_height]
    turned = corners @ np.array([[cos, -sin], [sin, cos]], dtype=np.int64)
    outline = center + (turned + _ONE // 2) // _ONE
    box = (int(center[0]), int(center[1]), 2 * half_width, 2 * half_height, angle)
    color = _sample_color(random, ground_colors)
    return Shape(kind, outline, np.zeros((0, 2), dtype=np.int64), color, box)


def _sample_color(random: np.random.RandomState, ground_colors: np.ndarray) -> np.ndarray:
    while True:
        color = random.randint(0, 256, size=3, dtype=np.int64)
        if np.abs(ground_colors - color).sum(axis=1).min() >= _MIN_CONTRAST:
            return color


def _overlap_too_much(box: np.ndarray, other: np.ndarray) -> bool:
    width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    smaller = min(int(np.prod(b[2:] - b[:2])) for b in (box, other))
    return width > 0 and height > 0 and 100 * int(width) * int(height) > _MAX_OVERLAP * smaller


def draw_scene(random: np.random.RandomState, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a picture.

    Returns:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8: 0 where a shape is, else 1 + the index into `STUFF`.
        owners: (H, W) int64: which of the scene's shapes is seen there, -1 for the ground.
    """
    size = scene.size
    y, x = np.mgrid[:size, :size]
    a, b, c = scene.border
    side = (a * x + b * y > c).astype(np.int64)
    image = np.stack([_texture(random, kind, x, y) for kind in scene.grounds])
    image = np.take_along_axis(image, side[None], axis=0)[0][..., None] + scene.ground_colors[side]
    labels = 1 + np.array(scene.grounds)[side]
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
    """Returns how many of each pixel's 2 x 2 sample points lie in a clockwise convex polygon.

    Args:
        outline: (P, 2) int64, in sub-pixels.
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


def _texture(random: np.random.RandomState, kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the brightness that a kind of ground adds to its colour, (H, W) int64."""
    size = len(x)
    if STUFF[kind] == "water":
        period = _integer(random, 6, 14)
        waves = (2 * y + np.abs(x % 16 - 8) // 2) % (2 * period)
        return 36 * np.abs(waves - period) // period - 18
    grain = 1 if STUFF[kind] == "grass" else 4
    cells = random.randint(-20, 21, size=(-(-size // grain),) * 2, dtype=np.int64)
    return cells[y // grain, x // grain]
