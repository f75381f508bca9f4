"""Convolutions that map a backbone's features to one number of channels and add coarser levels.

Multi-scale DETR models (arXiv:2010.04159) use them. Shape legend: N images, C_f, H_f and W_f the channels,
height and width of a feature map.
"""

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from detlib.layers import ConvNormAct, ShapeSpec
from detlib.modeling.config_checks import check_features, take_features

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """A convolution for each feature map of the backbone, and convolutions with stride 2 for coarser levels.

    The first coarser level is computed from the backbone's last feature map, each further one from the
    previous level. Parameters are `convs.I.conv`, `convs.I.norm`, `extra_convs.I.conv`, `extra_convs.I.norm`.
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
            input_shapes: the backbone's `output_shape()`, or a subset that contains `in_features`; only the
                channels are used.
            in_features: names of the feature maps to use, in descending order of resolution.
            out_channels: channels of every output.
            kernel_size: kernel size of the convolution on each feature map of the backbone, odd. The padding
                preserves the size if `stride` is 1.
            stride: stride of these convolutions.
            bias: whether all convolutions have a bias.
            groups: groups of all convolutions.
            dilation: dilation of the convolutions with `kernel_size`.
            norm_layer: a module for (N, out_channels, H, W) tensors; every convolution gets its own copy.
            activation: a module; every convolution gets its own copy.
            num_outs: number of outputs; by default the number of `input_shapes`. Those beyond
                `in_features` are coarser levels, computed by 3x3 convolutions with stride 2.

        Raises:
            ValueError: the backbone lacks one of `in_features` or its channels are unknown, `kernel_size`
                is even, or `num_outs` is below the number of `in_features`.
        """
        super().__init__()
        in_features = list(in_features)
        check_features(in_features, input_shapes, "ChannelMapper's in_features")
        channels: list = [input_shapes[name].channels for name in in_features]
        if None in channels:
            name = in_features[channels.index(None)]
            raise ValueError(
                f"ChannelMapper's input_shapes do not specify the number of channels of {name!r}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"ChannelMapper's kernel_size must be odd, got {kernel_size}")
        num_outs = len(input_shapes) if num_outs is None else num_outs
        if num_outs < len(in_features):
            raise ValueError(
                f"ChannelMapper's num_outs is {num_outs}, but there are {len(in_features)} in_features, "
                f"{in_features}, and each has an output"
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
        """Compute the outputs.

        Args:
            inputs: the backbone's feature maps (N, C_f, H_f, W_f) by name; those not in `in_features` are
                ignored.

        Returns:
            tuple[Tensor]: `num_outs` tensors (N, out_channels, H_f, W_f), in descending order of resolution.
            Each coarser level has the size ceil(H / 2) x ceil(W / 2) of the previous one.

        Raises:
            ValueError: `inputs` lacks one of `in_features`.
        """
        features = take_features(inputs, self.in_features, "ChannelMapper's in_features")
        outputs = [conv(x) for conv, x in zip(self.convs, features)]
        x = features[-1]
        for conv in self.extra_convs:
            x = conv(x)
            outputs.append(x)
        return tuple(outputs)
