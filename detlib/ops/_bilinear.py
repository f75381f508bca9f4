"""Bilinear interpolation by indexing: slow, but deterministic on every device and twice differentiable."""

from typing import cast

import torch


def sample_bilinear(
    rows: torch.Tensor,
    height: int | torch.Tensor,
    width: int | torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    start: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Interpolate feature maps at points. Cells outside a feature map are zero.

    Args:
        rows: (B, S, C) floating point, the cells of feature maps in row-major order.
        height, width: number of cells along the two axes; ints, or integer tensors that broadcast to `y`.
        y, x: (B, ...) of the dtype of `rows`, points in cells; (0, 0) is the center of the first cell.
        start: index of the first cell of the feature map among the S cells, of the type of `height`.

    Returns:
        (B, ..., C); nan for a point that is not finite.
    """
    if rows.shape[1] == 0:
        return ((y + x) * 0)[..., None].expand(*y.shape, rows.shape[2])
    batch = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (y.dim() - 1))
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    output: torch.Tensor | float = 0.0
    for step_y, weight_y in ((0, 1 - down), (1, down)):
        for step_x, weight_x in ((0, 1 - right), (1, right)):
            row, column = top + step_y, left + step_x
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column = row.where(inside, 0).long(), column.where(inside, 0).long()
            cells = rows[batch, (start + row * width + column).where(inside, 0)]
            output = output + (weight_y * weight_x * inside)[..., None] * cells
    return cast(torch.Tensor, output)
