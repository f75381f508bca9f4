"""Keeping parts of a model as they are."""

import fnmatch
import functools
import logging
from collections.abc import Iterable

from torch import nn

from detlib.layers import FrozenBatchNorm2d
from detlib.utils.suggest import near_names

__all__ = ["freeze_by_name"]

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def freeze_by_name(model: nn.Module, patterns: Iterable[str]) -> int:
    """Takes parameters out of the training, by their names.

    The statistics of BatchNorm layers all of whose parameters are frozen stay as they are as well, whatever
    mode the model is in; such layers become `FrozenBatchNorm2d`. No name changes. To be called before the
    optimizer is built.

    Args:
        model: changed in place.
        patterns: names of parameters, with ``*`` for anything and ``?`` for a letter, or of modules, with all
            that is in them: "backbone.bottom_up", "*.norm.*", "roi_heads.box_head.fc1.weight".

    Returns:
        The number of values in the parameters that are frozen by it.

    Raises:
        TypeError: if a single pattern came instead of several.
        ValueError: if a pattern fits no parameter; near names are listed.
    """
    if isinstance(patterns, str):
        raise TypeError(f"MODEL.FREEZE (train.freeze) must be a list of patterns, got {patterns!r}")
    patterns = list(patterns)
    if not patterns:
        return 0
    parameters = dict(model.named_parameters())
    # What is frozen already, such as the first blocks of a ResNet, may be named as well.
    norms = {n: m for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    constants = {f"{n}.{key}" for n in norms for key in ("weight", "bias")}
    frozen: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in [*parameters, *constants] if _fits(name, pattern)]
        if not fitting:
            modules = [name for name, _ in model.named_modules() if name]
            near = near_names(pattern, [*modules, *parameters])
            hint = f" Near names: {', '.join(near)}." if near else ""
            raise ValueError(
                f"MODEL.FREEZE (train.freeze): no parameter fits {pattern!r}.{hint} Patterns are whole names "
                "of parameters or modules, with * and ?."
            )
        frozen.update(fitting)

    newly = [name for name in frozen if name in parameters and parameters[name].requires_grad]
    count = sum(parameters[name].numel() for name in newly)
    for name in newly:
        parameters[name].requires_grad_(False)
    num_norms = _freeze_norms(model, frozen, patterns)
    logger.info(
        "Froze %d of %d parameters (%d of %d values), among them those of %d BatchNorm layers",
        len(newly),
        len(parameters),
        count,
        sum(p.numel() for p in parameters.values()),
        num_norms,
    )
    return count


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _freeze_norms(model: nn.Module, frozen: set[str], patterns: list[str]) -> int:
    """Makes constants of the BatchNorm layers whose parameters are all frozen, and returns their number.

    Of a layer without parameters, as RetinaNet's heads have, the names of its statistics count.
    """
    count = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BATCH_NORMS):
            continue
        own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen and name:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, FrozenBatchNorm2d.convert_frozen_batchnorm(module))
        elif not own and any(_fits(f"{name}.running_mean", pattern) for pattern in patterns):
            # A FrozenBatchNorm2d would have more names.
            module.__class__ = _always_in_eval(type(module))
            module.eval()
        else:
            continue
        count += 1
    return count


class _AlwaysInEval:
    """Comes before a layer's class, so that ``model.train()`` leaves it in eval mode."""

    def train(self, mode: bool = True):
        return super().train(False)


@functools.cache
def _always_in_eval(cls: type[nn.Module]) -> type[nn.Module]:
    return cls if issubclass(cls, _AlwaysInEval) else type(cls.__name__, (_AlwaysInEval, cls), {})
