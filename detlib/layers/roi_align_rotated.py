"""RoIAlign module for rotated boxes."""

from torch import nn

from detlib.ops import roi_align_rotated

__all__ = ["ROIAlignRotated", "roi_align_rotated"]


class ROIAlignRotated(nn.Module):
    """RoIAlign of rotated boxes: pools rotated regions of a feature map to a fixed size.

    Pixel i covers [i, i + 1], as in `ROIAlign(aligned=True)`.
    """

    def __init__(self, output_size, spatial_scale, sampling_ratio):
        """Build the module.

        Args:
            output_size: (height, width) of the result, or one int for both.
            spatial_scale: factor from box coordinates to pixels of the feature map, 1 / stride.
            sampling_ratio: samples per bin along each axis; 0 for the size of the bin in pixels, rounded up.
        """
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input, rois):
        """Pool the regions.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 6), index of the image in the batch, then center x, center y, width, height in pixels
                and the angle in degrees, counter-clockwise; float32 also for feature maps of lower precision.

        Returns:
            (R, C, *output_size) tensor of the dtype of `input`.

        Raises:
            ValueError: `rois` has a different shape.
        """
        if rois.dim() != 2 or rois.size(1) != 6:
            raise ValueError(f"rois must have shape (R, 6), got {tuple(rois.shape)}")
        return roi_align_rotated(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def extra_repr(self):
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
