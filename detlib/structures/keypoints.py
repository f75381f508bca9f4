"""Keypoints, and their form as one-hot heatmaps.

Shapes: N objects, K keypoints each, R regions of interest, S side of a heatmap.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["Keypoints", "heatmaps_to_keypoints"]


class Keypoints:
    """The keypoints of N objects in one (N, K, 3) float32 tensor.

    Each keypoint is x, y in absolute pixels (not rounded) and a visibility as in COCO: 0 not labelled,
    1 labelled but hidden, 2 labelled and visible.

    Args:
        keypoints: (N, K, 3) tensor, array or nested list.

    Attributes:
        tensor: (N, K, 3) float32.
    """

    def __init__(self, keypoints: torch.Tensor | np.ndarray | list[list[float]]):
        if not isinstance(keypoints, torch.Tensor):
            keypoints = torch.as_tensor(np.asarray(keypoints, dtype=np.float32))
        if keypoints.dim() != 3 or keypoints.shape[2] != 3:
            raise ValueError(f"Keypoints take a tensor of shape (N, K, 3), got {tuple(keypoints.shape)}")
        self.tensor = keypoints.to(torch.float32)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Keypoints":
        """The same keypoints on another device."""
        return type(self)(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to_heatmap(self, boxes: torch.Tensor, heatmap_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places each object's keypoints in a grid of S x S cells over a box (Mask R-CNN, section 5).

        Args:
            boxes: (N, 4) absolute xyxy pixels, one per object.
            heatmap_size: S.

        Returns:
            cells: (N, K) int64, the cell of each keypoint as row * S + column; 0 for invalid ones.
            valid: (N, K) int64, 1 where a keypoint is labelled and lies in the box, else 0.
        """
        if len(boxes) != len(self):
            raise ValueError(f"to_heatmap needs a box per object: {len(boxes)} boxes, {len(self)} objects")
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        points = self.tensor[..., :2]
        cells = ((points - low) * (heatmap_size / (high - low))).floor().long()
        # The right and bottom border belong to the last cell.
        cells = torch.where(points == high, heatmap_size - 1, cells)
        inside = ((cells >= 0) & (cells < heatmap_size)).all(dim=2)
        valid = (inside & (self.tensor[..., 2] > 0)).long()
        return (cells[..., 1] * heatmap_size + cells[..., 0]) * valid, valid

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Keypoints":
        """Selects objects by an index (giving N = 1), a slice, an integer or a boolean vector."""
        if isinstance(item, Integral):
            return type(self)(self.tensor[item][None])
        return type(self)(self.tensor[item])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields the (K, 3) keypoints of each object."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.tensor)})"

    @staticmethod
    def cat(keypoints_list: list["Keypoints"]) -> "Keypoints":
        """Joins the objects of several Keypoints with the same K."""
        if len(keypoints_list) == 0:
            raise ValueError("Keypoints.cat needs at least one Keypoints")
        for keypoints in keypoints_list:
            if not isinstance(keypoints, Keypoints):
                raise TypeError(f"Keypoints.cat takes a list of Keypoints, got {type(keypoints).__name__}")
        return Keypoints(torch.cat([keypoints.tensor for keypoints in keypoints_list], dim=0))


@torch.no_grad()
def heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """Finds keypoints in predicted heatmaps.

    Each heatmap is enlarged (bicubic) to the size of its region in pixels of the picture, and the keypoint
    is the centre of the highest pixel.

    Args:
        maps: (R, K, S, S) logits.
        rois: (R, 4) absolute xyxy pixels of the regions that the maps cover.

    Returns:
        (R, K, 4): x, y in absolute pixels, the logit there, and its probability, the softmax taken over the
        S x S cells.
    """
    offsets = rois[:, :2]
    sizes = (rois[:, 2:] - offsets).clamp(min=1)
    pixels = sizes.ceil()
    # The enlarged map has whole pixels, the region has not.
    corrections = sizes / pixels

    keypoints = maps.new_zeros(*maps.shape[:2], 4)
    for i, (width, height) in enumerate(pixels.long().tolist()):
        enlarged = F.interpolate(maps[i : i + 1], size=(height, width), mode="bicubic", align_corners=False)[
            0
        ]
        logits, positions = enlarged.flatten(1).max(dim=1)
        columns, rows = positions % width, positions // width
        points = torch.stack([columns, rows], dim=1) + 0.5
        keypoints[i, :, :2] = points * corrections[i] + offsets[i]
        keypoints[i, :, 2] = logits
        # exp(logit) / sum of exp over the cells, with the largest logit taken out of both.
        keypoints[i, :, 3] = 1.0 / (maps[i].flatten(1) - logits[:, None]).exp().sum(dim=1)
    return keypoints
