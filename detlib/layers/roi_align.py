"""RoIAlign and RoIPool modules."""

import torch
from torch import nn

from detlib.ops import roi_align

__all__ = ["ROIAlign", "ROIPool", "roi_align"]


class ROIAlign(nn.Module):
    """RoIAlign (Mask R-CNN, section 3): pools regions of a feature map to a fixed size."""

    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        """Build the module.

        Args:
            output_size: (height, width) of the result, or one int for both.
            spatial_scale: factor from box coordinates to pixels of the feature map, 1 / stride.
            sampling_ratio: samples per bin along each axis; 0 for the size of the bin in pixels, rounded up.
            aligned: whether pixel i covers [i, i + 1], so that box coordinates are shifted by half a
                pixel of the feature map. False is the behavior of the original Caffe2 code, which is half a
                pixel off.
        """
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input, rois):
        """Pool the regions.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 5), index of the image in the batch, then x0, y0, x1, y1; float32 also for feature maps
                of lower precision.

        Returns:
            (R, C, *output_size) tensor of the dtype of `input`.

        Raises:
            ValueError: `rois` has a different shape.
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

    It pools every box to a fixed size by the maximum of each bin, with coordinates rounded to integer cells.
    """

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float):
        """Build the module.

        Args:
            output_size: side of the pooled square, or (height, width).
            spatial_scale: factor from box coordinates to cells of the feature map, e.g. 1/16.
        """
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.spatial_scale = spatial_scale

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """Pool the regions.

        Args:
            input: (N, C, H, W) floating point.
            rois: (K, 5) `batch_index, x1, y1, x2, y2` in absolute pixels.

        Returns:
            (K, C, output height, output width).

        Raises:
            ValueError: `rois` has a different shape.
        """
        from torchvision.ops import roi_pool  # here, since the rest must work without torchvision

        if rois.dim() != 2 or rois.shape[1] != 5:
            raise ValueError(f"rois must have shape (K, 5), got {tuple(rois.shape)}")
        return roi_pool(input, rois.to(input.dtype), self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
