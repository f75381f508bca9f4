"""RoIAlign and RoIPool as modules."""

import torch
from torch import nn

from detlib.ops import roi_align

__all__ = ["ROIAlign", "ROIPool", "roi_align"]


class ROIAlign(nn.Module):
    """Crops regions of a feature map to one size by averaging bilinear samples (Mask R-CNN, section 3).

    Args:
        output_size: (height, width) of the result, or one int for both.
        spatial_scale: factor from box coordinates to pixels of the feature map, 1 / stride.
        sampling_ratio: samples per bin along each axis; 0 takes as many as the bin has pixels, rounded up.
        aligned: whether pixel i covers [i, i + 1] (box coordinates are shifted by half a pixel of the map).
            False is the behaviour of the original Caffe2 code, half a pixel off.
    """

    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input, rois):
        """Crops.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 5), each row the index of its picture in the batch, then x0, y0, x1, y1; float32 also
                for feature maps of lower precision.

        Returns:
            (R, C, *output_size) tensor of input's dtype.
        """
        if rois.dim() != 2 or rois.size(1) != 5:
            raise ValueError(f"rois must have shape (R, 5), got {tuple(rois.shape)}")
        return roi_align(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    def extra_repr(self):
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class ROIPool(nn.Module):
    """RoIPool (Girshick, Fast R-CNN, 2015), computed by torchvision.

    It pools every box to a fixed size by the maximum in each bin, with coordinates rounded to whole cells.

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
