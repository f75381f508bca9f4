"""Bilinear interpolation by plain indexing: slow, but deterministic on every device and differentiable
twice."""

import torch


def sample_bilinear(
    rows: torch.Tensor,
    height: int | torch.Tensor,
    width: int | torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    start: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Interpolate maps at points; what lies beyond a map counts as zero.

    Args:
        rows: (B, S, C) floating point, the cells of maps, each row by row.
        height, width: cells along the two axes; ints, or integer tensors that broadcast to `y`.
        y, x: (B, ...) of `rows`' dtype, points in cells; (0, 0) is the centre of the first cell.
        start: where the map begins among the S cells, as `height`.

    Returns:
        (B, ..., C). A point that is not finite gives nan.
    """
    if rows.shape[1] == 0:
        return ((y + x) * 0)[..., None].expand(*y.shape, rows.shape[2])
    batch = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (y.dim() - 1))
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    output = 0
    for step_y, weight_y in ((0, 1 - down), (1, down)):
        for step_x, weight_x in ((0, 1 - right), (1, right)):
            row, column = top + step_y, left + step_x
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column = row.where(inside, 0).long(), column.where(inside, 0).long()
            cells = rows[batch, (start + row * width + column).where(inside, 0)]
            output = output + (weight_y * weight_x * inside)[..., None] * cells
    return output
