"""Deformable convolutions as modules (Dai et al., 2017, arXiv:1703.06211; Zhu et al., 2018,
arXiv:1811.11168)."""

import torch
from torch import nn

from detlib.ops import deform_conv2d

__all__ = ["DeformConv", "ModulatedDeformConv"]


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _build(module, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias):
    """Checks and keeps the arguments of a deformable convolution, and makes its parameters."""
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"groups must divide {name}, got {groups} and {channels}")
    if in_channels % module.deformable_groups:
        raise ValueError(
            f"deformable_groups must divide in_channels, got {module.deformable_groups} and {in_channels}"
        )
    module.in_channels = in_channels
    module.out_channels = out_channels
    module.kernel_size = _pair(kernel_size)
    module.stride = _pair(stride)
    module.padding = _pair(padding)
    module.dilation = _pair(dilation)
    module.groups = groups
    module.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *module.kernel_size))
    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    module.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None


def _forward(module, x, offset, mask):
    taps = module.kernel_size[0] * module.kernel_size[1]
    wanted = {"offset": (offset, 2), "mask": (mask, 1)} if mask is not None else {"offset": (offset, 2)}
    for name, (tensor, per_tap) in wanted.items():
        if tensor.shape[1] != per_tap * module.deformable_groups * taps:
            raise ValueError(
                f"{name} must have {per_tap} * deformable_groups * kernel height * kernel width ="
                f" {per_tap * module.deformable_groups * taps} channels, got {tensor.shape[1]}"
            )
    x = deform_conv2d(
        x, offset, module.weight, module.bias, module.stride, module.padding, module.dilation, mask
    )
    if module.norm is not None:
        x = module.norm(x)
    if module.activation is not None:
        x = module.activation(x)
    return x


def _repr(module):
    names = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "deformable_groups",
    )  # fmt: skip
    values = [f"{name}={getattr(module, name)}" for name in names]
    return ", ".join([*values, f"bias={module.bias is not None}"])


class DeformConv(nn.Module):
    """Deformable convolution: each tap of the kernel reads where an offset moves it.

    Its parameters are `weight` and, if asked for, `bias`.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, padding, dilation: as `torch.nn.Conv2d`'s, an int or (y, x).
        groups: groups of the convolution.
        deformable_groups: groups of input channels with offsets of their own.
        bias: whether a learnt number is added to each output channel.
        norm: a module applied to the output, kept as the submodule `norm`, or None.
        activation: a callable applied after the norm, or None.

    Raises:
        ValueError: `groups` or `deformable_groups` does not divide the channels.
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
        bias=False,
        norm=None,
        activation=None,
    ):
        super().__init__()
        self.deformable_groups = deformable_groups
        _build(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = norm
        self.activation = activation

    def forward(self, x, offset):
        """Convolves.

        Args:
            x: (N, in_channels, H, W) floating point.
            offset: (N, 2 * deformable_groups * kH * kW, H', W') in pixels of `x`: per group and tap, row by
                row, first y, then x.

        Returns:
            (N, out_channels, H', W').
        """
        return _forward(self, x, offset, None)

    def extra_repr(self):
        return _repr(self)


class ModulatedDeformConv(nn.Module):
    """Deformable convolution version 2: each tap also has a factor.

    Its parameters are `weight` and `bias`. The arguments are `DeformConv`'s, but a bias is the default.

    Raises:
        ValueError: `groups` or `deformable_groups` does not divide the channels.
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
        super().__init__()
        self.deformable_groups = deformable_groups
        _build(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = norm
        self.activation = activation

    def forward(self, x, offset, mask):
        """Convolves.

        Args:
            x: (N, in_channels, H, W) floating point.
            offset: (N, 2 * deformable_groups * kH * kW, H', W') in pixels of `x`: per group and tap, row by
                row, first y, then x.
            mask: (N, deformable_groups * kH * kW, H', W'), the factor of each tap.

        Returns:
            (N, out_channels, H', W').
        """
        if mask is None:
            raise ValueError("mask must be a tensor; without one, use DeformConv")
        return _forward(self, x, offset, mask)

    def extra_repr(self):
        return _repr(self)
