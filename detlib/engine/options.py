"""The settings of a training run, parsed once from a YAML or lazy config.

`detlib.config.run_options` declares the options. The trainers and their hooks use `RunSettings` and do not
depend on the type of config.
"""

import dataclasses
import logging
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detlib.config import CfgNode, try_get_key
from detlib.config.run_options import Declaration, RunOptions, declarations
from detlib.utils.suggest import suggest
from detlib.utils.writers import check_writers

__all__ = [
    "RunSettings",
    "epochs_to_iterations",
    "option_table",
    "set_iterations",
    "warn_about_unknown_entries",
]

logger = logging.getLogger(__name__)

_DECLARATIONS = declarations()

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple[str, ...]: "a list of strings",
}


@dataclass(kw_only=True)
class RunSettings(RunOptions):
    """The checked settings of a run. Each field is an option of `detlib.config.run_options.RunOptions`."""

    def __post_init__(self) -> None:
        """Check all settings.

        Raises:
            TypeError, ValueError: if a value is not legal; the message has the config key and the legal
            values.
        """
        if not self.early_stop_metric or self.early_stop_mode is None:
            self.early_stop_mode = self.best_mode
        for name, hint in typing.get_type_hints(type(self)).items():
            _check(_DECLARATIONS[name], getattr(self, name), hint)
        check_writers(self.writers)
        for option, metric in (("best_mode", self.best_metric), ("early_stop_mode", self.early_stop_metric)):
            if getattr(self, option) == "max" and "loss" in metric.rpartition("/")[2]:
                raise ValueError(
                    f"{_DECLARATIONS[option].name} is 'max', but lower is better for the metric '{metric}': "
                    "set it to 'min'"
                )
        if self.early_stop_patience > 0 and not (self.early_stop_metric or self.best_metric):
            raise ValueError(
                f"Early stopping after {self.early_stop_patience} evaluations needs a metric: set "
                f"{_DECLARATIONS['early_stop_metric'].name}, for example to 'bbox/AP'"
            )
        if not self.timeout > 0:
            raise ValueError(f"{_DECLARATIONS['timeout'].name} must be above 0 seconds, got {self.timeout!r}")

    @classmethod
    def from_config(cls, cfg: CfgNode | Mapping[str, Any]) -> "RunSettings":
        """Read a config. Periods in epochs stay in epochs until `in_iterations` is called.

        Args:
            cfg: a CfgNode, or a lazy config with the node ``train``.

        Raises:
            TypeError, ValueError: if a value is not legal; the message has the config key and the legal
            values.
        """
        is_yaml = isinstance(cfg, CfgNode)
        _check_optimizer(cfg)
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, declaration in _DECLARATIONS.items():
            if is_yaml:
                key, switch, default = declaration.yaml, declaration.yaml_switch, declaration.default
            else:
                key, switch, default = declaration.lazy, declaration.lazy_switch, declaration.lazy_default
            if key is None or (switch and not try_get_key(cfg, switch, default=False)):
                continue  # the field's own default
            values[name] = _plain(try_get_key(cfg, key, default=default), hints[name])
        if is_yaml:
            if values["images_per_step"] == 0:
                raise ValueError("SOLVER.IMS_PER_BATCH must be at least 1, got 0")
            if isinstance(values["val_loss"], str):
                values["val_loss"] = (values["val_loss"],)
        else:
            values["images_per_step"] = values["images_per_step"] or 0
            services = [name for name in ("wandb", "mlflow") if name in values]
            if not isinstance(values["writers"], str):
                values["writers"] += tuple(name for name in services if name not in values["writers"])
        if values.get("fast_dev_run"):
            values.update(max_iter=20, eval_period=10, eval_epochs=0, log_period=1)
        return cls(**values)

    def in_iterations(self, images_per_epoch: int | None) -> "RunSettings":
        """Return the settings with all periods in iterations.

        Args:
            images_per_epoch: number of training images, None if unknown.

        Raises:
            ValueError: if a period is in epochs whose length is unknown.
        """
        periods: dict[str, Any] = {}
        for kind in ("checkpoint", "eval"):
            period = epochs_to_iterations(
                _DECLARATIONS[f"{kind}_epochs"].name,
                getattr(self, f"{kind}_epochs"),
                images_per_epoch if self.images_per_step > 0 else None,
                self.images_per_step,
            )
            if period is not None:
                periods[f"{kind}_period"] = period
        return dataclasses.replace(self, **periods)

    @property
    def ddp_arguments(self) -> dict[str, Any]:
        """Arguments of `create_ddp_model`."""
        return {
            "static_graph": self.static_graph,
            "find_unused_parameters": self.find_unused_parameters,
            **self.ddp,
        }

    @property
    def writer_arguments(self) -> dict[str, dict[str, Any]]:
        """Arguments of the writers by their names. Empty ones are left to the writer's default."""
        wandb = {"project": self.wandb_project, "name": self.wandb_name, **(self.wandb or {})}
        mlflow = {
            "tracking_uri": self.mlflow_uri,
            "experiment": self.mlflow_experiment,
            "run_name": self.mlflow_name,
            **(self.mlflow or {}),
        }
        return {
            "wandb": {name: value for name, value in wandb.items() if value != ""},
            "mlflow": {name: value for name, value in mlflow.items() if value != ""},
        }


