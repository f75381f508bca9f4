"""Convolutional building blocks."""

from torch import nn

from detlib.layers.batch_norm import FrozenBatchNorm2d, get_norm
from detlib.layers.fvcore_nn import weight_init
from detlib.layers.wrappers import Conv2d

__all__ = ["CNNBlockBase", "DepthwiseSeparableConv2d"]


class CNNBlockBase(nn.Module):
    """A block that maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride).

    Backbones stack such blocks and compute the output shape from these three attributes.
    """

    def __init__(self, in_channels, out_channels, stride):
        """Build the module.

        Args:
            in_channels: number of input channels.
            out_channels: number of output channels.
            stride: input pixels per output pixel.
        """
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self):
        """Freeze all parameters and convert batch norms to FrozenBatchNorm2d.

        Returns:
            The block itself.
        """
        for param in self.parameters():
            param.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


class DepthwiseSeparableConv2d(nn.Module):
    """A depthwise convolution followed by a 1x1 convolution (Xception, arXiv:1610.02357)."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        dilation=1,
        *,
        norm1=None,
        activation1=None,
        norm2=None,
        activation2=None,
    ):
        """Build the module.

        Args:
            in_channels: number of input channels.
            out_channels: number of output channels.
            kernel_size, padding, dilation: arguments of the depthwise convolution.
            norm1, norm2: norm after the first and the second convolution, in the forms that `get_norm` takes.
            activation1, activation2: callables applied after the first and the second norm, or None.
        """
        super().__init__()
        self.depthwise = Conv2d(
            in_channels,
            in_channels,
            kernel_size=kernel_size,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=not norm1,
            norm=get_norm(norm1, in_channels),
            activation=activation1,
        )
        self.pointwise = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=not norm2,
            norm=get_norm(norm2, out_channels),
            activation=activation2,
        )
        weight_init.c2_msra_fill(self.depthwise)
        weight_init.c2_msra_fill(self.pointwise)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return self.pointwise(self.depthwise(x))
