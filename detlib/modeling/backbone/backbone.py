"""The interface that every feature extractor has towards the rest of a model."""

from abc import ABCMeta, abstractmethod

from torch import nn

from detlib.layers.shape_spec import ShapeSpec

__all__ = ["Backbone", "get_backbone_lr_factor"]


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from a batch of pictures to a dict of named feature maps.

    A subclass either fills `_out_features` (names), `_out_feature_channels` and `_out_feature_strides`
    (dicts by name), or overrides `output_shape`.
    """

    @abstractmethod
    def forward(self, x):
        """Compute the feature maps.

        Args:
            x: (N, C, H, W) float tensor, normalised and padded pictures.

        Returns:
            dict[str, Tensor]: a (N, C_f, H_f, W_f) map for each feature name, highest resolution first.
        """

    @property
    def size_divisibility(self) -> int:
        """Padded picture height and width must be multiples of this; 0 where any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What else padding must respect, for `ImageList.from_tensors`.

        "size_divisibility" and/or "square_size", in pixels; empty where `size_divisibility` says all.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map that `forward` returns."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def get_backbone_lr_factor(name: str, factor: float = 0.1) -> float:
    """The factor on the learning rate of a parameter: `factor` within the backbone, 1 elsewhere.

    For `detlib.solver.get_default_optimizer_params(lr_factor_func=...)`; DETR-like models train their
    backbone more slowly than what is built upon it.

    Args:
        name: the parameter's full name in the model.
        factor: what the learning rate is multiplied with where "backbone" is in the name.
    """
    return factor if "backbone" in name else 1.0
