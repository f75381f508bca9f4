"""Builders and comparisons that several test areas share."""

import numpy as np
import torch

from detlib.structures import Boxes, Instances


def random_boxes(
    num_boxes: int, image_size: tuple[int, int] = (100, 100), min_side: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """(N, 4) float32 boxes, absolute xyxy, within a (height, width) picture, no side below `min_side`."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    limits = torch.tensor([width, height], dtype=torch.float32)
    corners = torch.rand(2, num_boxes, 2, generator=generator) * (limits - min_side)
    return torch.cat([corners.amin(dim=0), corners.amax(dim=0) + min_side], dim=1)


def circle_polygon(center_x: float, center_y: float, radius: float, num_corners: int = 24) -> np.ndarray:
    """Flat float64 vector x0, y0, x1, y1, ... of a regular polygon."""
    angles = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
    return np.stack([center_x + radius * np.cos(angles), center_y + radius * np.sin(angles)], axis=1).ravel()


def assert_instances_allclose(actual: Instances, expected: Instances, rtol: float = 1e-5, atol: float = 1e-5):
    """Asserts the same picture size, the same fields, and equal values (close ones for floating point)."""
    assert actual.image_size == expected.image_size
    assert actual.get_fields().keys() == expected.get_fields().keys()
    for name, value in expected.get_fields().items():
        other = actual.get(name)
        assert type(other) is type(value), name
        if isinstance(value, Boxes) or hasattr(value, "tensor"):
            value, other = value.tensor, other.tensor
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other, value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert list(other) == list(value), name
