"""Axis-aligned boxes: the `Boxes` type, functions of boxes, and `BoxMode`.

Shapes: N and M boxes. Boxes are rows x0, y0, x1, y1 in absolute pixels of an image whose top left
corner is (0, 0): pixel (row i, column j) covers [j, j + 1] x [i, i + 1].
"""

from collections.abc import Iterator
from enum import IntEnum, unique
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch

from detlib.layers.nms import batched_nms

__all__ = [
    "BoxMode",
    "Boxes",
    "matched_pairwise_iou",
    "pairwise_intersection",
    "pairwise_ioa",
    "pairwise_iou",
    "pairwise_point_box_distance",
]

_BoxT = TypeVar("_BoxT", list[float], tuple[float, ...], torch.Tensor, np.ndarray)


@unique
class BoxMode(IntEnum):
    """Box formats. They are integers, so that dataset files can store them.

    Attributes:
        XYXY_ABS: x0, y0, x1, y1 in absolute pixels.
        XYWH_ABS: x0, y0, width, height in absolute pixels (COCO).
        XYXY_REL: x0, y0, x1, y1 as fractions of the image's size; cannot be converted.
        XYWH_REL: x0, y0, width, height as fractions of the image's size; cannot be converted.
        XYWHA_ABS: center x, center y, width, height in absolute pixels, counter-clockwise angle in degrees.
    """

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(
        box: _BoxT,
        from_mode: "BoxMode",
        to_mode: "BoxMode",
    ) -> _BoxT:
        """Convert boxes to another format.

        A rotated box becomes the smallest axis-aligned box around it.

        Args:
            box: one box as a list or tuple, or an array or tensor (..., 4), (..., 5) for XYWHA_ABS.
            from_mode: the format of `box`.
            to_mode: the format of the result.

        Returns:
            The converted boxes, of the same type and dtype as `box`; `box` itself if the formats are equal.

        Raises:
            ValueError: a format is relative, or a box has the wrong length.
        """
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        if from_mode == to_mode:
            return box
        for mode in (from_mode, to_mode):
            if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
                raise ValueError(
                    f"BoxMode.{mode.name} cannot be converted, since the image size is unknown here; "
                    "multiply by the image size and use an absolute mode"
                )
        array = box if isinstance(box, torch.Tensor) else torch.as_tensor(np.asarray(box))
        length = 5 if from_mode == BoxMode.XYWHA_ABS else 4
        if array.dim() == 0 or array.shape[-1] != length:
            raise ValueError(
                f"A box in BoxMode.{from_mode.name} has {length} numbers, got shape {tuple(array.shape)}"
            )
        converted = _CONVERSIONS[from_mode, to_mode](array)
        if isinstance(box, torch.Tensor):
            return converted
        if isinstance(box, np.ndarray):
            return converted.numpy()
        return type(box)(converted.tolist())


