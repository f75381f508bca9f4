"""Deformable convolution and its modulated form.

Papers: Dai et al., Deformable ConvNets, 2017, arXiv:1703.06211, and Zhu et al., Deformable ConvNets v2, 2018,
arXiv:1811.11168.

Shape legend: N images, C input channels, O output channels, H and W of the input, H' and W' of the output, G
groups of input channels that share their offsets, kH and kW of the kernel.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import cast

import torch

from detlib.ops._bilinear import sample_bilinear
from detlib.ops._library import (
    check_positive,
    check_same_device,
    check_tensor,
    has_kernel,
    in_layout_of,
    torchvision_ops,
)

# Limit of stride, padding and dilation. Sums of them and of offsets below _FAR_OUTSIDE fit into 32 bits.
_MAX_STEP = 2**20
_FAR_OUTSIDE = 2.0**29
_MAX_INDEX = 2**31 - 1
# Number of samples that the formula computes at a time.
_MAX_SAMPLES = 2**28


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve with a kernel whose taps are moved by offsets and, with `mask`, scaled.

    At output (y, x), the tap of kernel row i reads the input at row
    `y * stride - padding + i * dilation + offset_y`; columns likewise. The input is interpolated bilinearly
    and zero outside. All tensors are differentiable. float16 and bfloat16 are computed in float32, also under
    autocast.

    torchvision's kernel runs on the CPU and on CUDA. Plain PyTorch is used if torchvision is missing, for
    empty tensors, for an image with more than 2**31 samples on the CPU, and on CUDA with
    `torch.use_deterministic_algorithms(True)`. An output with an offset that is not finite is nan.

    Args:
        input: (N, C, H, W) floating point.
        offset: (N, 2 * G * kH * kW, H', W') floating point, in pixels of the input: for each group and tap
            (in row-major order) first y, then x.
        weight: (O, C / groups, kH, kW) floating point; the groups of the convolution follow from its shape.
        bias: (O,) floating point, or None.
        stride: step between outputs in input pixels; an int, or a pair for y and x. It, the padding and the
            dilation are at most 2**20.
        padding: zero padding of the input on each side; an int or a pair.
        dilation: step between taps in input pixels; an int or a pair.
        mask: (N, G * kH * kW, H', W') floating point, the factor of each tap (version 2), or None.

    Returns:
        (N, O, H', W') of `input`'s dtype, with `H' = (H + 2 * padding - dilation * (kH - 1) - 1) // stride +
        1` and W' likewise; in channels-last layout if `input` is.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    stride, padding, dilation = (
        _pair(name, value, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    _check(input, offset, weight, bias, stride, padding, dilation, mask)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    bias, mask = (None if t is None else t.to(dtype) for t in (bias, mask))
    with torch.autocast(input.device.type, enabled=False):
        output = _run(
            input.to(dtype), offset.to(dtype), weight.to(dtype), bias, stride, padding, dilation, mask
        )
    # Like other convolutions, keep the layout: the next one is fast only if it does not have to convert.
    return in_layout_of(input, output.to(input.dtype))


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, torch.SymInt)) for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < least or max(pair) > _MAX_STEP:
        raise ValueError(f"{name} must be from {least} to {_MAX_STEP}, got {value!r}")
    return pair


def _run(input, offset, weight, bias, stride, padding, dilation, mask) -> torch.Tensor:
    """Compute `deform_conv2d` with torchvision's kernel where it is safe, else in plain PyTorch."""
    if not _can_use_torchvision(input):
        return reference_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    run = cast(ModuleType, torchvision_ops()[0]).deform_conv2d
    if input.device.type != "cpu":
        return run(input, offset, weight, bias, stride, padding, dilation, mask)
    # The CPU kernel computes indices into its inputs and its buffer of samples in 32 bits.
    num_images, taps = input.shape[0], weight.shape[2] * weight.shape[3]
    largest = max(input.shape[1] * taps * offset.shape[2] * offset.shape[3], input[0].numel())
    if isinstance(largest, int) and largest * num_images > _MAX_INDEX:
        if num_images == 1:
            return reference_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
        masks: Iterable = [None] * num_images if mask is None else mask.split(1)
        parts = zip(input.split(1), offset.split(1), masks)
        outputs = [_run(x, o, weight, bias, stride, padding, dilation, m) for x, o, m in parts]
        return torch.cat(outputs)
    # It reads outside of the input at a position that is not a number. An output whose offsets are not finite
    # becomes nan, as in the formula.
    legal = offset.where(offset.abs() < _FAR_OUTSIDE, _FAR_OUTSIDE)
    output = run(input, legal, weight, bias, stride, padding, dilation, mask)
    return output + (offset.detach() * 0).sum(dim=1, keepdim=True)


