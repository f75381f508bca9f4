"""The configs that are shipped with the package, found from any folder."""

import importlib.resources
from functools import cache
from pathlib import Path
from typing import Any

from detlib.config.config import get_cfg
from detlib.config.lazy import LazyConfig
from detlib.utils.suggest import suggest

__all__ = ["config_dir", "find_config", "get_config", "try_get_key"]

_ENDINGS = (".yaml", ".py")


@cache
def config_dir() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a source checkout."""
    package = Path(str(importlib.resources.files("detlib")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "Base-RCNN-FPN.yaml").is_file():
            return folder
    raise FileNotFoundError(f"detlib was installed without its configs: there are none at {package}/configs.")


def find_config(config_path: str, folder: Path | None = None) -> str:
    """Returns the absolute path of a shipped config file.

    Args:
        config_path: its path below ``configs/``.
        folder: another folder to look in.

    Raises:
        FileNotFoundError: there is no such config; near names are listed.
    """
    folder = config_dir() if folder is None else folder
    file = folder / config_path
    if not file.is_file():
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _ENDINGS)
        near = suggest(str(config_path), sorted(there))
        raise FileNotFoundError(f"The model zoo has no config {str(config_path)!r} in {folder}.{near}")
    return str(file)


def get_config(config_path: str) -> Any:
    """Reads a shipped config, such as ``get_config("common/train.py").train``.

    Args:
        config_path: its path below ``configs/``.

    Returns:
        A `CfgNode` of a ``.yaml`` file, a DictConfig of a ``.py`` file.

    Raises:
        FileNotFoundError: there is no such config; near names are listed.
    """
    file = find_config(config_path)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg


def try_get_key(cfg: Any, *keys: str, default: Any = None) -> Any:
    """The value of the first of `keys` that a config has.

    It is for code that takes both kinds of config: ``try_get_key(cfg, "OUTPUT_DIR", "train.output_dir")``.

    Args:
        cfg: a `CfgNode` or a DictConfig.
        *keys: dotted paths.
        default: what is returned if it has none of them.
    """
    for key in keys:
        value = cfg
        for part in key.split("."):
            if not hasattr(value, "keys") or part not in value:
                break
            value = value[part]
        else:
            return value
    return default
