"""Convolutions with norm and activation, and small extensions of torch functions."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers.batch_norm import FrozenBatchNorm2d
from detlib.ops.frozen_batch_norm import apply_frozen_batch_norm, is_fast

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvNormAct",
    "ConvTranspose2d",
    "Linear",
    "cat",
    "check_if_dynamo_compiling",
    "conv_relu",
    "cross_entropy",
    "empty_input_loss_func_wrapper",
    "for_convolutions",
    "interpolate",
    "move_device_like",
    "nonzero_tuple",
    "shapes_to_tensor",
]

_has_global_hooks = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)

# detectron2's names; torch handles empty batches in all of them.
BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


def check_if_dynamo_compiling() -> bool:
    """Return whether the caller runs inside `torch.compile` or `torch.export`."""
    return torch.compiler.is_compiling()


# Device types whose convolutions and RoIAlign are faster in channels-last layout.
CHANNELS_LAST_ON = ("cpu", "cuda")


def for_convolutions(x: torch.Tensor) -> torch.Tensor:
    """Return the same (N, C, H, W) values in the memory layout in which convolutions are fastest.

    This is channels-last on the CPU and on CUDA. `x` itself is returned on other devices, and if it already
    has that layout.
    """
    if x.device.type not in CHANNELS_LAST_ON:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def shapes_to_tensor(x: Sequence[int | torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
    """Convert a list of sizes to an integer tensor.

    Args:
        x: S sizes, ints or 0-dimensional integer tensors.
        device: device of the result; None for the device of the sizes if they are tensors, else the CPU.

    Returns:
        (S,) integer tensor.
    """
    if any(isinstance(size, torch.Tensor) for size in x):
        if device is None:
            device = next(size.device for size in x if isinstance(size, torch.Tensor))
        return torch.stack([torch.as_tensor(size, device=device) for size in x])
    return torch.as_tensor(x, dtype=torch.int64, device=device)


def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate tensors like `torch.cat`, but return a single tensor without a copy."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"cat() takes a list or tuple of tensors, got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a loss return zero, not NaN, if it averages over no samples.

    The zero is computed from `input`, so that it still requires grad: under DistributedDataParallel, every
    process must produce a gradient for every parameter, even without samples.

    Args:
        loss_func: function `(input, target, *, reduction, **kwargs)`, with arguments as in torch.
    """

    @functools.wraps(loss_func)
    def wrapped(input, target, *, reduction="mean", **kwargs):
        if target.numel() == 0 and reduction == "mean":
            return input.sum() * 0.0
        return loss_func(input, target, reduction=reduction, **kwargs)

    # Show the signature of the wrapper: `reduction` is keyword-only.
    del wrapped.__wrapped__
    return wrapped


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional norm and an optional activation."""

    def __init__(self, *args, **kwargs):
        """Build the module.

        Args:
            norm: module applied to the output, stored as the submodule `norm`, or None.
            activation: callable applied after the norm, or None.
            *args, **kwargs: arguments of `torch.nn.Conv2d`.
        """
        norm = kwargs.pop("norm", None)
        activation = kwargs.pop("activation", None)
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class ConvNormAct(nn.Module):
    """A convolution followed by an optional norm and an optional activation.

    Its parameters are `conv.*` and `norm.*`, as in checkpoints of DETR-like models. In contrast,
    `detlib.layers.Conv2d` is itself the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm_layer: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        """Build the module.

        Args:
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: arguments of
                `torch.nn.Conv2d`.
            norm_layer: module applied to the (N, out_channels, H', W') output, or None.
            activation: module applied after the norm, or None.
        """
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.norm = norm_layer
        self.activation = activation

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def conv_relu(conv: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `relu(conv(x) + residual)`, the end of a branch of a residual block.

    If `conv` is a `Conv2d` with a frozen norm, norm, sum and ReLU are fused into one pass over memory. They
    are not fused if the convolution or its norm has hooks or is patched.

    Args:
        conv: maps (N, C_in, H, W) to (N, C, H', W'): a `Conv2d` with its norm, or any other module.
        x: (N, C_in, H, W).
        residual: (N, C, H', W') or None.

    Returns:
        (N, C, H', W').
    """
    if not _is_plain(conv):
        return _relu(conv(x), residual)
    y, norm = conv._conv_forward(x, conv.weight, conv.bias), conv.norm
    if not is_fast(y):
        return _relu(norm(y), residual)
    if residual is not None:
        residual = residual.to(y.dtype)
    constants = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return apply_frozen_batch_norm(y, residual, *constants, norm.eps, True)


def _relu(out: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    if residual is not None:
        out += residual
    return F.relu_(out)


def _is_plain(conv: nn.Module) -> bool:
    """Return whether the modules can be bypassed: nothing observes or changes their calls."""
    return (
        type(conv) is Conv2d
        and type(conv.norm) is FrozenBatchNorm2d
        and conv.activation is None
        and not any(map(_is_watched, (conv, conv.norm)))
        and not _has_global_hooks()
    )


def _is_watched(module: nn.Module) -> bool:
    hooks = (
        module._forward_pre_hooks or module._forward_hooks
        or module._backward_pre_hooks or module._backward_hooks
    )  # fmt: skip
    return bool(hooks) or "forward" in module.__dict__


def nonzero_tuple(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the indices of nonzero elements, one int64 tensor per dimension; a scalar is one element."""
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def move_device_like(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """Return `src` on the device of `dst`."""
    return src.to(dst.device)
