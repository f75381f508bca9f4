"""RoIPool (Girshick, Fast R-CNN, 2015), computed by torchvision."""

import torch
from torch import nn

__all__ = ["ROIPool"]


class ROIPool(nn.Module):
    """Pools every box to a fixed size by the maximum in each bin, with coordinates rounded to whole cells.

    Args:
        output_size: side of the pooled square, or (height, width).
        spatial_scale: factor from box coordinates to cells of the map, e.g. 1/16.
    """

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.spatial_scale = spatial_scale

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """Pool.

        Args:
            input: (N, C, H, W) floating point.
            rois: (K, 5) of one dtype with `input`: `batch_index, x1, y1, x2, y2` in absolute pixels.

        Returns:
            (K, C, output height, output width).

        Raises:
            ValueError: `rois` has another shape.
        """
        from torchvision.ops import roi_pool  # on use: all else must run where torchvision does not load

        if rois.dim() != 2 or rois.shape[1] != 5:
            raise ValueError(f"rois must have shape (K, 5), got {tuple(rois.shape)}")
        return roi_pool(input, rois.to(input.dtype), self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
