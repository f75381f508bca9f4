"""Rotated boxes under transforms of pictures: every Transform has `apply_rotated_box` once this is imported.

A box is (x, y, width, height, angle), see `detlib.structures.RotatedBoxes`: its width lies along (cos, -sin)
of the angle and its height along (sin, cos), with y pointing down.
"""

import numpy as np
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform

__all__ = ["transform_rotated_boxes"]


def transform_rotated_boxes(transform: Transform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Moves rotated boxes as an affine transform moves points.

    An unequal resize makes a rectangle a parallelogram. The result is a rectangle with its centre, with sides
    as long as its and turned as its height is, as published with detectron2. What is up in a box stays up in
    it: a vertical flip gives 180 degrees minus the angle.

    Args:
        transform: maps points by ``apply_coords``, the same way everywhere in the picture.
        rotated_boxes: (N, 5) of any float type, pixels and degrees counter-clockwise.

    Returns:
        (N, 5) float64, angles within [-180, 180].
    """
    boxes = np.asarray(rotated_boxes, dtype=np.float64).reshape(-1, 5)
    radians = np.deg2rad(boxes[:, 4])
    cos, sin = np.cos(radians), np.sin(radians)
    center = boxes[:, :2]
    along_width, along_height = np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)
    points = np.concatenate([center, center + along_width, center + along_height])
    moved = np.asarray(transform.apply_coords(points)).reshape(3, -1, 2)
    center, along_width, along_height = moved[0], moved[1] - moved[0], moved[2] - moved[0]
    width = boxes[:, 2] * np.hypot(*along_width.T)
    height = boxes[:, 3] * np.hypot(*along_height.T)
    angle = np.rad2deg(np.arctan2(*along_height.T))
    return np.concatenate([center, np.stack([width, height, angle], axis=1)], axis=1)


def _flip(transform: HFlipTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """A horizontal flip to the last digit: the angle changes its sign."""
    boxes = np.array(rotated_boxes, dtype=np.float64).reshape(-1, 5)
    boxes[:, 0] = transform.width - boxes[:, 0]
    boxes[:, 4] = -boxes[:, 4]
    return boxes


def _leave(t: NoOpTransform, x: np.ndarray) -> np.ndarray:
    return x


# fvcore's own way of teaching transforms a new type of data. On the base class, so that a user's transform
# has it too.
Transform.register_type("rotated_box", transform_rotated_boxes)
HFlipTransform.register_type("rotated_box", _flip)
NoOpTransform.register_type("rotated_box", _leave)
