"""The interface of feature extractors."""

from abc import ABCMeta, abstractmethod

from torch import nn

from detlib.layers.shape_spec import ShapeSpec

__all__ = ["Backbone", "get_backbone_lr_factor"]


class Backbone(nn.Module, metaclass=ABCMeta):
    """Base class of networks that map a batch of images to a dict of named feature maps.

    A subclass either sets `_out_features` (names), `_out_feature_channels` and `_out_feature_strides` (dicts
    by name), or overrides `output_shape`.
    """

    @abstractmethod
    def forward(self, x):
        """Compute the feature maps.

        Args:
            x: (N, C, H, W) float tensor of normalized and padded images.

        Returns:
            dict[str, Tensor]: name to (N, C_f, H_f, W_f) feature map, highest resolution first.
        """

    @property
    def size_divisibility(self) -> int:
        """Divisor of the padded image height and width; 0 if images may have any size."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Additional constraints on padding, for `ImageList.from_tensors`.

        A dict with "size_divisibility" and "square_size" in pixels; empty if the property
        `size_divisibility` is the only constraint.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the number of channels and the stride of each feature map that `forward` returns."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def get_backbone_lr_factor(name: str, factor: float = 0.1) -> float:
    """Return the learning rate factor of a parameter: `factor` in the backbone, 1 elsewhere.

    This is an `lr_factor_func` for `detlib.solver.get_default_optimizer_params`: DETR-like models train the
    backbone with a smaller learning rate than the other parts.

    Args:
        name: full name of the parameter in the model.
        factor: factor for names that contain "backbone".
    """
    return factor if "backbone" in name else 1.0
