"""A color map of easily distinguishable colors, for drawing.

The first seven are MATLAB's default line colors, followed by grays, pure hues, a grid through the color cube
in thirds, and ramps. Indices give the same colors as in other detection libraries.
"""

import itertools
import random

import numpy as np

__all__ = ["colormap", "random_color", "random_colors"]


def _build() -> np.ndarray:
    lines = [
        (0.0, 0.447, 0.741),
        (0.85, 0.325, 0.098),
        (0.929, 0.694, 0.125),
        (0.494, 0.184, 0.556),
        (0.466, 0.674, 0.188),
        (0.301, 0.745, 0.933),
        (0.635, 0.078, 0.184),
    ]
    third, two_thirds = 0.333, 0.667
    ramp = (0.167, third, 0.5, two_thirds, 0.833, 1.0)
    hues = [(1, 0, 0), (1, 0.5, 0), (0.749, 0.749, 0), (0, 1, 0), (0, 0, 1), (two_thirds, 0, 1)]
    cube: list[tuple[float, float, float]] = [
        (r, g, 0) for r, g in itertools.product((third, two_thirds, 1), repeat=2)
    ]
    for blue in (0.5, 1):
        plane = itertools.product((0, third, two_thirds, 1), repeat=2)
        cube += [(r, g, blue) for r, g in plane if (r, g) != (0, 0) and (r, g, blue) != (1, 1, 1)]
    ramps = [(r, 0, 0) for r in ramp[1:]] + [(0, g, 0) for g in ramp] + [(0, 0, b) for b in ramp]
    grays = [(v, v, v) for v in (0, 0.143, 0.857, 1)]
    return np.array(
        [*lines, (0.3, 0.3, 0.3), (0.6, 0.6, 0.6), *hues, *cube, *ramps, *grays], dtype=np.float32
    )


_COLORS = _build()  # (74, 3), RGB in [0, 1]


def colormap(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """Return all colors.

    Args:
        rgb: whether the order is RGB instead of BGR.
        maximum: value of full brightness, 255 or 1.

    Returns:
        (74, 3) float32 array in [0, maximum].
    """
    if maximum not in (1, 255):
        raise ValueError(f"maximum must be 1 or 255, got {maximum!r}.")
    return np.ascontiguousarray(_COLORS if rgb else _COLORS[:, ::-1]) * np.float32(maximum)


def random_color(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """Return a random color, (3,) float32, from numpy's global generator; arguments as in `colormap`."""
    return colormap(rgb, maximum)[np.random.randint(len(_COLORS))]


def random_colors(N: int, rgb: bool = False, maximum: int = 255) -> list[np.ndarray]:
    """Return N random colors, each (3,) float32, without repetition as long as possible; see `colormap`."""
    colors = colormap(rgb, maximum)
    order: list[int] = []
    while len(order) < N:
        order += random.sample(range(len(colors)), min(N - len(order), len(colors)))
    return [colors[i] for i in order]
