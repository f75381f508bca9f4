"""Frozen batch norm, fused with the sum and the ReLU that follow it in a residual network.

Shapes: N images, C channels, H height, W width.
"""

import functools

import torch
from torch.nn import functional as F

from detlib.ops._library import (
    check_same_device,
    check_tensor,
    define,
    has_native_kernel,
    in_layout_of,
    in_transform,
    memory_format_of,
    new_map,
)

_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: None)
_has_kernel = functools.cache(functools.partial(has_native_kernel, "frozen_batch_norm"))


def frozen_batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Compute `(x - mean) / sqrt(var + eps) * weight + bias + residual`, and optionally its ReLU.

    `x` and `residual` are differentiable, any number of times; `x` is not kept for backward. Reduced
    precision is computed in float32 and rounded once.

    Args:
        x: (N, C, H, W) floating point, contiguous or channels-last; other layouts are copied.
        mean, var, weight, bias: (C,) floating point constants.
        eps: added to the variance.
        residual: (N, C, H, W) in the dtype of x, added to the normalized feature map; or None.
        relu: whether to apply ReLU to the sum.

    Returns:
        (N, C, H, W) in the dtype and layout of x.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_tensor("x", x, "(N, C, H, W)")
    for name, constant in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        check_tensor(name, constant, f"({x.shape[1]},)")
        check_same_device(name, constant, "x", x)
    if residual is not None:
        check_same_device("residual", residual, "x", x)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
                f"got {tuple(residual.shape)} {residual.dtype}"
            )
    return apply_frozen_batch_norm(x, residual, mean, var, weight, bias, eps, relu)


def is_fast(x: torch.Tensor) -> bool:
    """Return whether a compiled kernel exists for x and is faster than separate PyTorch operators.

    The kernel is not faster for float16 on the CPU, since it converts one value at a time. Compilers and
    tracers get the separate operators, which they can fuse themselves. Transforms get them too, since they
    have rules for them.
    """
    return (
        x.dim() == 4
        and (x.is_cuda or x.dtype != torch.float16)
        and _has_kernel(x.device.type)
        and not torch.compiler.is_compiling()
        and not _tracing_state()
        and not in_transform()
    )


def reference_frozen_batch_norm(x, residual, mean, var, weight, bias, eps, relu):
    """Compute `frozen_batch_norm` in plain PyTorch, on any device."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var, weight, bias = (constant.to(dtype) for constant in (mean, var, weight, bias))
    y = F.batch_norm(x.to(dtype), mean, var, weight, bias, training=False, eps=eps)
    if residual is not None:
        y = y + residual
    return in_layout_of(x, (y.relu() if relu else y).to(x.dtype))


def reference_frozen_batch_norm_backward(grad, output, var, weight, eps, with_residual):
    """Compute the gradients of `frozen_batch_norm` in plain PyTorch, differentiable in `grad`."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if output is not None:
        grad = in_layout_of(output, grad.masked_fill(output <= 0, 0))
    scale = ((var.to(dtype) + eps).rsqrt() * weight.to(dtype)).reshape(1, -1, 1, 1)
    grad_x = (grad.to(dtype) * scale).to(grad.dtype)
    return grad_x, grad.clone() if with_residual else grad.new_empty(0)


def _fake(x, residual, mean, var, weight, bias, eps, relu):
    return new_map(x, *x.shape)


def _fake_backward(grad, output, var, weight, eps, with_residual):
    like = grad if output is None else output
    return new_map(like, *grad.shape), new_map(like, *grad.shape) if with_residual else grad.new_empty(0)


def _save(ctx, inputs, output):
    x, residual, _, var, weight, _, ctx.eps, relu = inputs
    ctx.with_residual, ctx.layout = residual is not None, memory_format_of(x)
    ctx.save_for_backward(output if relu else None, var, weight)


def _backward(ctx, grad):
    output, var, weight = ctx.saved_tensors
    # Gradients are enabled here only for double backward.
    backward = reference_frozen_batch_norm_backward if torch.is_grad_enabled() else _operator_backward
    masks = output is not None
    grad = grad.contiguous(memory_format=ctx.layout)
    grad_x, grad_residual = backward(grad, output, var, weight, ctx.eps, ctx.with_residual and masks)
    if ctx.with_residual and not masks:
        grad_residual = grad
    return grad_x, grad_residual if ctx.with_residual else None, *[None] * 6


apply_frozen_batch_norm = define(
    "frozen_batch_norm",
    "(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, bool relu)"
    " -> Tensor",
    fallback=reference_frozen_batch_norm,
    fake=_fake,
    backward=_backward,
    save=_save,
)
"""`frozen_batch_norm` without argument checks, which take as long as a small feature map on a GPU.

Arguments: x, residual or None, mean, var, weight, bias, eps, relu.
"""

_operator_backward = define(
    "frozen_batch_norm_backward",
    "(Tensor grad, Tensor? output, Tensor var, Tensor weight, float eps, bool with_residual)"
    " -> (Tensor, Tensor)",
    fallback=reference_frozen_batch_norm_backward,
    fake=_fake_backward,
)
