"""Feature maps of a backbone brought to one number of channels, and further ones below them.

DETR-like models with several scales (arXiv:2010.04159) take their maps from here. Shapes: N images, H and W
as the backbone gives them.
"""

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from detlib.layers import ConvNormAct, ShapeSpec
from detlib.modeling.config_checks import check_features, take_features

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """A convolution for each map of the backbone, and convolutions of stride 2 for coarser maps.

    The first coarser map comes from the last map of the backbone, each further one from the map before it.
    Parameters are `convs.I.conv`, `convs.I.norm`, `extra_convs.I.conv`, `extra_convs.I.norm`.
    """

    def __init__(
        self,
        input_shapes: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        groups: int = 1,
        dilation: int = 1,
        norm_layer: nn.Module | None = None,
        activation: nn.Module | None = None,
        num_outs: int | None = None,
    ):
        """
        Args:
            input_shapes: the backbone's `output_shape()`, or as much of it as `in_features` needs; the
                channels count.
            in_features: names of the maps to take, from high resolution to low.
            out_channels: channels of every map that comes out.
            kernel_size: of the convolution of each map of the backbone, odd; its padding keeps the size.
            stride: of the same convolutions.
            bias, groups: of all convolutions.
            dilation: of the same convolutions as `kernel_size`.
            norm_layer: a module for (N, out_channels, H, W) maps; every convolution gets a copy of its own.
            activation: a module; every convolution gets a copy of its own.
            num_outs: how many maps come out; by default as many as there are `input_shapes`. What exceeds
                `in_features` are coarser maps, made by 3x3 convolutions of stride 2.

        Raises:
            ValueError: `in_features` that the backbone does not give or without known channels, an even
                `kernel_size`, or fewer `num_outs` than `in_features`.
        """
        super().__init__()
        in_features = list(in_features)
        check_features(in_features, input_shapes, "ChannelMapper's in_features")
        channels: list = [input_shapes[name].channels for name in in_features]
        if None in channels:
            name = in_features[channels.index(None)]
            raise ValueError(f"ChannelMapper's input_shapes do not say how many channels {name!r} has")
        if kernel_size % 2 == 0:
            raise ValueError(f"ChannelMapper's kernel_size must be odd, got {kernel_size}")
        num_outs = len(input_shapes) if num_outs is None else num_outs
        if num_outs < len(in_features):
            raise ValueError(
                f"ChannelMapper's num_outs is {num_outs}, but there are {len(in_features)} in_features, "
                f"{in_features}, and each gives a map"
            )
        self.in_features = in_features
        self.out_channels, self.num_outs = out_channels, num_outs

        def conv(in_channels, **kwargs):
            return ConvNormAct(
                in_channels,
                out_channels,
                bias=bias,
                groups=groups,
                norm_layer=copy.deepcopy(norm_layer),
                activation=copy.deepcopy(activation),
                **kwargs,
            )

        padding = dilation * (kernel_size - 1) // 2
        self.convs = nn.ModuleList(
            conv(c, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
            for c in channels
        )
        extra = num_outs - len(in_features)
        sources = [channels[-1], *[out_channels] * (extra - 1)] if extra else []
        self.extra_convs = nn.ModuleList(conv(c, kernel_size=3, stride=2, padding=1) for c in sources)

    def forward(self, inputs):
        """Compute the maps.

        Args:
            inputs: dict of the backbone's (N, C_f, H_f, W_f) float maps; names beyond `in_features` are
                left alone.

        Returns:
            tuple[Tensor]: `num_outs` maps (N, out_channels, H_f, W_f), high resolution first. A further map
            has ceil(H / 2) x ceil(W / 2) of the one above it.

        Raises:
            ValueError: the backbone does not give one of `in_features`.
        """
        maps = take_features(inputs, self.in_features, "ChannelMapper's in_features")
        outputs = [conv(x) for conv, x in zip(self.convs, maps)]
        x = maps[-1]
        for conv in self.extra_convs:
            x = conv(x)
            outputs.append(x)
        return tuple(outputs)
