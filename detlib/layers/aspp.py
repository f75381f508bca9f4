"""Atrous spatial pyramid pooling (DeepLabV3, https://arxiv.org/abs/1706.05587)."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers.batch_norm import get_norm
from detlib.layers.blocks import DepthwiseSeparableConv2d
from detlib.layers.fvcore_nn import weight_init
from detlib.layers.wrappers import Conv2d

__all__ = ["ASPP"]


class ASPP(nn.Module):
    """Parallel 1x1, dilated 3x3 and pooling branches, merged by a 1x1 convolution."""

    def __init__(
        self,
        in_channels,
        out_channels,
        dilations,
        *,
        norm,
        activation,
        pool_kernel_size=None,
        dropout: float = 0.0,
        use_depthwise_separable_conv=False,
    ):
        """Build the module.

        Args:
            in_channels: number of input channels.
            out_channels: number of channels of each branch and of the result.
            dilations: dilation of each 3x3 branch.
            norm: norm of the convolutions, in the forms that `get_norm` takes; "" gives them a bias instead.
            activation: callable applied after each norm; copied for each convolution.
            pool_kernel_size: window (height, width) of the pooling branch, which must divide the size of the
                input; None pools over the entire image, without a norm (one pixel per image has no
                statistics).
            dropout: probability of zeroing an element of the result in training.
            use_depthwise_separable_conv: whether the 3x3 branches are depthwise separable.
        """
        super().__init__()
        self.pool_kernel_size = pool_kernel_size
        self.dropout = dropout

        def conv(channels, kernel_size, dilation=1, use_norm=True):
            layer = Conv2d(
                channels,
                out_channels,
                kernel_size=kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                bias=not (use_norm and norm),
                norm=get_norm(norm, out_channels) if use_norm else None,
                activation=deepcopy(activation),
            )
            weight_init.c2_xavier_fill(layer)
            return layer

        self.convs = nn.ModuleList([conv(in_channels, 1)])
        for dilation in dilations:
            if use_depthwise_separable_conv:
                branch = DepthwiseSeparableConv2d(
                    in_channels,
                    out_channels,
                    padding=dilation,
                    dilation=dilation,
                    norm1=norm,
                    activation1=deepcopy(activation),
                    norm2=norm,
                    activation2=deepcopy(activation),
                )
            else:
                branch = conv(in_channels, 3, dilation)
            self.convs.append(branch)
        if pool_kernel_size is None:
            pool = nn.AdaptiveAvgPool2d(1)
        else:
            pool = nn.AvgPool2d(kernel_size=pool_kernel_size, stride=1)
        self.convs.append(nn.Sequential(pool, conv(in_channels, 1, use_norm=pool_kernel_size is not None)))
        self.project = conv(len(self.convs) * out_channels, 1)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H, W).

        Raises:
            ValueError: if `pool_kernel_size` does not divide (H, W).
        """
        size = x.shape[-2:]
        if self.pool_kernel_size is not None:
            kernel_h, kernel_w = self.pool_kernel_size
            if size[0] % kernel_h or size[1] % kernel_w:
                raise ValueError(
                    f"pool_kernel_size {tuple(self.pool_kernel_size)} must divide the size {tuple(size)}"
                )
        outputs = [conv(x) for conv in self.convs]
        outputs[-1] = F.interpolate(outputs[-1], size=size, mode="bilinear", align_corners=False)
        out = self.project(torch.cat(outputs, dim=1))
        return F.dropout(out, self.dropout, training=self.training) if self.dropout > 0 else out
