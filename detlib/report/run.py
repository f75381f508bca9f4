"""Facts about a run, read from its config and its log."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detlib.config import LazyConfig
from detlib.utils.file_io import PathManager
from detlib.utils.safe_yaml import load_plain_yaml

__all__ = [
    "dataset_names",
    "logged_facts",
    "max_dets",
    "max_iter",
    "model_name",
    "read_config",
    "setting",
]

logger = logging.getLogger(__name__)

_LOGGED = ("platform", "processor", "Python", "detlib", "torch", "torch built for CUDA")


def read_config(output_dir: str) -> Mapping[str, Any] | None:
    """Read the config that a run saved as ``config.yaml``. Return None if there is no such file.

    Raises:
        ValueError: the file is not a YAML mapping.
    """
    path = os.path.join(output_dir, "config.yaml")
    if not PathManager.isfile(path):
        return None
    with PathManager.open(path, "rb") as file:
        try:
            config = load_plain_yaml(file.read(), "config.yaml")
        except ValueError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} contains a {type(config).__name__}; a config must be a mapping.")
    # LazyConfig resolves the interpolations that a lazy config may have.
    return LazyConfig.load(path) if "dataloader" in config else config


def setting(config: Mapping[str, Any] | None, *paths: str, default: Any = None) -> Any:
    """Return the value at the first dotted path, such as "SOLVER.MAX_ITER", that exists in a config."""
    for path in paths:
        node: Any = config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            return node
    return default


def dataset_names(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of the test datasets of a YAML or lazy config."""
    names = setting(config, "DATASETS.TEST", "dataloader.test.dataset.names", default=())
    if isinstance(names, str):
        return (names,)
    return tuple(map(str, names)) if isinstance(names, Sequence) else ()


def max_iter(config: Mapping[str, Any] | None) -> int | None:
    """Return the configured number of training iterations."""
    number = setting(config, "SOLVER.MAX_ITER", "train.max_iter")
    return number if isinstance(number, int) else None


def max_dets(config: Mapping[str, Any] | None) -> int | None:
    """Return the maximum number of evaluated detections per image, or None for the metric's default."""
    number = setting(config, "dataloader.evaluator.max_dets_per_image")
    if number is None:
        number = setting(config, "TEST.DETECTIONS_PER_IMAGE", default=0)
        number = number if isinstance(number, int) and number > 100 else None
    return number


def model_name(config: Mapping[str, Any] | None) -> str | None:
    """Return the name of the model that the config builds."""
    name = setting(config, "MODEL.META_ARCHITECTURE")
    if name is not None:
        return str(name)
    target = setting(config, "model._target_")
    if target is None:
        return None
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", str(target))


def logged_facts(output_dir: str) -> dict[str, str]:
    """Read the config file, the machine and the versions of the last start of the run from ``log.txt``.

    The log is the run's own, so the facts are also true for a report that is written on another machine.
    """
    path = os.path.join(output_dir, "log.txt")
    if not PathManager.isfile(path):
        return {}
    facts: dict[str, str] = {}
    in_environment = False
    with PathManager.open(path, "r", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.rstrip().endswith("Environment:"):
                facts, in_environment = {}, True
            elif in_environment and line.startswith("operator "):
                in_environment = False
            elif in_environment:
                name, _, value = re.sub(r" {2,}", "\t", line.strip(), count=1).partition("\t")
                if name in _LOGGED or re.fullmatch(r"GPU(?: \d+)?", name):
                    facts[name] = value
            elif found := re.search(r"Command line arguments: Namespace\(config_file='([^']*)'", line):
                facts["config file"] = found[1]
    for name in ("torch", "detlib"):
        if name in facts:
            facts[name] = facts[name].partition(" at ")[0]
    return facts