def _xyxy_to_xywh(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def _xywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def _xywh_to_xywha(boxes: torch.Tensor) -> torch.Tensor:
    x0, y0, width, height = boxes.double().unbind(dim=-1)
    rotated = [x0 + width / 2, y0 + height / 2, width, height, torch.zeros_like(x0)]
    return torch.stack(rotated, dim=-1).to(boxes.dtype)


def _xyxy_to_xywha(boxes: torch.Tensor) -> torch.Tensor:
    return _xywh_to_xywha(_xyxy_to_xywh(boxes))


def _xywha_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    center_x, center_y, width, height, angle = boxes.double().unbind(dim=-1)
    cos, sin = torch.deg2rad(angle).cos().abs(), torch.deg2rad(angle).sin().abs()
    half_w = (cos * width + sin * height) / 2
    half_h = (cos * height + sin * width) / 2
    corners = [center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h]
    return torch.stack(corners, dim=-1).to(boxes.dtype)


def _xywha_to_xywh(boxes: torch.Tensor) -> torch.Tensor:
    return _xyxy_to_xywh(_xywha_to_xyxy(boxes))


_CONVERSIONS = {
    (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS): _xyxy_to_xywh,
    (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS): _xywh_to_xyxy,
    (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS): _xywh_to_xywha,
    (BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS): _xyxy_to_xywha,
    (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS): _xywha_to_xyxy,
    (BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS): _xywha_to_xywh,
}


class Boxes:
    """A list of boxes in one (N, 4) float32 tensor.

    It supports `len()`, indexing, iteration (over (4,) tensors), `to()` and `cat()`.

    Attributes:
        tensor: (N, 4) float32.
    """

    box_dim = 4

    def __init__(self, tensor: torch.Tensor):
        """Create the boxes.

        Args:
            tensor: (N, 4) tensor, array or nested list of absolute xyxy pixels; an empty one gives N = 0.

        Raises:
            ValueError: the shape is not (N, 4).
        """
        if not isinstance(tensor, torch.Tensor):
            tensor = torch.as_tensor(np.asarray(tensor, dtype=np.float32))
        tensor = tensor.to(torch.float32)
        if tensor.numel() == 0:
            # Reshaping keeps the autograd graph, which losses of empty predictions need.
            tensor = tensor.reshape((-1, self.box_dim))
        if tensor.dim() != 2 or tensor.size(-1) != self.box_dim:
            raise ValueError(
                f"{type(self).__name__} needs shape (N, {self.box_dim}), got {tuple(tensor.shape)}"
            )
        self.tensor = tensor

    def clone(self) -> "Boxes":
        """Return a copy with its own memory."""
        return type(self)(self.tensor.clone())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Boxes":
        """Return the boxes on another device."""
        return type(self)(self.tensor.to(device=device, non_blocking=non_blocking))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> torch.Tensor:
        """Return the areas in square pixels, (N,)."""
        return (self.tensor[:, 2] - self.tensor[:, 0]) * (self.tensor[:, 3] - self.tensor[:, 1])

    def clip(self, box_size: tuple[int, int]) -> None:
        """Clip all coordinates to [0, width] x [0, height], in place.

        Args:
            box_size: (height, width) of the image.

        Raises:
            ValueError: a coordinate is infinite or NaN.
        """
        self._check_finite()
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(dim=-1)
        self.tensor = torch.stack(
            (x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)), dim=-1
        )

    def _check_finite(self) -> None:
        # A traced graph cannot branch on values.
        if torch.compiler.is_compiling():
            return
        finite = torch.isfinite(self.tensor)
        if not finite.all():
            bad = int((~finite).any(dim=1).sum())
            raise ValueError(f"{bad} of {len(self)} boxes have coordinates that are infinite or NaN")

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Return which boxes are wider and higher than `threshold` pixels, (N,) bool."""
        widths = self.tensor[:, 2] - self.tensor[:, 0]
        heights = self.tensor[:, 3] - self.tensor[:, 1]
        return (widths > threshold) & (heights > threshold)

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Boxes":
        """Select boxes by an index (giving N = 1), a slice, an integer vector or a boolean vector.

        Slices share memory with the original.
        """
        if isinstance(item, Integral):
            return type(self)(self.tensor[item].reshape(1, -1))
        selected = self.tensor[item]
        if selected.dim() != 2:
            raise IndexError(
                f"Indexing {type(self).__name__} with {item} gives shape {tuple(selected.shape)}"
            )
        return type(self)(selected)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tensor})"

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: float = 0) -> torch.Tensor:
        """Return which boxes are inside the image.

        Args:
            box_size: (height, width) of the image.
            boundary_threshold: number of pixels by which a box may extend beyond the image.

        Returns:
            (N,) bool.
        """
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(dim=1)
        inside_low = (x0 >= -boundary_threshold) & (y0 >= -boundary_threshold)
        return inside_low & (x1 < width + boundary_threshold) & (y1 < height + boundary_threshold)

    def get_centers(self) -> torch.Tensor:
        """Return the centers x, y, (N, 2)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x coordinates by `scale_x` and y coordinates by `scale_y`, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def pairwise_iou(self, other: "Boxes") -> torch.Tensor:
        """Return the IoU of every pair with the M boxes of another object of the same type, (N, M)."""
        return pairwise_iou(self, other)

    def batched_nms(self, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        """Apply non-maximum suppression to each group separately.

        Args:
            scores: (N,) float.
            idxs: (N,) group of each box, e.g. its class; boxes of different groups never suppress each other.
            iou_threshold: a box is dropped if its IoU with a kept box of its group exceeds this.

        Returns:
            (K,) int64 indices of the kept boxes, in descending score order.
        """
        return batched_nms(self.tensor, scores, idxs, iou_threshold)

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """Concatenate lists of boxes into one, with its own memory."""
        if not isinstance(boxes_list, (list, tuple)):
            raise TypeError(f"{cls.__name__}.cat takes a list, got {type(boxes_list).__name__}")
        if len(boxes_list) == 0:
            return cls(torch.empty(0))
        for boxes in boxes_list:
            if not isinstance(boxes, cls):
                raise TypeError(
                    f"{cls.__name__}.cat takes a list of {cls.__name__}, got {type(boxes).__name__}"
                )
        return cls(torch.cat([boxes.tensor for boxes in boxes_list], dim=0))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield each box as a (4,) tensor."""
        yield from self.tensor


def _overlap(low1, high1, low2, high2):
    """Return the length of the overlap of intervals along one axis; 0 where they are disjoint."""
    return torch.minimum(high1, high2).sub_(torch.maximum(low1, low2)).clamp_(min=0)


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Return the intersection of every pair of N and M boxes, (N, M), in square pixels."""
    # One axis after the other, in place: N x M may be millions, and memory access takes most of the time.
    x0, y0, x1, y1 = boxes1.tensor.t().contiguous()[:, :, None].unbind(dim=0)
    u0, v0, u1, v1 = boxes2.tensor.t().contiguous()[:, None, :].unbind(dim=0)
    return _overlap(x0, x1, u0, u1).mul_(_overlap(y0, y1, v0, v1))


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Return the IoU of every pair of N and M boxes, (N, M); 0 where they do not overlap."""
    inter = pairwise_intersection(boxes1, boxes2)
    union = (boxes1.area()[:, None] + boxes2.area()).sub_(inter)
    return _ratio(inter, union)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Return the intersection of every pair of N and M boxes over the area of the box in `boxes2`, (N, M)."""
    inter = pairwise_intersection(boxes1, boxes2)
    return _ratio(inter, boxes2.area().expand_as(inter))


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Return the IoU of the i-th box of one list with the i-th box of the other, (N,).

    Raises:
        ValueError: the lists have different lengths.
    """
    if len(boxes1) != len(boxes2):
        raise ValueError(f"boxes1 and boxes2 must have the same length, got {len(boxes1)} and {len(boxes2)}")
    x0, y0, x1, y1 = boxes1.tensor.unbind(dim=1)
    u0, v0, u1, v1 = boxes2.tensor.unbind(dim=1)
    inter = _overlap(x0, x1, u0, u1) * _overlap(y0, y1, v0, v1)
    return _ratio(inter, boxes1.area() + boxes2.area() - inter)


def _ratio(inter: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Return `inter / area`, and 0 (not NaN) where the intersection is empty."""
    return torch.where(inter > 0, inter / area, inter.new_zeros(()))


def pairwise_point_box_distance(points: torch.Tensor, boxes: Boxes):
    """Return the distances from points to the four sides of boxes.

    Args:
        points: (N, 2) float, x and y in absolute pixels.
        boxes: M boxes.

    Returns:
        (N, M, 4) signed distances to the left, top, right and bottom side, all positive inside the box.
    """
    x, y = points[:, :, None].unbind(dim=1)
    x0, y0, x1, y1 = boxes.tensor[None].unbind(dim=2)
    return torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=2)
