"""Optimizers and learning rate schedules built from the ``SOLVER`` section of a config."""

import copy
import fnmatch
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, cast

import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from detlib.config import CfgNode
from detlib.solver.lr_scheduler import WARMUP_METHODS, LRMultiplier, WarmupParamScheduler

__all__ = [
    "CfgNode",
    "CosineParamScheduler",
    "GradientClipType",
    "LRMultiplier",
    "MultiStepParamScheduler",
    "StepWithFixedGammaParamScheduler",
    "WarmupParamScheduler",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "maybe_add_gradient_clipping",
    "reduce_param_groups",
]

logger = logging.getLogger(__name__)

# The base classes of torch.nn's normalization layers are private; LayerNorm and the others have none.
_NORM_MODULES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)

_SCHEDULE_NAMES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")


# Clips the gradients of the given parameters in place.
GradientClipper = Callable[[list[torch.nn.Parameter]], None]


class GradientClipType(Enum):
    """The legal values of SOLVER.CLIP_GRADIENTS.CLIP_TYPE."""

    VALUE = "value"  # clip each element to [-CLIP_VALUE, CLIP_VALUE]
    NORM = "norm"  # clip the gradient of each parameter to a norm of at most CLIP_VALUE
    FULL_MODEL = "full_model"  # clip the norm over all gradients to at most CLIP_VALUE


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Build the clipping function from a ``SOLVER.CLIP_GRADIENTS`` node.

    Raises:
        ValueError: CLIP_TYPE is unknown, or CLIP_VALUE is not positive.
    """
    legal = [t.value for t in GradientClipType]
    if cfg.CLIP_TYPE not in legal:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of {legal}, got {cfg.CLIP_TYPE!r}")
    if not cfg.CLIP_VALUE > 0.0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be positive, got {cfg.CLIP_VALUE}")
    kind, limit, norm_type = GradientClipType(cfg.CLIP_TYPE), cfg.CLIP_VALUE, cfg.NORM_TYPE

    def clip_by_value(params: list[torch.nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_value_(params, limit)

    def clip_each_norm(params: list[torch.nn.Parameter]) -> None:
        # Multi-tensor kernels for all gradients. No norm is read on the host, which would synchronize.
        gradients = [param.grad for param in params if param.grad is not None]
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
    """Clip the gradients before each ``step`` of an optimizer.

    A PyTorch step hook is used, so the step itself and its other hooks are unchanged. With
    `torch.amp.GradScaler`, the gradients are already unscaled when they are clipped.

    Args:
        optimizer: an optimizer, which is modified in place, or an optimizer class.
        clipper: a function from `build_gradient_clipper`.

    Returns:
        The same optimizer, or a subclass of the optimizer class.
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


def maybe_add_gradient_clipping(
    cfg: CfgNode, optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]
) -> torch.optim.Optimizer | type[torch.optim.Optimizer]:
    """Add gradient clipping to an optimizer or optimizer class if ``cfg.SOLVER.CLIP_GRADIENTS`` enables it.

    Returns:
        `optimizer` itself if clipping is disabled or it is an instance, otherwise a subclass of it.
    """
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return optimizer
    return add_gradient_clipping(optimizer, build_gradient_clipper(cfg.SOLVER.CLIP_GRADIENTS))


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer ``cfg.SOLVER.OPTIMIZER`` for the trainable parameters of `model`.

    On CUDA, the fused implementation is used.

    Raises:
        ValueError: the optimizer is unknown, the learning rate or BETAS are out of range, a pattern of
            LR_FACTORS matches no parameter, or the model has no trainable parameters.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in _OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {tuple(_OPTIMIZERS)}, got {solver.OPTIMIZER!r}")
    if not solver.BASE_LR >= 0.0:
        raise ValueError(f"SOLVER.BASE_LR must be at least 0, got {solver.BASE_LR}")
    if len(solver.BETAS) != 2 or not all(0.0 <= beta < 1.0 for beta in solver.BETAS):
        raise ValueError(f"SOLVER.BETAS must be two numbers in [0, 1), got {tuple(solver.BETAS)}")
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=_lr_factor_function(solver, model),
    )
    if not params:
        raise ValueError(
            "The model has no trainable parameters; check MODEL.BACKBONE.FREEZE_AT and MODEL.FREEZE"
        )
    on_cuda = all(p.is_cuda and p.is_floating_point() for group in params for p in group["params"])
    optimizer = _OPTIMIZERS[solver.OPTIMIZER](
        params, solver, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=True if on_cuda else None
    )
    return cast(torch.optim.Optimizer, maybe_add_gradient_clipping(cfg, optimizer))


