"""The operator library `torch.ops.detlib`: `define`, and shared argument checks and memory layouts.

Each operator is defined in its own file by one call of `define`, with its schema, fallback, fake kernel and
gradient. `detlib/_C.abi3.so` only adds kernels for the CPU and CUDA keys, so every operator exists with
or without the compiled extension. A device without a kernel runs the fallback: torchvision or plain PyTorch.

Set `DETLIB_DISABLE_NATIVE=1` before the import to ignore the extension.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from types import ModuleType

import torch
from torch.autograd import forward_ad

NAMESPACE = "detlib"
DISABLE_NATIVE = "DETLIB_DISABLE_NATIVE"

OPERATORS: dict[str, bool] = {}
"""Name of every operator, and whether torchvision can replace its compiled kernel. Filled by `define`."""

_library = torch.library.Library(NAMESPACE, "DEF")
_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# A context that dispatches directly to the device's kernel, without the gradient that `torch.library` adds.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
    in_torchvision: bool = False,
) -> Callable:
    """Define the operator `torch.ops.detlib.NAME`.

    Autocast does not cast arguments or results: kernels compute reduced precision in float32 and return the
    dtype of the input. Fallbacks run with autocast disabled, so that their matrix products keep float32.

    Args:
        name: name of the operator.
        schema: arguments and results, e.g. "(Tensor boxes, float threshold) -> Tensor".
        fallback: kernel for devices without a compiled one.
        fake: returns empty tensors of the result's shape, dtype and layout.
        backward: takes `ctx` and the gradients of the outputs; returns a gradient or None for each argument.
        save: takes `ctx`, the tuple of arguments and the output; stores in `ctx` the values for `backward`.
        in_torchvision: whether the fallback uses torchvision if that is installed.

    Returns:
        The operator, for callers inside this package. If it has a gradient, this function takes half the host
        time of `torch.ops.detlib.NAME`, whose overhead is as long as a small kernel on a GPU.
    """
    OPERATORS[name] = in_torchvision
    _library.define(name + schema)
    _library.impl(name, _without_autocast(fallback), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None:
        return operator
    assert save is not None, "an operator with a gradient needs `save`"
    return _differentiable(name, operator, backward, save)


def _without_autocast(fallback: Callable) -> Callable:
    @wraps(fallback)
    def call(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return fallback(*args)
        with torch.autocast(device, enabled=False):
            return fallback(*args)

    return call


def _differentiable(name: str, operator: Callable, backward: Callable, save: Callable) -> Callable:
    """Register a gradient, and return a function that runs the operator with it at less overhead."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with _below_autograd():
                output = operator(*args)
            save(ctx, args, output)
            return output

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Differentiable.__name__ = Differentiable.__qualname__ = f"{NAMESPACE}_{name}"

    def call(*args):
        if torch.compiler.is_compiling() or in_transform():
            return operator(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return Differentiable.apply(*args)
        with _below_autograd():
            return operator(*args)

    return call


def in_transform() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is active; these need registered rules."""
    return _in_functorch() or getattr(forward_ad, "_current_level", -1) >= 0


def _load_native() -> str | None:
    """Load the compiled kernels. Return why they are absent, or None if they are loaded."""
    if os.environ.get(DISABLE_NATIVE, "0") not in ("", "0"):
        return f"disabled ({DISABLE_NATIVE}={os.environ[DISABLE_NATIVE]})"
    try:
        importlib.import_module(f"{NAMESPACE}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{NAMESPACE}._C":
            raise
        return "not built (install with a C++ compiler, see docs/installation.md)"
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(
            f"detlib's compiled operators cannot be loaded and slower ones are used: {error}",
            RuntimeWarning,
        )
        return f"cannot be loaded: {error}"
    return None


@cache
def torchvision_ops() -> tuple[ModuleType | None, str | None]:
    """Return `(torchvision.ops, None)`, or `(None, reason)` if torchvision is missing or broken."""
    try:
        return importlib.import_module("torchvision.ops"), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def has_kernel(operator: str, device_type: str) -> bool:
    """Return whether an operator, e.g. "torchvision::nms", has its own kernel for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def has_native_kernel(name: str, device_type: str) -> bool:
    """Return whether the compiled extension has a kernel of operator `name` for "cpu" or "cuda"."""
    return has_kernel(f"{NAMESPACE}::{name}", device_type)


def implementation(name: str, device_type: str) -> str:
    """Return what runs operator `name` on a device type: "native", "torchvision" or "PyTorch reference"."""
    if has_native_kernel(name, device_type):
        return "native"
    from_torchvision = OPERATORS[name] and torchvision_ops()[0] is not None
    return "torchvision" if from_torchvision else "PyTorch reference"


native_load_error: str | None = _load_native()
"""Why the compiled kernels are absent; None if they are loaded."""


# Argument checks. Messages name the argument, its value and the legal values.


def check_tensor(name: str, value: object, shape: str, *, floating: bool = True) -> None:
    """Raise unless `value` is a tensor of a shape, e.g. "(N, 4)", and floating point if `floating`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    sizes = [size.strip() for size in shape.strip("()").split(",") if size.strip()]
    fits = value.dim() == len(sizes) and all(
        not expected.isdigit() or got == int(expected) for got, expected in zip(value.shape, sizes)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def check_same_length(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless both tensors have the same first dimension and device.

    Lengths are not compared while a graph is being captured: they may be unknown there.
    """
    if not torch.compiler.is_compiling() and value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have one entry per entry of {other_name}, got {value.shape[0]} and {other.shape[0]}"
        )
    check_same_device(name, value, other_name, other)


def check_same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")


def check_positive(name: str, value: int) -> None:
    """Raise if `value` is an integer below 1. Symbolic integers pass."""
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_nms_arguments(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    *,
    box_dim: int,
    idxs: torch.Tensor | None = None,
) -> None:
    """Raise unless boxes (N, `box_dim`), scores (N,), optional categories (N,) and threshold are valid."""
    check_tensor("boxes", boxes, f"(N, {box_dim})")
    check_tensor("scores", scores, "(N,)")
    check_same_length("scores", scores, "boxes", boxes)
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if idxs is not None:
        check_tensor("idxs", idxs, "(N,)", floating=False)
        check_same_length("idxs", idxs, "boxes", boxes)


# Memory layouts of feature maps (N, C, H, W). Results have the layout of the inputs.


def is_channels_last(map: torch.Tensor) -> bool:
    """Return whether a feature map is channels-last and not also contiguous, as in the compiled kernels."""
    return map.is_contiguous(memory_format=torch.channels_last) and not map.is_contiguous()


def memory_format_of(map: torch.Tensor) -> torch.memory_format:
    """Return channels-last if `is_channels_last(map)`, else contiguous."""
    return torch.channels_last if is_channels_last(map) else torch.contiguous_format


def new_map(like: torch.Tensor, images: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Return a new empty feature map (images, channels, height, width) in the layout of `like`."""
    size, layout = (images, channels, height, width), memory_format_of(like)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def in_layout_of(like: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
    """Return the feature map in channels-last layout if `like` has it, else the feature map itself."""
    return map.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else map
