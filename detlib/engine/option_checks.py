"""Checks of `RunOptions` that name a wrong option as its user has written it."""

import logging
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from detlib.engine.setup import RUN_SETTINGS
from detlib.utils.suggest import suggest

__all__ = ["check_options", "key_of", "warn_of_slips"]

logger = logging.getLogger(__name__)

# Those options whose place in the two kinds of config does not follow from their name, but for RUN_SETTINGS.
_KEYS = {
    "precision": ("SOLVER.AMP.PRECISION", "amp.precision"),
    "freeze": ("MODEL.FREEZE", "freeze"),
    "strategy": ("TRAIN.STRATEGY", "strategy"),
    "activation_checkpoint": ("TRAIN.ACTIVATION_CHECKPOINT", "activation_checkpoint"),
    "compile": ("TRAIN.COMPILE.ENABLED", "compile.enabled"),
    "compile_modules": ("TRAIN.COMPILE.MODULES", "compile.modules"),
    "compile_backend": ("TRAIN.COMPILE.BACKEND", "compile.backend"),
    "ema_decay": ("SOLVER.EMA.DECAY", "model_ema.decay"),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "checkpointer.period"),
    "checkpoint_keep": ("SOLVER.CHECKPOINT_KEEP_LAST", "checkpointer.max_to_keep"),
    "checkpoint_async": ("SOLVER.CHECKPOINT_ASYNC", "checkpointer.async_save"),
    "eval_period": ("TEST.EVAL_PERIOD", "eval_period"),
    "best_metric": ("SOLVER.BEST_CHECKPOINT.METRIC", "best_checkpoint.metric"),
    "best_mode": ("SOLVER.BEST_CHECKPOINT.MODE", "best_checkpoint.mode"),
    "early_stop_patience": ("SOLVER.EARLY_STOP.PATIENCE", "early_stop.patience"),
    "early_stop_metric": ("SOLVER.EARLY_STOP.METRIC", "early_stop.metric"),
    "early_stop_mode": ("SOLVER.EARLY_STOP.MODE", "early_stop.mode"),
    "precise_bn_batches": ("TEST.PRECISE_BN.NUM_ITER", "precise_bn.num_iter"),
    "log_period": ("TRAIN.LOG_PERIOD", "log_period"),
    "vis_period": ("VIS_PERIOD", "vis_period"),
    "profile_start": ("TRAIN.PROFILE.START", "profile.start"),
    "profile_steps": ("TRAIN.PROFILE.STEPS", "profile.steps"),
}

_LEGAL = {
    "precision": ("", "float16", "bfloat16"),
    "strategy": ("ddp", "fsdp"),
    "best_mode": ("max", "min"),
    "early_stop_mode": ("max", "min"),
}
_LEAST = {"max_iter": 1, "accum_steps": 1, "skip_non_finite": 0, "log_period": 1, "checkpoint_keep": 1}

# What is read of a lazy config's ``train``; None where anything may be below.
_ENTRIES: dict[str, tuple[str, ...] | None] = {
    "amp": ("enabled", "precision"),
    "best_checkpoint": ("metric", "mode"),
    "checkpointer": ("period", "max_to_keep", "async_save"),
    "clip_grad": ("enabled", "params"),
    "compile": ("enabled", "modules", "backend"),
    "early_stop": ("patience", "metric", "mode"),
    "fast_dev_run": ("enabled",),
    "model_ema": ("enabled", "decay"),
    "precise_bn": ("enabled", "num_iter"),
    "profile": ("enabled", "start", "steps"),
    **dict.fromkeys(("wandb", "mlflow"), ("enabled", "params")),
    **dict.fromkeys(
        """accum_steps activation_checkpoint cudnn_benchmark ddp device eval_epochs eval_period freeze
        init_checkpoint log_period max_iter output_dir report seed skip_non_finite strategy timeout vis_period
        writers""".split()
    ),
}

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple[str, ...]: "a list of strings",
}


def key_of(option: str) -> str:
    """How the two kinds of config name an option: "SOLVER.MAX_ITER (train.max_iter)"."""
    if option in RUN_SETTINGS:
        yaml_key, lazy_key, _ = RUN_SETTINGS[option]
        return f"{yaml_key} ({lazy_key})"
    yaml_key, lazy_key = _KEYS.get(option, (f"SOLVER.{option.upper()}", option))
    return f"{yaml_key} (train.{lazy_key})"


def check_options(options: Any) -> None:
    """Looks at the types of all options, and at the values of those that are not free.

    Args:
        options: a dataclass with annotations.

    Raises:
        TypeError, ValueError: naming the config key, what came and what is legal.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        if isinstance(hint, types.UnionType):  # with None
            if value is None:
                continue
            hint = typing.get_args(hint)[0]
        if hint in _NAMES and not _is_a(value, hint):
            raise TypeError(f"{key_of(name)} must be {_NAMES[hint]}, got {value!r}")
        if name in _LEGAL and value not in _LEGAL[name]:
            legal = tuple(filter(None, _LEGAL[name]))  # "" is what stands for none
            raise ValueError(f"{key_of(name)} must be one of {legal}, got {value!r}")
        if name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"{key_of(name)} must be at least {_LEAST[name]}, got {value}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)


def warn_of_slips(train: Mapping[str, Any]) -> None:
    """Warns of entries of a lazy config's ``train`` that nobody reads and that look like one which is read.

    Others are left to scripts of the user's own.
    """
    for name, value in train.items():
        _warn_of_slip(f"train.{name}", name, _ENTRIES)
        below = _ENTRIES.get(name)
        if below and isinstance(value, Mapping):
            for entry in value:
                _warn_of_slip(f"train.{name}.{entry}", entry, below)


def _warn_of_slip(path: str, name: str, known: typing.Collection[str]) -> None:
    if name not in known and (hint := suggest(name, known)):
        logger.warning("The config's %s is read by nobody.%s", path, hint)
