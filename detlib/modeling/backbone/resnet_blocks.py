"""The stem and residual blocks of ResNet and ResNeXt.

Published in "Deep Residual Learning for Image Recognition" (arXiv:1512.03385) and "Aggregated Residual
Transformations for Deep Neural Networks" (arXiv:1611.05431); with deformable convolutions in "Deformable
Convolutional Networks" (arXiv:1703.06211) and "Deformable ConvNets v2" (arXiv:1811.11168).
"""

from torch import nn
from torch.nn import functional as F

from detlib.layers import Conv2d, DeformConv, ModulatedDeformConv, get_norm
from detlib.layers.blocks import CNNBlockBase
from detlib.layers.fvcore_nn import weight_init
from detlib.layers.wrappers import conv_relu

__all__ = ["BasicBlock", "BasicStem", "BottleneckBlock", "DeformBottleneckBlock", "ResNetBlockBase"]

ResNetBlockBase = CNNBlockBase


def _normed_conv(
    in_channels, out_channels, kernel_size, *, norm, stride=1, dilation=1, conv_class=Conv2d, **kwargs
):
    """A bias-free convolution that keeps the size (up to `stride`), normalised, with MSRA weights."""
    conv = conv_class(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def _projection(in_channels, out_channels, *, norm, stride):
    """The 1x1 convolution on the shortcut, or None where the identity fits."""
    if in_channels == out_channels and stride == 1:
        return None
    return _normed_conv(in_channels, out_channels, 1, norm=norm, stride=stride)


class BasicStem(CNNBlockBase):
    """7x7 convolution and 3x3 max pooling: (N, in_channels, H, W) to (N, out_channels, H/4, W/4)."""

    def __init__(self, in_channels=3, out_channels=64, norm="BN"):
        """
        Args:
            in_channels: channels of the picture.
            out_channels: channels of the result.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
        """
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _normed_conv(in_channels, out_channels, 7, norm=norm, stride=2)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H/4), ceil(W/4))."""
        x = conv_relu(self.conv1, x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class BasicBlock(CNNBlockBase):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and ResNet-34."""

    def __init__(self, in_channels, out_channels, *, stride=1, norm="BN"):
        """
        Args:
            in_channels: channels that go in.
            out_channels: channels that come out.
            stride: stride of the first convolution and of the shortcut.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, out_channels, 3, norm=norm, stride=stride)
        self.conv2 = _normed_conv(out_channels, out_channels, 3, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        return conv_relu(self.conv2, out, x if self.shortcut is None else self.shortcut(x))


class BottleneckBlock(CNNBlockBase):
    """1x1, 3x3, 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper, and of ResNeXt."""

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        bottleneck_channels,
        stride=1,
        num_groups=1,
        norm="BN",
        stride_in_1x1=False,
        dilation=1,
    ):
        """
        Args:
            in_channels: channels that go in.
            out_channels: channels that come out.
            bottleneck_channels: channels of the 3x3 convolution.
            stride: stride of the block.
            num_groups: groups of the 3x3 convolution (ResNeXt has 32 or 64).
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            stride_in_1x1: whether the first 1x1 convolution strides (the original MSRA models, Caffe) or
                the 3x3 one does (torchvision, fb.resnet.torch, ResNeXt).
            dilation: dilation of the 3x3 convolution.
        """
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, bottleneck_channels, 1, norm=norm, stride=stride_1x1)
        self.conv2 = _normed_conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm=norm,
            stride=stride_3x3,
            dilation=dilation,
            groups=num_groups,
        )
        self.conv3 = _normed_conv(bottleneck_channels, out_channels, 1, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        out = conv_relu(self.conv2, out)
        return conv_relu(self.conv3, out, x if self.shortcut is None else self.shortcut(x))


class DeformBottleneckBlock(CNNBlockBase):
    """A bottleneck block whose 3x3 convolution is deformable: its taps read where learnt offsets move them.

    A further 3x3 convolution, `conv2_offset`, gives the offsets and starts at zero, so that a new block
    computes what a `BottleneckBlock` of the same weights does (times one half, the initial factor of each
    tap, before the norm of a modulated one).
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        bottleneck_channels,
        stride=1,
        num_groups=1,
        norm="BN",
        stride_in_1x1=False,
        dilation=1,
        deform_modulated=False,
        deform_num_groups=1,
    ):
        """
        Args:
            in_channels, out_channels, bottleneck_channels, stride, num_groups, norm, stride_in_1x1,
            dilation: as for `BottleneckBlock`.
            deform_modulated: whether each tap also has a factor in (0, 1), as in Deformable ConvNets v2.
            deform_num_groups: groups of channels with offsets of their own.
        """
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.deform_modulated = deform_modulated
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, bottleneck_channels, 1, norm=norm, stride=stride_1x1)
        self.num_taps = 9 * deform_num_groups
        self.conv2_offset = Conv2d(
            bottleneck_channels,
            self.num_taps * (3 if deform_modulated else 2),
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = _normed_conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm=norm,
            stride=stride_3x3,
            dilation=dilation,
            conv_class=ModulatedDeformConv if deform_modulated else DeformConv,
            groups=num_groups,
            deformable_groups=deform_num_groups,
        )
        self.conv3 = _normed_conv(bottleneck_channels, out_channels, 1, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            offset, mask = offset.split((2 * self.num_taps, self.num_taps), dim=1)
            out = self.conv2(out, offset, mask.sigmoid())
        else:
            out = self.conv2(out, offset)
        return conv_relu(self.conv3, F.relu_(out), x if self.shortcut is None else self.shortcut(x))
