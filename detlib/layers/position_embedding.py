"""Position embeddings of cells and queries: sines of the coordinates, or learned rows and columns.

The sines are those of "Attention Is All You Need" (arXiv:1706.03762) in two dimensions, as in DETR
(arXiv:2005.12872). Shape legend: N images, H x W cells of a feature map, Q queries, F `num_pos_feats`.
"""

import math

import torch
from torch import nn

__all__ = ["PositionEmbeddingLearned", "PositionEmbeddingSine", "get_sine_pos_embed"]


def sine_features(x: torch.Tensor, num_feats: int, temperature: float) -> torch.Tensor:
    """Return sines and cosines of decreasing frequencies.

    Args:
        x: (...) floating point angles in radians.
        num_feats: F, number of features, even.
        temperature: the last frequencies are about 1 / `temperature`.

    Returns:
        (..., F), of the dtype of `x`: sin(x), cos(x), sin(x / t), cos(x / t), and so on, with
        t = temperature**(2 / F).
    """
    steps = torch.arange(num_feats // 2, dtype=x.dtype, device=x.device)
    angles = x[..., None] / temperature ** (2 * steps / num_feats)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _check_num_feats(num_pos_feats: int) -> None:
    if num_pos_feats < 2 or num_pos_feats % 2:
        raise ValueError(f"num_pos_feats must be even and positive, got {num_pos_feats}")


def get_sine_pos_embed(
    pos_tensor: torch.Tensor,
    num_pos_feats: int = 128,
    temperature: int = 10000,
    exchange_xy: bool = True,
) -> torch.Tensor:
    """Return the sine embeddings of points or boxes.

    Args:
        pos_tensor: (..., D) floating point, e.g. (N, Q, 2) for x, y or (N, Q, 4) for cx, cy, w, h, as
            fractions of the image.
        num_pos_feats: F, features of one coordinate, even.
        temperature: the last frequencies are about 1 / `temperature`.
        exchange_xy: whether the features of y come before those of x.

    Returns:
        (..., D * F), of the dtype of `pos_tensor`.

    Raises:
        ValueError: `num_pos_feats` is odd.
    """
    _check_num_feats(num_pos_feats)
    if exchange_xy:
        pos_tensor = torch.cat([pos_tensor[..., :2].flip(-1), pos_tensor[..., 2:]], dim=-1)
    return sine_features(pos_tensor * (2 * math.pi), num_pos_feats, temperature).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sine embeddings of the row and column of each cell, counted inside the image (without padding)."""

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: int = 10000,
        scale: float = 2 * math.pi,
        eps: float = 1e-6,
        offset: float = 0.0,
        normalize: bool = False,
    ):
        """Build the module.

        Args:
            num_pos_feats: F, features of each axis, even; 2 F in total.
            temperature: the last frequencies are about 1 / `temperature`.
            scale: the largest coordinate if `normalize` is true.
            eps: added to the divisor if `normalize` is true.
            offset: added to the coordinates, which start at 1, if `normalize` is true.
            normalize: whether coordinates are divided by the size of the image.

        Raises:
            ValueError: `num_pos_feats` is odd.
        """
        super().__init__()
        _check_num_feats(num_pos_feats)
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale
        self.eps = eps
        self.offset = offset

    def forward(self, mask: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the embeddings of the cells of a batch.

        Args:
            mask: (N, H, W) bool, true for padding cells.
            **kwargs: ignored.

        Returns:
            (N, 2 F, H, W) float32: the features of the row, then those of the column.

        Raises:
            ValueError: `mask` has another shape or dtype.
        """
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be (N, H, W) bool, got {tuple(mask.shape)} {mask.dtype}")
        valid = ~mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        if self.normalize:
            y = (y + self.offset) / (y[:, -1:] + self.eps) * self.scale
            x = (x + self.offset) / (x[:, :, -1:] + self.eps) * self.scale
        parts = [sine_features(axis, self.num_pos_feats, self.temperature) for axis in (y, x)]
        return torch.cat(parts, dim=3).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for each row and each column, the embeddings `row_embed` and `col_embed`."""

    def __init__(self, num_pos_feats: int = 256, row_num_embed: int = 50, col_num_embed: int = 50):
        """Build the module.

        Args:
            num_pos_feats: F, features of each axis; 2 F in total.
            row_num_embed: largest number of rows of a feature map.
            col_num_embed: largest number of columns.
        """
        super().__init__()
        self.row_embed = nn.Embedding(row_num_embed, num_pos_feats)
        self.col_embed = nn.Embedding(col_num_embed, num_pos_feats)
        self.num_pos_feats = num_pos_feats
        self.row_num_embed = row_num_embed
        self.col_num_embed = col_num_embed
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the vectors uniformly from [0, 1)."""
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the cells of a batch.

        Args:
            mask: (N, H, W); only the shape matters.

        Returns:
            (N, 2 F, H, W): the features of the column, then those of the row.

        Raises:
            ValueError: the feature map has more rows or columns than there are vectors.
        """
        batch, height, width = mask.shape
        if height > self.row_num_embed or width > self.col_num_embed:
            raise ValueError(
                f"row_num_embed and col_num_embed must be at least {height} and {width}, the size of the "
                f"feature map, got {self.row_num_embed} and {self.col_num_embed}"
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=2).permute(2, 0, 1).expand(batch, -1, -1, -1)
