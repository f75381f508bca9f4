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
from functools import cache
from types import ModuleType

import torch

NAMESPACE = "detlib"
DISABLE_NATIVE = "DETLIB_DISABLE_NATIVE"

SCHEMAS = {
    "encode_rle": "(Tensor masks) -> (Tensor, Tensor)",
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
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "nms_rotated",
    "paste_masks",
    "paste_masks_to_rle",
    "resize_image",
    "roi_align_rotated",
    "roi_align_rotated_backward",
}

library = torch.library.Library(NAMESPACE, "DEF")
for _name, _signature in SCHEMAS.items():
    library.define(_name + _signature)


def define(name: str, fallback: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Give the operator `name` its device-independent kernel, its shape rule and its autocast rule.

    Autocast does not touch the arguments: the kernels compute reduced precision inputs in float32 and return
    the input's dtype. It is only switched off inside, so that a fallback's matrix products keep float32.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(name, _without_autocast(operator, device), key)
    return operator


def _without_autocast(operator: Callable, device: str) -> Callable:
    def call(*args):
        with torch.autocast(device, enabled=False):
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