_OPTIMIZERS = {
    "SGD": lambda params, solver, **kwargs: torch.optim.SGD(
        params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **kwargs
    ),
    "AdamW": lambda params, solver, **kwargs: torch.optim.AdamW(params, betas=tuple(solver.BETAS), **kwargs),
}


def _lr_factor_function(solver: CfgNode, model: nn.Module) -> Callable[[str], float] | None:
    """Return the learning rate factor by parameter name from SOLVER.LR_FACTORS and SOLVER.LAYER_DECAY."""
    if not solver.LR_FACTORS and solver.LAYER_DECAY == 1.0:
        return None
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    for entry in solver.LR_FACTORS:
        if len(entry) != 2 or not isinstance(entry[0], str) or not isinstance(entry[1], int | float):
            raise ValueError(f"SOLVER.LR_FACTORS takes pairs [pattern, factor], got {entry!r}")
        if not fnmatch.filter(names, entry[0]):
            raise ValueError(
                f"SOLVER.LR_FACTORS: no trainable parameter's name matches {entry[0]!r}; examples of names: "
                f"{', '.join(names[:3])}"
            )
    layers_above = None
    if solver.LAYER_DECAY != 1.0:
        backbone = getattr(model, "backbone", None)
        layers_above = getattr(backbone, "layers_above", None)
        if layers_above is None:
            raise ValueError(
                f"SOLVER.LAYER_DECAY = {solver.LAYER_DECAY} needs a plain ViT as backbone, got "
                f"{type(backbone).__name__}"
            )

    def factor(name: str) -> float:
        by_pattern = next((f for p, f in solver.LR_FACTORS if fnmatch.fnmatchcase(name, p)), 1.0)
        if layers_above is None or not name.startswith("backbone."):
            return by_pattern
        return by_pattern * solver.LAYER_DECAY ** layers_above(name.removeprefix("backbone."))

    return factor


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model by their settings.

    For a setting that is None, the optimizer's default applies. Later settings take precedence in this order:
    `base_lr` and `weight_decay`, `weight_decay_norm`, `lr_factor_func`, and finally `overrides` and the two
    bias settings, which both apply by the last part of a parameter's name.

    Args:
        model: the model. A parameter shared by multiple modules counts once, with the settings of the first.
        base_lr: learning rate of all groups, before the factors below.
        weight_decay: weight decay of all groups.
        weight_decay_norm: weight decay of the parameters of normalization layers.
        bias_lr_factor: learning rate factor of parameters named "bias".
        weight_decay_bias: weight decay of parameters named "bias".
        lr_factor_func: function that returns the learning rate factor for a parameter's full name.
        overrides: settings by parameter name (the last part of the full name, such as "bias" or
            "absolute_pos_embed"), for example ``{"embedding": {"lr": 0.01, "weight_decay": 0.1}}``.

    Returns:
        Parameter groups for a PyTorch optimizer, one for each combination of settings.

    Raises:
        ValueError: a factor is given without `base_lr`, or "bias" is set twice.
    """
    by_name = _settings_by_name(base_lr, bias_lr_factor, weight_decay_bias, overrides)
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func requires base_lr, which is None")
    defaults = {"lr": base_lr, "weight_decay": weight_decay}
    defaults = {key: value for key, value in defaults.items() if value is not None}

    groups: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, _NORM_MODULES)
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad or param in seen:
                continue
            seen.add(param)
            settings = dict(defaults)
            if is_norm and weight_decay_norm is not None:
                settings["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(f"{module_name}.{name}" if module_name else name)
            settings.update(by_name.get(name, {}))
            groups.append({"params": [param], **settings})
    return reduce_param_groups(groups)


def _settings_by_name(
    base_lr: float | None,
    bias_lr_factor: float | None,
    weight_decay_bias: float | None,
    overrides: dict[str, dict[str, float]] | None,
) -> dict[str, dict[str, float]]:
    """Merge `overrides` with the bias settings."""
    by_name = copy.deepcopy(overrides) if overrides else {}
    bias: dict[str, float] = {}
    if bias_lr_factor is not None and bias_lr_factor != 1.0:
        if base_lr is None:
            raise ValueError(f"bias_lr_factor={bias_lr_factor} requires base_lr, which is None")
        bias["lr"] = base_lr * bias_lr_factor
    if weight_decay_bias is not None:
        bias["weight_decay"] = weight_decay_bias
    if bias:
        if "bias" in by_name:
            raise ValueError(
                "overrides['bias'] conflicts with bias_lr_factor or weight_decay_bias; use only one of them"
            )
        by_name["bias"] = bias
    return by_name


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge parameter groups with equal settings. Fewer groups make optimizer steps faster.

    Args:
        params: parameter groups, each with a list (or one tensor) under "params" and any settings. If a
            parameter is in multiple groups, the settings of later groups override those of earlier ones.

    Returns:
        The merged groups, in the order in which their settings first occur.
    """
    settings_of: dict[torch.Tensor, dict[str, Any]] = {}
    for group in params:
        members = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        settings = {key: value for key, value in group.items() if key != "params"}
        for param in members:
            settings_of.setdefault(param, {}).update(settings)

    merged: dict[tuple, dict[str, Any]] = {}
    for param, settings in settings_of.items():
        key = tuple(sorted(settings.items()))
        merged.setdefault(key, {**settings, "params": []})["params"].append(param)
    return list(merged.values())


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build the schedule ``cfg.SOLVER.LR_SCHEDULER_NAME`` with its warmup.

    Raises:
        ValueError: the name is unknown, or a setting is invalid; the message names the key.
    """
    solver = cfg.SOLVER
    if solver.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER must be at least 1, got {solver.MAX_ITER}")
    if solver.WARMUP_ITERS < 0:
        raise ValueError(f"SOLVER.WARMUP_ITERS must be at least 0, got {solver.WARMUP_ITERS}")
    if solver.WARMUP_METHOD not in WARMUP_METHODS:
        raise ValueError(
            f"SOLVER.WARMUP_METHOD must be one of {WARMUP_METHODS}, got {solver.WARMUP_METHOD!r}"
        )
    multiplier = WarmupParamScheduler(
        _build_multiplier(solver),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def _build_multiplier(solver: CfgNode) -> ParamScheduler:
    """Build the schedule without its warmup, as a factor of the base learning rate."""
    name, max_iter = solver.LR_SCHEDULER_NAME, solver.MAX_ITER
    if name == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step < max_iter]
        if len(steps) != len(solver.STEPS):
            logger.warning(
                "SOLVER.STEPS %s: steps at or after SOLVER.MAX_ITER=%d are never reached and are ignored",
                tuple(solver.STEPS),
                max_iter,
            )
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ValueError(f"SOLVER.STEPS must be increasing and positive, got {tuple(solver.STEPS)}")
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, milestones=steps, num_updates=max_iter)
    if name == "WarmupCosineLR":
        if not 0.0 <= solver.BASE_LR_END <= solver.BASE_LR:
            raise ValueError(
                f"SOLVER.BASE_LR_END must be in [0, SOLVER.BASE_LR={solver.BASE_LR}], "
                f"got {solver.BASE_LR_END}"
            )
        return CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR if solver.BASE_LR else 0.0)
    if name == "WarmupStepWithFixedGammaLR":
        if solver.NUM_DECAYS < 1:
            raise ValueError(f"SOLVER.NUM_DECAYS must be at least 1, got {solver.NUM_DECAYS}")
        return StepWithFixedGammaParamScheduler(
            base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=max_iter
        )
    raise ValueError(f"SOLVER.LR_SCHEDULER_NAME must be one of {_SCHEDULE_NAMES}, got {name!r}")
