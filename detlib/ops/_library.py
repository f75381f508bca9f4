"""The operator library `torch.ops.detlib`: schemas, and which kernel serves which device.

Schemas live here, in Python, so that every operator exists with or without the compiled extension.
`detlib/_C.abi3.so` only adds kernels for the CPU and CUDA keys; a device without one falls to the
`CompositeExplicitAutograd` kernel that each operator family registers through `define`, which runs
torchvision or plain PyTorch.

Set `DETLIB_DISABLE_NATIVE=1` before the import to leave the extension out.
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

SCHEMAS = {
    "encode_rle": "(Tensor masks) -> (Tensor, Tensor)",
    "frozen_batch_norm": "(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor weight, Tensor bias,"
    " float eps, bool relu) -> Tensor",
    "frozen_batch_norm_backward": "(Tensor grad, Tensor? output, Tensor var, Tensor weight, float eps,"
    " bool with_residual) -> (Tensor, Tensor)",
    "nms": "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "batched_nms": "(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    "paste_masks": "(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor",
    "paste_masks_to_rle": "(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold)"
    " -> (Tensor, Tensor)",
    "resize_image": "(Tensor image, SymInt height, SymInt width, int filter, bool vertical_first) -> Tensor",
    "roi_align": "(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_align_backward": "(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width,"
    " int sampling_ratio, bool aligned, bool deterministic=False) -> Tensor",
    "ms_deform_attn": "(Tensor value, Tensor spatial_shapes, Tensor level_start_index,"
    " Tensor sampling_locations, Tensor attention_weights) -> Tensor",
    "ms_deform_attn_backward": "(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor level_start_index,"
    " Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "nms_rotated": "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "batched_nms_rotated": "(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    "roi_align_rotated": "(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, int sampling_ratio) -> Tensor",
    "roi_align_rotated_backward": "(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width,"
    " int sampling_ratio) -> Tensor",
}

# Operators that torchvision lacks: without a kernel they run as a PyTorch formula.
FORMULA_ONLY = {
    "batched_nms_rotated",
    "box_iou_rotated",
    "encode_rle",
    "frozen_batch_norm",
    "frozen_batch_norm_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "nms_rotated",
    "paste_masks",
    "paste_masks_to_rle",
    "resize_image",
    "roi_align_rotated",
    "roi_align_rotated_backward",
}

_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
"""Context in which a call goes to the device's kernel at once, past the gradient that `torch.library` has."""


def in_transform() -> bool:
    """Whether a transform of `torch.func` or forward mode is active, which look for rules of operators."""
    return _in_functorch() or getattr(forward_ad, "_current_level", -1) >= 0


library = torch.library.Library(NAMESPACE, "DEF")
for _name, _signature in SCHEMAS.items():
    library.define(_name + _signature)


def define(name: str, fallback: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Give the operator `name` its device-independent kernel and its shape rule.

    Autocast touches neither arguments nor results: the kernels compute reduced precision inputs in float32
    and return the input's dtype. It is only switched off in a fallback, so that matrix products keep float32.
    """
    library.impl(name, _without_autocast(fallback), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _without_autocast(fallback: Callable) -> Callable:
    @wraps(fallback)
    def call(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return fallback(*args)
        with torch.autocast(device, enabled=False):
            return fallback(*args)

    return call


def differentiable(name: str, backward: Callable, save: Callable) -> Callable:
    """Give the operator `name` its gradient.

    Args:
        name: of an operator that `define` was called for.
        backward: gets `ctx` and the output's gradient; returns a gradient or None for each argument.
        save: gets `ctx`, the tuple of arguments and the output.

    Returns:
        The operator with the same gradient, for callers within this package: `torch.library` takes the host
        as long again as a small kernel takes a GPU, a plain `torch.autograd.Function` half of that.
    """
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with _below_autograd():
                output = operator(*args)
            save(ctx, args, output)
            return output

    Differentiable.backward = staticmethod(backward)
    Differentiable.__name__ = Differentiable.__qualname__ = f"{NAMESPACE}_{name}"

    def call(*args):
        if torch.compiler.is_compiling() or in_transform():
            return operator(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return Differentiable.apply(*args)
        with _below_autograd():
            return operator(*args)

    return call


def _load_native() -> str | None:
    """Load the compiled kernels; returns why there are none, or None when they are in."""
    if os.environ.get(DISABLE_NATIVE, "0") not in ("", "0"):
        return f"left out on request ({DISABLE_NATIVE}={os.environ[DISABLE_NATIVE]})"
    try:
        importlib.import_module(f"{NAMESPACE}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{NAMESPACE}._C":
            raise
        return "not built (install with a C++ compiler, see docs/installation.md)"
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(
            f"detlib's compiled operators do not load, slower ones take their place: {error}",
            RuntimeWarning,
        )
        return f"does not load: {error}"
    return None


@cache
def torchvision_ops() -> tuple[ModuleType | None, str | None]:
    """Return `(torchvision.ops, None)`, or `(None, reason)` where torchvision is missing or broken."""
    try:
        return importlib.import_module("torchvision.ops"), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def has_native_kernel(name: str, device_type: str) -> bool:
    """Whether the compiled extension brought a kernel of operator `name` for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def implementation(name: str, device_type: str) -> str:
    """Name what serves operator `name` on a device type: "native", "torchvision" or "PyTorch reference"."""
    if has_native_kernel(name, device_type):
        return "native"
    in_torchvision = name not in FORMULA_ONLY and torchvision_ops()[0] is not None
    return "torchvision" if in_torchvision else "PyTorch reference"


native_load_error: str | None = _load_native()
"""Why the compiled kernels are absent; None when they are loaded."""
