"""A convolution with its norm, a sum and a ReLU: how the branches of a residual block end."""

import torch
from torch import nn
from torch.nn import functional as F

from detlib.ops.frozen_batch_norm import apply_frozen_batch_norm, is_fast

from .batch_norm import FrozenBatchNorm2d
from .wrappers import Conv2d

__all__ = ["conv_relu"]

_has_global_hooks = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


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