def _plain(value: Any, hint: Any) -> Any:
    """Convert the lists and nodes of a config to tuples and dicts. Other types are checked later."""
    if hint == tuple[str, ...] and isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return tuple(value)
    return dict(value) if isinstance(value, Mapping) else value


def _check(declaration: Declaration, value: Any, hint: Any) -> None:
    if declaration.has_switch and value == declaration.off:
        return
    if isinstance(hint, types.UnionType):  # with None
        if value is None:
            return
        hint = typing.get_args(hint)[0]
    if hint in _TYPE_NAMES and not _is_a(value, hint):
        raise TypeError(f"{declaration.name} must be {_TYPE_NAMES[hint]}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{declaration.name} must be finite, got {value}")
    if declaration.choices and value not in declaration.choices:
        raise ValueError(f"{declaration.name} must be one of {declaration.choices}, got {value!r}")
    low, high = declaration.minimum, declaration.below
    if high is not None and not low <= value < high:
        raise ValueError(f"{declaration.name} must be in [{low}, {high}), got {value}")
    if low is not None and value < low:
        raise ValueError(f"{declaration.name} must be at least {low}, got {value}")


def _check_optimizer(cfg: CfgNode | Mapping[str, Any]) -> None:
    """Check the numbers of SOLVER, or of the lazy config's ``optimizer``."""
    if isinstance(cfg, CfgNode):
        prefix, node = "SOLVER", cfg.SOLVER
    else:
        prefix, node = "optimizer", cfg.get("optimizer") or {}
        if isinstance(node.get("lr"), str):
            raise TypeError(f"optimizer.lr must be a number, got {node['lr']!r}")
    for path, value in _numbers(prefix, node):
        key = path.rpartition(".")[2].lower()
        if key in ("lr", "base_lr", "base_lr_end", "momentum", "weight_decay") and not value >= 0:
            raise ValueError(f"{path} must be at least 0, got {value}")
        # A norm may be the maximum norm.
        if not math.isfinite(value) and key != "norm_type":
            raise ValueError(f"{path} must be finite, got {value}")


def _numbers(path: str, node: Any) -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{path}.{key}", value)
        elif _is_a(value, float):
            yield f"{path}.{key}", value


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)


def warn_about_unknown_entries(train: Mapping[str, Any]) -> None:
    """Warn about entries of a lazy config's ``train`` that are unknown and look like a known one.

    Other unknown entries are left to the user's own scripts.
    """
    known: dict[str, set[str]] = {}
    for declaration in _DECLARATIONS.values():
        for key in filter(None, (declaration.lazy, declaration.lazy_switch)):
            group, _, entry = key.removeprefix("train.").partition(".")
            if key.startswith("train."):
                known.setdefault(group, set()).update({entry} - {""})
    for name, value in train.items():
        _warn_if_misspelled(f"train.{name}", name, known)
        if known.get(name) and isinstance(value, Mapping):
            for entry in value:
                _warn_if_misspelled(f"train.{name}.{entry}", entry, known[name])


