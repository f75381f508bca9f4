"""Intersection over union of rotated boxes."""

import torch

from detlib.ops import box_iou_rotated

__all__ = ["pairwise_iou_rotated"]


def pairwise_iou_rotated(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the IoU of every pair of N and M rotated boxes.

    Args:
        boxes1: (N, 5) center x, center y, width, height in pixels and angle in degrees, counter-clockwise.
        boxes2: (M, 5), as `boxes1`.

    Returns:
        (N, M) in [0, 1].

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    return box_iou_rotated(boxes1, boxes2)
