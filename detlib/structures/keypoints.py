"""Keypoints, their heatmap cells, and keypoints from predicted heatmaps.

Shapes: N objects, K keypoints each, R regions of interest, S side of a heatmap.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch

__all__ = ["Keypoints", "heatmaps_to_keypoints"]


class Keypoints:
    """The keypoints of N objects in one (N, K, 3) float32 tensor.

    Each keypoint is x, y in absolute pixels (not rounded) and COCO's visibility: 0 not labeled, 1 labeled but
    hidden, 2 labeled and visible.

    Attributes:
        tensor: (N, K, 3) float32.
    """

    def __init__(self, keypoints: torch.Tensor | np.ndarray | list[list[float]]):
        """Create the keypoints.

        Args:
            keypoints: (N, K, 3) tensor, array or nested list.
        """
        if not isinstance(keypoints, torch.Tensor):
            keypoints = torch.as_tensor(np.asarray(keypoints, dtype=np.float32))
        if keypoints.dim() != 3 or keypoints.shape[2] != 3:
            raise ValueError(f"Keypoints take a tensor of shape (N, K, 3), got {tuple(keypoints.shape)}")
        self.tensor = keypoints.to(torch.float32)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Keypoints":
        """Return the keypoints on another device."""
        return type(self)(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to_heatmap(self, boxes: torch.Tensor, heatmap_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cell of each keypoint in a grid of S x S cells over a box (Mask R-CNN, section 5).

        Args:
            boxes: (N, 4) absolute xyxy pixels, one per object.
            heatmap_size: side S of the grid.

        Returns:
            cells: (N, K) int64, the cell of each keypoint as row * S + column; 0 for invalid keypoints.
            valid: (N, K) int64, 1 where a keypoint is labeled and inside the box, else 0.
        """
        if len(boxes) != len(self):
            raise ValueError(
                f"to_heatmap needs one box per object, got {len(boxes)} boxes and {len(self)} objects"
            )
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        points = self.tensor[..., :2]
        cells = ((points - low) * (heatmap_size / (high - low))).floor().long()
        # Points on the right and bottom border belong to the last cell.
        cells = torch.where(points == high, heatmap_size - 1, cells)
        inside = ((cells >= 0) & (cells < heatmap_size)).all(dim=2)
        valid = (inside & (self.tensor[..., 2] > 0)).long()
        return (cells[..., 1] * heatmap_size + cells[..., 0]) * valid, valid

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Keypoints":
        """Select objects by an index (giving N = 1), a slice, an integer vector or a boolean vector."""
        if isinstance(item, Integral):
            return type(self)(self.tensor[item][None])
        return type(self)(self.tensor[item])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the (K, 3) keypoints of each object."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.tensor)})"

    @staticmethod
    def cat(keypoints_list: list["Keypoints"]) -> "Keypoints":
        """Concatenate multiple Keypoints with the same K."""
        if len(keypoints_list) == 0:
            raise ValueError("Keypoints.cat needs at least one Keypoints")
        for keypoints in keypoints_list:
            if not isinstance(keypoints, Keypoints):
                raise TypeError(f"Keypoints.cat takes a list of Keypoints, got {type(keypoints).__name__}")
        return Keypoints(torch.cat([keypoints.tensor for keypoints in keypoints_list], dim=0))


# Largest number of enlarged pixels that `heatmaps_to_keypoints` processes in one call. On the CPU they must
# fit into the cache; a GPU is faster with few large calls. A larger object is processed alone.
_MAX_PIXELS_CPU = 2**19
_MAX_PIXELS = 2**27


