"""Shared inputs and references of the operator tests."""

import torch

from tests.builders import random_rotated_boxes, random_scores

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def bilinear(plane, y, x):
    """Return the values of `plane` (C, H, W) at the points `y`, `x` (in cells, of one shape) as (C, *shape).

    Points up to one cell outside the feature map have the value of the border; points further outside are
    zero.
    """
    height, width = plane.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.floor().long(), x.floor().long()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    fy, fx = y - y0, x - x0
    upper = plane[:, y0, x0] * (1 - fx) + plane[:, y0, x1] * fx
    lower = plane[:, y1, x0] * (1 - fx) + plane[:, y1, x1] * fx
    return (upper * (1 - fy) + lower * fy) * inside


def feature_map(dtype=torch.float32, size=(2, 3, 12, 17), seed=0):
    """Return a feature map of uniform values in [0, 1)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rois(dtype=torch.float32):
    """Return boxes on two 48 x 68 images: inside, over each border, outside, tiny, empty, inverted, huge."""
    corners = [
        [4.0, 4.0, 30.0, 40.0], [0.0, 0.0, 68.0, 48.0], [-9.0, -7.0, 20.0, 11.0], [50.0, 30.0, 90.0, 70.0],
        [100.0, 100.0, 140.0, 120.0], [-60.0, 5.0, -20.0, 20.0], [10.3, 10.6, 10.9, 10.7],
        [20.0, 9.0, 20.0, 30.0], [33.0, 20.0, 21.0, 10.0], [1.5, 2.5, 66.25, 47.75],
        [-300.0, -90.0, 400.0, 150.0],
    ]  # fmt: skip
    image = torch.arange(len(corners), dtype=dtype)[:, None] % 2
    return torch.cat([image, torch.tensor(corners, dtype=dtype)], 1)


def rotated_boxes_and_scores(count, span=60.0, seed=0, dtype=torch.float32):
    """Return (N, 5) rotated boxes in a square of side `span`, and (N,) scores."""
    return random_rotated_boxes(count, (span, span), seed=seed, dtype=dtype), random_scores(
        count, seed, dtype
    )


def rotated_rois(dtype=torch.float32):
    """Return rotated boxes on two 48 x 68 images: inside, over each border, outside, tiny, empty, huge."""
    boxes = [
        [17.0, 22.0, 26.0, 36.0, 10.0], [34.0, 24.0, 68.0, 48.0, -30.0], [5.0, 2.0, 29.0, 18.0, 77.0],
        [70.0, 50.0, 41.0, 40.0, 44.0], [120.0, 110.0, 40.0, 20.0, 5.0], [-40.0, 12.0, 40.0, 15.0, 200.0],
        [10.6, 10.65, 0.6, 0.1, -120.0], [20.0, 19.0, 0.0, 21.0, 33.0], [34.1, 25.2, 64.7, 45.3, 400.0],
        [50.0, 30.0, 700.0, 240.0, 15.0], [30.0, 20.0, 11.0, 30.0, 90.0],
    ]  # fmt: skip
    image = torch.arange(len(boxes), dtype=dtype)[:, None] % 2
    return torch.cat([image, torch.tensor(boxes, dtype=dtype)], 1)