def _warn_if_misspelled(path: str, name: str, known: Collection[str]) -> None:
    if name not in known and (hint := suggest(name, known)):
        logger.warning("Unknown config entry %s is ignored.%s", path, hint)


def set_iterations(cfg: CfgNode, images_per_epoch: int | None) -> CfgNode:
    """Set SOLVER.MAX_ITER from SOLVER.MAX_EPOCHS, and scale STEPS and WARMUP_ITERS in proportion.

    Args:
        cfg: the config, which is not changed.
        images_per_epoch: number of training images, None if unknown.

    Returns:
        `cfg` itself if MAX_EPOCHS is 0, else a changed copy.

    Raises:
        ValueError: if the length of the training data is unknown.
    """
    solver = cfg.SOLVER
    max_iter = epochs_to_iterations(
        "SOLVER.MAX_EPOCHS", solver.MAX_EPOCHS, images_per_epoch, solver.IMS_PER_BATCH
    )
    if max_iter is None:
        return cfg
    cfg, scale = cfg.clone(), max_iter / solver.MAX_ITER
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.SOLVER.STEPS = tuple(round(step * scale) for step in solver.STEPS)
    cfg.SOLVER.WARMUP_ITERS = round(solver.WARMUP_ITERS * scale)
    logger.info(
        "%g epochs of %d images are %d iterations of %d images; the learning rate drops at %s, the warm-up "
        "takes %d",
        solver.MAX_EPOCHS,
        images_per_epoch,
        max_iter,
        solver.IMS_PER_BATCH,
        cfg.SOLVER.STEPS,
        cfg.SOLVER.WARMUP_ITERS,
    )
    if frozen:
        cfg.freeze()
    return cfg


def epochs_to_iterations(
    key: str, epochs: float, images_per_epoch: int | None, images_per_step: int
) -> int | None:
    """Convert epochs to iterations. Return None for 0 epochs.

    Args:
        key: the config key of the number, for error messages.
        epochs: number of passes over the training data; may be a fraction.
        images_per_epoch: number of training images, None if unknown.
        images_per_step: number of images of one update.

    Raises:
        TypeError: if `epochs` is not a number.
        ValueError: if the length of the training data is unknown.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int | float):
        raise TypeError(f"{key} must be a number, got {epochs!r}")
    if epochs <= 0:
        return None
    if images_per_epoch is None:
        raise ValueError(
            f"{key} = {epochs}: the length of the training data is unknown; use iterations instead."
        )
    return max(1, round(epochs * images_per_epoch / images_per_step))


def option_table() -> str:
    """Return the table of all options in ``docs/training.md`` (Markdown)."""
    rows = ["| YAML key | lazy entry | default | meaning |", "|---|---|---|---|"]
    for declaration in _DECLARATIONS.values():
        keys = [
            _shown_key(declaration.yaml, declaration.yaml_switch),
            _shown_key(declaration.lazy, declaration.lazy_switch),
        ]
        rows.append(f"| {keys[0]} | {keys[1]} | {_shown_default(declaration)} | {declaration.doc} |")
    return "\n".join(rows)


def _shown_key(key: str | None, switch: str | None) -> str:
    """Return "`SOLVER.EMA.ENABLED`, `.DECAY`" for a key with a switch."""
    if not switch:
        return f"`{key}`" if key else ""
    return f"`{switch}`, `.{str(key).rpartition('.')[2]}`"


def _shown_default(declaration: Declaration) -> str:
    default = _shown_value(declaration.default if declaration.yaml else declaration.lazy_default)
    lazy = _shown_value(declaration.lazy_default)
    if declaration.yaml and declaration.lazy and lazy not in ("", "0", default):
        default += f" (lazy: {lazy})"
    return ", ".join(filter(None, ["off" if declaration.has_switch else "", default]))


def _shown_value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value or (value if value == 0 else ""))
