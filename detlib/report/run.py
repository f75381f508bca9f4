"""What is known of a run: its config, where it ran, how far it came."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from detlib.config import LazyConfig
from detlib.utils.file_io import PathManager

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
    """The config that a run saved as ``config.yaml``, of either kind, as a mapping; None if it is not there.

    Raises:
        ValueError: the file is no YAML mapping.
    """
    path = os.path.join(output_dir, "config.yaml")
    if not PathManager.isfile(path):
        return None
    with PathManager.open(path) as file:
        try:
            config = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} holds a {type(config).__name__}; a config is a mapping.")
    # A lazy config may have interpolations, which its own reader resolves.
    return LazyConfig.load(path) if "dataloader" in config else config


def setting(config: Mapping[str, Any] | None, *paths: str, default: Any = None) -> Any:
    """What the first of several dotted paths leads to in a config, such as "SOLVER.MAX_ITER"."""
    for path in paths:
        node: Any = config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            return node
    return default


def dataset_names(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The data sets to test on, of a config of either kind."""
    names = setting(config, "DATASETS.TEST", "dataloader.test.dataset.names", default=())
    return (names,) if isinstance(names, str) else tuple(map(str, names))


def max_iter(config: Mapping[str, Any] | None) -> int | None:
    """The number of iterations that were to be made."""
    number = setting(config, "SOLVER.MAX_ITER", "train.max_iter")
    return number if isinstance(number, int) else None


def max_dets(config: Mapping[str, Any] | None) -> int | None:
    """How many detections of a picture the evaluation took, where it is not the metric's usual number."""
    number = setting(config, "dataloader.evaluator.max_dets_per_image")
    if number is None:
        number = setting(config, "TEST.DETECTIONS_PER_IMAGE", default=0)
        number = number if isinstance(number, int) and number > 100 else None
    return number


def model_name(config: Mapping[str, Any] | None) -> str | None:
    """What kind of model the config builds."""
    name = setting(config, "MODEL.META_ARCHITECTURE")
    if name is not None:
        return str(name)
    target = setting(config, "model._target_")
    if target is None:
        return None
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", str(target))


def logged_facts(output_dir: str) -> dict[str, str]:
    """What ``log.txt`` says of the last start of the run: the config file, the machine, the versions.

    It is the run's own log, so it holds for a report that is made elsewhere, too.
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