def _cubic_weights(distance: torch.Tensor) -> torch.Tensor:
    """Return the cubic convolution kernel (Keys, 1981) with a = -0.75, as bicubic image resizing uses it."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance <= 1, near, far)


def _enlarging_matrices(sizes: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """Return matrices that enlarge S values to more pixels; centers at half-integers, borders repeated.

    Args:
        sizes: (R,) number of pixels of each object, as floats.
        count: rows of each matrix, at least the largest size. Rows past a size repeat its last pixel.
        side: S.

    Returns:
        (R, count, S) of the dtype of `sizes`.
    """
    pixel = torch.arange(count, device=sizes.device, dtype=sizes.dtype)
    pixel = torch.minimum(pixel, sizes[:, None] - 1)
    source = (pixel + 0.5) * (side / sizes)[:, None] - 0.5
    first = source.floor() - 1
    taps = first[..., None] + torch.arange(4, device=sizes.device, dtype=sizes.dtype)
    weights = _cubic_weights((taps - source[..., None]).abs())
    matrices = weights.new_zeros(len(sizes), count, side)
    return matrices.scatter_add_(2, taps.long().clamp_(0, side - 1), weights)


def _group_by_size(sizes: list[tuple[int, int]], max_pixels: int) -> list[list[int]]:
    """Split objects of (height, width) into groups of similar area.

    A group has at most `max_pixels` if all its objects are padded to the largest.
    """
    groups: list[list[int]] = []
    height = width = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1]):
        height, width = max(height, sizes[i][0]), max(width, sizes[i][1])
        if not groups or (len(groups[-1]) + 1) * height * width > max_pixels:
            groups.append([])
            height, width = sizes[i]
        groups[-1].append(i)
    return groups


def _find_peaks(maps: torch.Tensor, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the highest pixel of heatmaps that are enlarged to the sizes of their objects.

    Args:
        maps: (R, K, S, S) float.
        pixels: (R, 2) width and height of each object, as floats.
        height, width: the largest of these.

    Returns:
        (R, K, 4): column and row of the peak (the first of equal ones), its logit, and its probability among
        the S x S cells.
    """
    num_objects, num_keypoints, side, _ = maps.shape
    across = _enlarging_matrices(pixels[:, 0], width, side)
    down = _enlarging_matrices(pixels[:, 1], height, side)
    # Bicubic enlargement is a product with one matrix per axis, the same for all K heatmaps of an object:
    # (S rows x K, S) by (S, width), then (height, S) by (S, K x width).
    enlarged = maps.transpose(1, 2).flatten(1, 2) @ across.transpose(1, 2)
    enlarged = down @ enlarged.view(num_objects, side, num_keypoints * width)
    enlarged = enlarged.view(num_objects, height, num_keypoints, width)
    logits, rows = enlarged.amax(dim=3).max(dim=1)
    best_rows = enlarged.gather(1, rows[:, None, :, None].expand(-1, -1, -1, width))[:, 0]
    columns = best_rows.argmax(dim=2)
    # exp(logit) / sum of exp over the cells; the largest logit is subtracted from both to prevent overflow.
    probs = 1.0 / (maps.flatten(2) - logits[..., None]).exp_().sum(dim=2)
    return torch.stack([columns, rows, logits, probs], dim=2)


@torch.no_grad()
def heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """Find keypoints in predicted heatmaps.

    Each heatmap is enlarged (bicubic) to the size of its region in image pixels. The keypoint is the center
    of the highest pixel.

    Args:
        maps: (R, K, S, S) logits.
        rois: (R, 4) absolute xyxy pixels of the regions that the heatmaps cover.

    Returns:
        (R, K, 4): x, y in absolute pixels, the logit of the peak, and its probability (softmax over the S x S
        cells). float64 if `maps` is, else float32.
    """
    # Half precision is too coarse for cells and for pixel coordinates.
    maps = maps if maps.dtype == torch.float64 else maps.float()
    rois = rois.to(maps.dtype)
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    on_cpu = maps.device.type == "cpu"
    max_pixels = (_MAX_PIXELS_CPU if on_cpu else _MAX_PIXELS) // max(maps.shape[1], 1)
    heights_widths = [(height, width) for width, height in pixels.long().tolist()]
    peaks = maps.new_zeros(*maps.shape[:2], 4)
    with torch.autocast(maps.device.type, enabled=False):
        for group in _group_by_size(heights_widths, max_pixels):
            height = max(heights_widths[i][0] for i in group)
            width = max(heights_widths[i][1] for i in group)
            index = torch.tensor(group).to(maps.device, non_blocking=True)
            peaks[index] = _find_peaks(maps[index], pixels[index], height, width)
    # A GPU may return any of multiple equal pixels, also padding that repeats the last pixel of a smaller
    # heatmap. An enlarged heatmap has an integer number of pixels; the size of its region may be fractional.
    centers = torch.minimum(peaks[..., :2], pixels[:, None] - 1) + 0.5
    points = centers * (sizes / pixels)[:, None] + rois[:, None, :2]
    return torch.cat([points, peaks[..., 2:]], dim=2)