def _output_size(size, kernel, stride, padding, dilation) -> tuple[int, int]:
    return tuple(
        (length + 2 * pad - dil * (taps - 1) - 1) // step + 1
        for length, taps, step, pad, dil in zip(size, kernel, stride, padding, dilation)
    )


def _check(input, offset, weight, bias, stride, padding, dilation, mask) -> None:
    check_tensor("input", input, "(N, C, H, W)")
    check_tensor("offset", offset, "(N, 2 * G * kH * kW, H', W')")
    check_tensor("weight", weight, "(O, C / groups, kH, kW)")
    num_outputs, group_channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    check_positive("weight.shape[2] * weight.shape[3]", taps)
    channels = input.shape[1]
    groups = channels // group_channels if group_channels else 0
    if groups * group_channels != channels or groups == 0 or num_outputs % groups:
        raise ValueError(
            f"weight must have shape (O, C / groups, kH, kW) for the {channels} channels of input and groups"
            f" that divide O, got {tuple(weight.shape)}"
        )
    size = _output_size(input.shape[2:], kernel, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(f"input of {tuple(input.shape[2:])} is too small for a kernel of {tuple(kernel)}")
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups < 1 or offset_groups * 2 * taps != offset.shape[1] or channels % offset_groups:
        raise ValueError(
            f"offset must have 2 * G * kH * kW = {2 * taps} * G channels, where G divides the {channels}"
            f" channels of input, got {offset.shape[1]}"
        )
    _check_size("offset", offset, (input.shape[0], 2 * offset_groups * taps, *size))
    check_same_device("offset", offset, "input", input)
    check_same_device("weight", weight, "input", input)
    if bias is not None:
        check_tensor("bias", bias, "(O)")
        _check_size("bias", bias, (num_outputs,))
        check_same_device("bias", bias, "input", input)
    if mask is not None:
        check_tensor("mask", mask, "(N, G * kH * kW, H', W')")
        _check_size("mask", mask, (input.shape[0], offset_groups * taps, *size))
        check_same_device("mask", mask, "input", input)


def _check_size(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def _can_use_torchvision(input: torch.Tensor) -> bool:
    if input.numel() == 0 or torchvision_ops()[0] is None:
        return False
    if input.is_cuda and torch.are_deterministic_algorithms_enabled():
        return False  # the backward pass of torchvision's kernel adds in no fixed order
    return has_kernel("torchvision::deform_conv2d", input.device.type)


def reference_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask):
    """Compute `deform_conv2d` in plain PyTorch: sample every tap, then multiply matrices.

    The tensors must have the same dtype; stride, padding and dilation are pairs.
    """
    height, width = offset.shape[2:]
    samples_per_row = input.shape[0] * input.shape[1] * weight.shape[2] * weight.shape[3] * width
    rows = height
    if isinstance(samples_per_row, int) and samples_per_row * height > _MAX_SAMPLES:
        rows = max(1, _MAX_SAMPLES // samples_per_row)
    parts = []
    for first in range(0, height, rows):
        part = slice(first, first + rows)
        moved = padding[0] - first * stride[0], padding[1]
        mask_part = None if mask is None else mask[:, :, part]
        parts.append(_rows_of_output(input, offset[:, :, part], weight, stride, moved, dilation, mask_part))
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output if bias is None else output + bias[:, None, None]


def _rows_of_output(input, offset, weight, stride, padding, dilation, mask):
    """Compute some rows of the output without bias; the first one begins at -padding."""
    (num_images, channels, height, width), (num_outputs, group_channels, *kernel) = input.shape, weight.shape
    size, taps = offset.shape[2:], kernel[0] * kernel[1]
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * taps)
    moves = offset.reshape(num_images * offset_groups, *kernel, 2, *size)
    points = []
    for axis in range(2):
        tap = torch.arange(kernel[axis], dtype=input.dtype, device=input.device) * dilation[axis]
        output_position = torch.arange(size[axis], dtype=input.dtype, device=input.device) * stride[axis]
        grid = tap[:, None] + (output_position - padding[axis])
        grid = grid[:, None, :, None] if axis == 0 else grid[None, :, None, :]
        points.append((moves[:, :, :, axis] + grid).flatten(1))
    maps = input.reshape(num_images * offset_groups, channels // offset_groups, height * width)
    samples = sample_bilinear(maps.transpose(1, 2), height, width, *points)
    if mask is not None:
        samples = samples * mask.reshape(*samples.shape[:2], 1)
    # (N * G, taps * H' * W', C / G) becomes (N, groups, C / groups * taps, H' * W').
    samples = samples.transpose(1, 2).reshape(num_images, groups, group_channels * taps, size[0] * size[1])
    output = weight.reshape(groups, num_outputs // groups, group_channels * taps) @ samples
    return output.reshape(num_images, num_outputs, *size)
