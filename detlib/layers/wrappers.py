"""Small functions and modules that the rest of the library builds on instead of their torch.nn originals."""

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

# Names that users import from here; torch itself handles empty batches in all of them.
BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


def check_if_dynamo_compiling() -> bool:
    """Whether the caller runs inside `torch.compile` or `torch.export`."""
    return torch.compiler.is_compiling()


# Device types whose convolutions and RoIAlign are faster in channels-last layout.
CHANNELS_LAST_ON = ("cpu", "cuda")


def for_convolutions(x: torch.Tensor) -> torch.Tensor:
    """Return the same (N, C, H, W) values in the memory layout in which convolutions are fastest.

    That is channels-last on a CPU and on CUDA. On other devices, and where it has that layout already, `x`
    itself is returned.
    """
    if x.device.type not in CHANNELS_LAST_ON:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def shapes_to_tensor(x: Sequence[int | torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
    """Turns a list of sizes into an int64 tensor; sizes may be ints or 0-dimensional integer tensors.

    Args:
        x: S sizes.
        device: device of the result; by default that of the sizes when they are tensors, else the CPU.

    Returns:
        (S,) integer tensor.
    """
    if any(isinstance(size, torch.Tensor) for size in x):
        if device is None:
            device = next(size.device for size in x if isinstance(size, torch.Tensor))
        return torch.stack([torch.as_tensor(size, device=device) for size in x])
    return torch.as_tensor(x, dtype=torch.int64, device=device)


def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`torch.cat` that hands a single tensor back as it is, without a copy."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"cat() takes a list or tuple of tensors, got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes a loss give zero, not NaN, when it averages over no samples.

    The zero is computed from `input`, so that it still has a graph: under DistributedDataParallel every
    process must produce a gradient for every parameter, those without a single sample included.

    Args:
        loss_func: function `(input, target, *, reduction, **kwargs)` with torch's meaning of the arguments.
    """

    @functools.wraps(loss_func)
    def wrapped(input, target, *, reduction="mean", **kwargs):
        if target.numel() == 0 and reduction == "mean":
            return input.sum() * 0.0
        return loss_func(input, target, reduction=reduction, **kwargs)

    # The wrapper's own signature (keyword-only reduction) is what callers may rely on.
    del wrapped.__wrapped__
    return wrapped


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional norm and an optional activation.

    Args:
        norm: a module applied to the output, kept as the submodule `norm`, or None.
        activation: a callable applied after the norm, or None.
        *args, **kwargs: the arguments of `torch.nn.Conv2d`.
    """

    def __init__(self, *args, **kwargs):
        norm = kwargs.pop("norm", None)
        activation = kwargs.pop("activation", None)
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        """Maps (N, C_in, H, W) to (N, C_out, H', W')."""
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class ConvNormAct(nn.Module):
    """A convolution, then an optional norm, then an optional activation.

    Its parameters are `conv.*` and `norm.*`. It differs from `detlib.layers.Conv2d`, whose own parameters are
    those of the convolution; checkpoints of DETR-like models have these names.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: those of
            `torch.nn.Conv2d`; padding is none by default, the bias is there by default.
        norm_layer: a module for (N, out_channels, H', W') maps, or None.
        activation: a module, or None.
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
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def conv_relu(conv: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `relu(conv(x) + residual)`.

    What comes behind the convolution is one pass over memory where the norm of a `Conv2d` is frozen. It is
    not joined where somebody listens to the convolution or its norm by a hook, or has changed either.

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
    """Whether nobody sees that neither module is called."""
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
    """Indices of the non-zero elements, one int64 tensor per dimension; a scalar counts as one element."""
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def move_device_like(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """Moves `src` to the device of `dst`."""
    return src.to(dst.device)
