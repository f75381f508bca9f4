"""Freezing of model parameters by name, and a summary of what is frozen."""

import fnmatch
import logging
import types
from collections.abc import Iterable

from torch import nn

from detlib.layers import FrozenBatchNorm2d
from detlib.utils.suggest import near_names

__all__ = ["freeze_by_name", "log_model"]

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def freeze_by_name(model: nn.Module, patterns: Iterable[str]) -> int:
    """Freeze parameters by name. Call this before the optimizer is built.

    BatchNorm layers whose parameters are all frozen become `FrozenBatchNorm2d`, so their running statistics
    are frozen too, even in training mode. Parameter names do not change.

    Args:
        model: the model; modified in-place.
        patterns: names of parameters, or of modules to freeze all parameters in them. ``*`` matches
            anything and ``?`` one character: "backbone.bottom_up", "*.norm.*",
            "roi_heads.box_head.fc?.weight".

    Returns:
        The number of elements of the newly frozen parameters.

    Raises:
        TypeError: if `patterns` is a single string.
        ValueError: if a pattern matches no parameter; similar names are listed.
    """
    if isinstance(patterns, str):
        raise TypeError(f"MODEL.FREEZE (train.freeze) must be a list of patterns, got {patterns!r}")
    patterns = list(patterns)
    if not patterns:
        return 0
    parameters = dict(model.named_parameters())
    # A pattern may also match layers that are already frozen, such as the first blocks of a ResNet.
    norms = {n: m for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    constants = {f"{n}.{key}" for n in norms for key in ("weight", "bias")}
    frozen: set[str] = set()
    for pattern in patterns:
        matching = [name for name in [*parameters, *constants] if _matches(name, pattern)]
        if not matching:
            modules = [name for name, _ in model.named_modules() if name]
            near = near_names(pattern, [*modules, *parameters])
            hint = f" Similar names: {', '.join(near)}." if near else ""
            raise ValueError(
                f"MODEL.FREEZE (train.freeze): no parameter matches {pattern!r}.{hint} A pattern is the full "
                "name of a parameter or module, with * and ? as wildcards."
            )
        frozen.update(matching)

    newly = [name for name in frozen if name in parameters and parameters[name].requires_grad]
    count = sum(parameters[name].numel() for name in newly)
    for name in newly:
        parameters[name].requires_grad_(False)
    num_norms = _freeze_norms(model, frozen, patterns)
    logger.info(
        "Froze %d of %d parameters (%d of %d elements) and the statistics of %d BatchNorm layers",
        len(newly),
        len(parameters),
        count,
        sum(p.numel() for p in parameters.values()),
        num_norms,
    )
    return count


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _freeze_norms(model: nn.Module, frozen: set[str], patterns: list[str]) -> int:
    """Freeze the statistics of BatchNorm layers whose parameters are all frozen. Return their number.

    A layer without parameters, as in RetinaNet's heads, is matched by the names of its statistics.
    """
    count = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BATCH_NORMS):
            continue
        own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen and name:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, FrozenBatchNorm2d.convert_frozen_batchnorm(module))
        elif not own and any(_matches(f"{name}.running_mean", pattern) for pattern in patterns):
            # A FrozenBatchNorm2d would add parameter names.
            module.train = types.MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
            module.eval()
        else:
            continue
        count += 1
    return count


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace ``module.train``, so that ``model.train()`` leaves a layer in eval mode."""
    return type(module).train(module, False)


def log_model(model: nn.Module) -> None:
    """Log the printed model to the log file, and a summary of its parts to the console."""
    rows = [_summary(type(model).__name__, model)]
    rows += [_summary(f"  {name}: {type(part).__name__}", part) for name, part in model.named_children()]
    summary = "\n".join(["Model (the log file has all layers):", *rows])
    logger.info("Model:\n%s\n%s", "\n".join(rows), model, extra={"console_message": summary})


def _summary(title: str, module: nn.Module) -> str:
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return f"{title}, {count:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
