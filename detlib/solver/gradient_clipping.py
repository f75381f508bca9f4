"""Gradient clipping that is part of the optimizer's step."""

from collections.abc import Callable
from enum import Enum

import torch

from detlib.config import CfgNode

__all__ = ["GradientClipType", "add_gradient_clipping", "build_gradient_clipper"]

# Clips, in place, the gradients of all the parameters that one step will update.
GradientClipper = Callable[[list[torch.nn.Parameter]], None]


class GradientClipType(Enum):
    """What SOLVER.CLIP_GRADIENTS.CLIP_TYPE may say."""

    VALUE = "value"  # each element to [-CLIP_VALUE, CLIP_VALUE]
    NORM = "norm"  # each parameter's gradient to a norm of at most CLIP_VALUE
    FULL_MODEL = "full_model"  # all gradients together to a norm of at most CLIP_VALUE


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Builds the clipping function of a ``SOLVER.CLIP_GRADIENTS`` node.

    Raises:
        ValueError: if CLIP_TYPE is unknown, or CLIP_VALUE not above 0.
    """
    legal = [t.value for t in GradientClipType]
    if cfg.CLIP_TYPE not in legal:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of {legal}, got {cfg.CLIP_TYPE!r}")
    if not cfg.CLIP_VALUE > 0.0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0, got {cfg.CLIP_VALUE}")
    kind, limit, norm_type = GradientClipType(cfg.CLIP_TYPE), cfg.CLIP_VALUE, cfg.NORM_TYPE

    def clip_by_value(params: list[torch.nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_value_(params, limit)

    def clip_each_norm(params: list[torch.nn.Parameter]) -> None:
        # All at once, and without a look at any norm, for which the device would have to be waited.
        gradients = [param.grad for param in params]
        norms = torch._foreach_norm(gradients, norm_type)
        scales = [(limit / (norm + 1e-6)).clamp(max=1.0).to(g.dtype) for norm, g in zip(norms, gradients)]
        torch._foreach_mul_(gradients, scales)

    def clip_full_norm(params: list[torch.nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_norm_(params, limit, norm_type)

    return {
        GradientClipType.VALUE: clip_by_value,
        GradientClipType.NORM: clip_each_norm,
        GradientClipType.FULL_MODEL: clip_full_norm,
    }[kind]


def add_gradient_clipping(
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer], clipper: GradientClipper
) -> torch.optim.Optimizer | type[torch.optim.Optimizer]:
    """Makes every ``step`` clip the gradients first.

    Works through PyTorch's step hooks, so the step itself and its other hooks stay as they are. Under
    `torch.amp.GradScaler` the gradients are unscaled by then.

    Args:
        optimizer: an optimizer, which is changed in place, or an optimizer class.
        clipper: what `build_gradient_clipper` returns.

    Returns:
        The same optimizer, or a class derived from the given one.
    """

    def clip_before_step(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        if params:
            clipper(params)

    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.register_step_pre_hook(clip_before_step)
        return optimizer

    def __init__(self, *args, **kwargs):
        optimizer.__init__(self, *args, **kwargs)
        self.register_step_pre_hook(clip_before_step)

    return type(optimizer.__name__ + "WithGradientClip", (optimizer,), {"__init__": __init__})
