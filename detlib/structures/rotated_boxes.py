"""Rotated boxes: the `RotatedBoxes` type and the intersection over union.

Shapes: N and M boxes. Boxes are rows of center x, center y, width, height in absolute pixels and the
angle in degrees, counter-clockwise. The width is measured along (cos, -sin) and the height along (sin, cos)
of the angle, with y pointing down.
"""

import math

import torch

from detlib.layers.nms import batched_nms_rotated
from detlib.layers.rotated_boxes import pairwise_iou_rotated
from detlib.structures.boxes import Boxes

__all__ = ["RotatedBoxes", "pairwise_iou"]


class RotatedBoxes(Boxes):
    """A list of rotated boxes in one (N, 5) float32 tensor, with the interface of `Boxes`.

    Boxes (x, y, w, h, a), (x, y, w, h, a + 180) and (x, y, h, w, a + 90) cover the same area, but their
    content has another orientation: the angle defines which side is up. The constructor takes an (N, 5)
    tensor, array or nested list.

    Attributes:
        tensor: (N, 5) float32.
    """

    box_dim = 5

    def area(self) -> torch.Tensor:
        """Return the areas in square pixels, (N,)."""
        return self.tensor[:, 2] * self.tensor[:, 3]

    def normalize_angles(self) -> None:
        """Normalize all angles to [-180, 180) degrees, in place."""
        angles = (self.tensor[:, 4] + 180.0) % 360.0 - 180.0
        self.tensor = torch.cat((self.tensor[:, :4], angles[:, None]), dim=1)

    def clip(self, box_size: tuple[int, int], clip_angle_threshold: float = 1.0) -> None:
        """Clip (nearly) axis-aligned boxes to the image, and normalize all angles, in place.

        Other boxes are not clipped: their intersection with the image is not a rotated box.

        Args:
            box_size: (height, width) of the image.
            clip_angle_threshold: boxes rotated by at most this many degrees are clipped.

        Raises:
            ValueError: a number is infinite or NaN.
        """
        self._check_finite()
        self.normalize_angles()
        height, width = box_size
        x, y, box_width, box_height, angle = self.tensor.unbind(dim=1)
        x0, x1 = ((x + side * box_width / 2).clamp(0, width) for side in (-1, 1))
        y0, y1 = ((y + side * box_height / 2).clamp(0, height) for side in (-1, 1))
        # Rounding must not make a box larger.
        clipped = torch.stack(
            [
                (x0 + x1) / 2,
                (y0 + y1) / 2,
                torch.minimum(x1 - x0, box_width),
                torch.minimum(y1 - y0, box_height),
                angle,
            ],
            dim=1,
        )
        self.tensor = torch.where((angle.abs() <= clip_angle_threshold)[:, None], clipped, self.tensor)

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Return which boxes are wider and higher than `threshold` pixels, (N,) bool."""
        return (self.tensor[:, 2:4] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: float = 0) -> torch.Tensor:
        """Return which boxes have their center inside the image.

        Args:
            box_size: (height, width) of the image.
            boundary_threshold: number of pixels by which a center may be outside the image.

        Returns:
            (N,) bool.
        """
        height, width = box_size
        x, y = self.tensor[:, 0], self.tensor[:, 1]
        inside_low = (x >= -boundary_threshold) & (y >= -boundary_threshold)
        return inside_low & (x < width + boundary_threshold) & (y < height + boundary_threshold)

    def get_centers(self) -> torch.Tensor:
        """Return the centers x, y, (N, 2)."""
        return self.tensor[:, :2]

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Scale the boxes as if their image was resized by two factors, in place.

        Different factors turn a rectangle into a parallelogram. The result is the rectangle with the same
        center and side lengths, and with the direction of the parallelogram's height.
        """
        radians = self.tensor[:, 4] * (math.pi / 180)
        cosine, sine = radians.cos(), radians.sin()
        self.tensor[:, 0] *= scale_x
        self.tensor[:, 1] *= scale_y
        self.tensor[:, 2] *= torch.hypot(scale_x * cosine, scale_y * sine)
        self.tensor[:, 3] *= torch.hypot(scale_x * sine, scale_y * cosine)
        self.tensor[:, 4] = torch.atan2(scale_x * sine, scale_y * cosine) * (180 / math.pi)

    def pairwise_iou(self, other: "RotatedBoxes") -> torch.Tensor:
        """Return the IoU of every pair with the M boxes of another object of the same type, (N, M)."""
        return pairwise_iou(self, other)

    def batched_nms(self, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        """Apply non-maximum suppression to each group separately; see `Boxes.batched_nms`."""
        return batched_nms_rotated(self.tensor, scores, idxs, iou_threshold)


def pairwise_iou(boxes1: RotatedBoxes, boxes2: RotatedBoxes) -> torch.Tensor:
    """Return the IoU of every pair of N and M rotated boxes, (N, M); 0 where they do not overlap."""
    return pairwise_iou_rotated(boxes1.tensor, boxes2.tensor)
