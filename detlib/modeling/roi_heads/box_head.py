"""The box head, which maps the pooled features of a region to a vector."""

import numpy as np
import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers import Conv2d, ShapeSpec, for_convolutions, get_norm
from detlib.layers.fvcore_nn import weight_init
from detlib.modeling.config_checks import check_norm
from detlib.utils.registry import Registry

__all__ = ["FastRCNNConvFCHead", "ROI_BOX_HEAD_REGISTRY", "build_box_head"]

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
ROI_BOX_HEAD_REGISTRY.__doc__ = """
Box heads: modules that map pooled features (R, C, H, W) to features for the box predictor and have the
property `output_shape`. An entry is called as `entry(cfg, input_shape)` with the `ShapeSpec` of the pooled
features.
"""


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions followed by fully connected layers, each with a ReLU."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, conv_dims: list[int], fc_dims: list[int], conv_norm: str = ""
    ):
        """
        Args:
            input_shape: channels, height and width of the pooled features.
            conv_dims: output channels of each convolution.
            fc_dims: output size of each fully connected layer.
            conv_norm: normalization of the convolutions, see `detlib.layers.get_norm`.

        Raises:
            ValueError: there is no layer.
        """
        super().__init__()
        if len(conv_dims) + len(fc_dims) == 0:
            raise ValueError(
                "FastRCNNConvFCHead has no layer: set conv_dims or fc_dims "
                "(MODEL.ROI_BOX_HEAD.NUM_CONV or NUM_FC)."
            )
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        for k, dim in enumerate(conv_dims, 1):
            conv = Conv2d(
                channels,
                dim,
                kernel_size=3,
                padding=1,
                bias=not conv_norm,
                norm=get_norm(conv_norm, dim),
                activation=nn.ReLU(),
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{k}", conv)
            channels = dim
        self._output_shape = ShapeSpec(channels=channels, height=height, width=width)
        size = int(np.prod([channels, height or 1, width or 1]))
        for k, dim in enumerate(fc_dims, 1):
            if k == 1:
                self.add_module("flatten", nn.Flatten())
            fc = nn.Linear(size, dim)
            weight_init.c2_xavier_fill(fc)
            self.add_module(f"fc{k}", fc)
            self.add_module(f"fc_relu{k}", nn.ReLU())
            size = dim
            self._output_shape = ShapeSpec(channels=dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head = cfg.MODEL.ROI_BOX_HEAD
        check_norm(head.NORM, "MODEL.ROI_BOX_HEAD.NORM")
        return {
            "input_shape": input_shape,
            "conv_dims": [head.CONV_DIM] * head.NUM_CONV,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pooled features (R, C, H, W) to (R, D), or to (R, D, H, W) if there are only convolutions."""
        if isinstance(self[0], Conv2d):
            x = for_convolutions(x)
        for layer in self:
            x = layer(x)
        return x

    @property
    def output_shape(self) -> ShapeSpec:
        """Channels of the output, with height and width if there are only convolutions."""
        return self._output_shape


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head `cfg.MODEL.ROI_BOX_HEAD.NAME`."""
    name = cfg.MODEL.ROI_BOX_HEAD.NAME
    return ROI_BOX_HEAD_REGISTRY.get(name, key="MODEL.ROI_BOX_HEAD.NAME")(cfg, input_shape)
