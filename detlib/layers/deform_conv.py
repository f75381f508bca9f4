"""Deformable convolution modules (arXiv:1703.06211) and their modulated form (arXiv:1811.11168)."""

import torch
from torch import nn

from detlib.ops import deform_conv2d

__all__ = ["DeformConv", "ModulatedDeformConv"]


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class _DeformConvBase(nn.Module):
    """Parameters, checks and the call of the operator, with or without a modulation mask."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=False,
        norm=None,
        activation=None,
    ):
        """Build the module.

        Args:
            in_channels, out_channels: number of input and output channels.
            kernel_size, stride, padding, dilation: as in `torch.nn.Conv2d`, an int or (y, x).
            groups: groups of the convolution.
            deformable_groups: groups of input channels that have their own offsets.
            bias: whether to add a learned bias to each output channel.
            norm: module applied to the output, stored as the submodule `norm`, or None.
            activation: callable applied after the norm, or None.

        Raises:
            ValueError: `groups` or `deformable_groups` does not divide the channels.
        """
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"groups must divide {name}, got {groups} and {channels}")
        if in_channels % deformable_groups:
            raise ValueError(
                f"deformable_groups must divide in_channels, got {deformable_groups} and {in_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm = norm
        self.activation = activation

    def _convolve(self, x, offset, mask):
        taps = self.kernel_size[0] * self.kernel_size[1]
        expected = {"offset": (offset, 2)} if mask is None else {"offset": (offset, 2), "mask": (mask, 1)}
        for name, (tensor, per_tap) in expected.items():
            channels = per_tap * self.deformable_groups * taps
            if tensor.shape[1] != channels:
                raise ValueError(
                    f"{name} must have {per_tap} * deformable_groups * kernel height * kernel width ="
                    f" {channels} channels, got {tensor.shape[1]}"
                )
        x = deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self):
        names = (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
            "deformable_groups",
        )  # fmt: skip
        values = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([*values, f"bias={self.bias is not None}"])


class DeformConv(_DeformConvBase):
    """Deformable convolution: an offset moves the position that each tap of the kernel reads.

    Its parameters are `weight` and, on request, `bias`.
    """

    def forward(self, x, offset):
        """Apply the convolution, norm and activation.

        Args:
            x: (N, in_channels, H, W) floating point.
            offset: (N, 2 * deformable_groups * kH * kW, H', W') in pixels of `x`: for each group and tap (in
                row-major order) first y, then x.

        Returns:
            (N, out_channels, H', W').
        """
        return self._convolve(x, offset, None)


class ModulatedDeformConv(_DeformConvBase):
    """Deformable convolution version 2: a mask also scales each tap.

    Its parameters are `weight` and `bias`. It takes the arguments of `DeformConv`, but has a bias by default.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=True,
        norm=None,
        activation=None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            deformable_groups=deformable_groups,
            bias=bias,
            norm=norm,
            activation=activation,
        )

    def forward(self, x, offset, mask):
        """Apply the convolution, norm and activation.

        Args:
            x: (N, in_channels, H, W) floating point.
            offset: (N, 2 * deformable_groups * kH * kW, H', W') in pixels of `x`: for each group and tap (in
                row-major order) first y, then x.
            mask: (N, deformable_groups * kH * kW, H', W'), the factor of each tap.

        Returns:
            (N, out_channels, H', W').
        """
        if mask is None:
            raise ValueError("mask must be a tensor, got None; use DeformConv to convolve without a mask")
        return self._convolve(x, offset, mask)
