"""The cells of several feature maps in one sequence, and where they lie in the picture.

Shape legend: N images, C channels, L feature levels of H x W cells, S cells of all levels together.

A picture lies at the top left of its batch's padded size, so on each level it fills some columns and rows,
which are counted; coordinates are fractions of the picture, without the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Levels", "cell_centres", "flatten_levels", "valid_ratio"]


@dataclass
class Levels:
    """Cells of L maps: level after level, each row by row.

    Attributes:
        cells: (N, S, C).
        mask: (N, S) bool, true for cells of the padding.
        pos: (N, S, C) position embeddings.
        shapes: L pairs (height, width).
        spatial_shapes: (L, 2) int64, the same on the device.
        level_start_index: (L,) int64, where each level begins.
        valid_ratios: (N, L, 2), which part of each level's width and height the picture fills.
        centres: (N, S, 2), x and y of each cell's centre as fractions of the picture; above 1 in the padding.
    """

    cells: torch.Tensor
    mask: torch.Tensor
    pos: torch.Tensor
    shapes: list[tuple[int, int]]
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    valid_ratios: torch.Tensor
    centres: torch.Tensor


def valid_ratio(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which part of the width and height of (N, H, W) bool masks is no padding: (N, 2) of `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    width = (~mask[:, 0]).sum(dim=1, dtype=exact) / mask.shape[2]
    height = (~mask[:, :, 0]).sum(dim=1, dtype=exact) / mask.shape[1]
    return torch.stack([width, height], dim=1).to(dtype)


def cell_centres(shapes: Sequence[tuple[int, int]], valid_ratios: torch.Tensor) -> torch.Tensor:
    """Where each cell lies in its picture.

    Args:
        shapes: L pairs (height, width).
        valid_ratios: (N, L, 2), which part of each level's width and height the picture fills.

    Returns:
        (N, S, 2) of `valid_ratios`' dtype: x and y as fractions of the picture.
    """
    like = {"dtype": valid_ratios.dtype, "device": valid_ratios.device}
    centres = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(height, **like) + 0.5, torch.arange(width, **like) + 0.5, indexing="ij"
        )
        filled = valid_ratios[:, level] * valid_ratios.new_tensor([width, height])
        centres.append(torch.stack([x, y], dim=2).flatten(0, 1) / filled[:, None])
    return torch.cat(centres, dim=1)


def flatten_levels(
    feats: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    pos_embeds: Sequence[torch.Tensor],
    level_embeds: torch.Tensor,
) -> Levels:
    """Put the cells of L maps into one sequence.

    Args:
        feats: L maps (N, C, H, W).
        masks: L masks (N, H, W) bool, true for the padding.
        pos_embeds: L position embeddings (N, C, H, W).
        level_embeds: (L, C), what is added to the position embeddings of each level.
    """
    shapes = [(x.shape[2], x.shape[3]) for x in feats]
    pos = [p.flatten(2).transpose(1, 2) + e for p, e in zip(pos_embeds, level_embeds)]
    # Where cells lie is known to more digits than half precision has.
    dtype = torch.promote_types(level_embeds.dtype, torch.float32)
    ratios = torch.stack([valid_ratio(m, dtype) for m in masks], dim=1)
    spatial_shapes = torch.tensor(shapes, device=feats[0].device)
    sizes = spatial_shapes.prod(1)
    return Levels(
        cells=torch.cat([x.flatten(2).transpose(1, 2) for x in feats], dim=1),
        mask=torch.cat([m.flatten(1) for m in masks], dim=1),
        pos=torch.cat(pos, dim=1),
        shapes=shapes,
        spatial_shapes=spatial_shapes,
        level_start_index=sizes.cumsum(0) - sizes,
        valid_ratios=ratios,
        centres=cell_centres(shapes, ratios),
    )
