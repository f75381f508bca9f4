"""Lazy configs: Python files that describe objects as trees of deferred calls.

A lazy config file builds trees of `LazyCall` nodes, which `instantiate` turns into objects::

    from detlib.config import LazyCall as L
    from detlib.modeling import FPN, ResNet

    from ..common.train import train

    model = L(FPN)(bottom_up=L(ResNet)(...), in_features="${.bottom_up.out_features}", out_channels=256)
    train.max_iter = 10000

Such a file is a program that `LazyConfig.load` runs, so load only files that you trust. YAML files hold only
data, and loading them runs no code. `instantiate` calls what their nodes name by a dotted path, which must be
below detlib, torch, torchvision or a package that you allow with `allow_packages`, also in overrides.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from detlib.config._lazy_files import as_config, run_config_file
from detlib.config._lazy_text import as_plain_data, as_python
from detlib.config._override import apply_override
from detlib.config._targets import trust_target
from detlib.config._yaml import read_yaml
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.registry import dotted_path
from detlib.utils.suggest import suggest

__all__ = ["LazyCall", "LazyConfig"]


_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
# Number of values and characters that the interpolations of a YAML file may expand to.
_MAX_EXPANDED = 1_000_000


def _check_interpolations(tree: dict[str, Any], filename: str, num_characters: int) -> None:
    """Raise a ValueError if values such as "${a}${a}" would double the size of a config again and again."""
    sizes: dict[tuple, int] = {}
    limit = _MAX_EXPANDED + 10 * num_characters

    def find(path: tuple) -> Any:
        value: Any = tree
        for key in path:
            value = value[int(key) if isinstance(value, list) else key]
        return value

    def size(path: tuple) -> int:
        """Return the size of the value at a path with its interpolations resolved; 0 for a missing one."""
        if path not in sizes:
            sizes[path] = 0  # for a reference to itself, which OmegaConf reports when it resolves it
            try:
                value = find(path)
            except (LookupError, TypeError, ValueError):
                return 0
            if isinstance(value, dict | list):
                keys = value if isinstance(value, dict) else range(len(value))
                sizes[path] = 1 + sum(size((*path, key)) for key in keys)
            else:
                references = _REFERENCE.findall(value) if isinstance(value, str) else ()
                sizes[path] = len(str(value)) + sum(size(_referred(path, text)) for text in references)
            if sizes[path] > limit:
                where = ".".join(map(str, path)) or "it"
                raise ValueError(f"{filename}: the interpolations in {where} expand to {sizes[path]} values")
        return sizes[path]

    try:
        size(())
    except RecursionError as error:
        raise ValueError(f"{filename}: the interpolations follow each other too deeply") from error


def _referred(path: tuple, reference: str) -> tuple:
    """Return the path that ``${reference}`` in the value at `path` leads to."""
    parts = reference.strip().replace("[", ".").replace("]", "")
    dots = len(parts) - len(parts.lstrip("."))
    below = path[: max(0, len(path) - dots)] if dots else ()
    return (*below, *filter(None, parts.split(".")))


class LazyCall:
    """A call that is deferred until `instantiate`::

        node = LazyCall(torch.nn.Conv2d)(in_channels=32, out_channels=32, kernel_size=1)
        node.out_channels = 64
        conv = instantiate(node)

    The node is a DictConfig of the keyword arguments, with the target under ``_target_``. The arguments may
    include other nodes and interpolations (``"${..num_classes}"``).
    """

    def __init__(self, target: Callable | str | Mapping) -> None:
        """
        Args:
            target: a class or function, its dotted path, or a node that builds it.

        Raises:
            TypeError: if `target` is none of these.
        """
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(f"LazyCall takes a callable or the dotted path of one, got {target!r}.")
        self._target = target
        if isinstance(target, str):
            trust_target(target)

    def __call__(self, **kwargs: Any) -> Any:
        """Return the node for a call with these keyword arguments."""
        from omegaconf import DictConfig

        # OmegaConf would treat the dataclass itself as the schema of the node.
        is_dataclass = isinstance(self._target, type) and dataclasses.is_dataclass(self._target)
        target = self._target
        if is_dataclass:
            target = dotted_path(target)
            trust_target(target)
        content: dict = {**kwargs, "_target_": target}
        return DictConfig(content=content, flags={"allow_objects": True})


class LazyConfig:
    """Functions to load, change and save configs with `LazyCall` nodes."""

    @staticmethod
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Load a config file by its path relative to the calling file. See `load`.

        Raises:
            ValueError: if the calling code is not in a file.
        """
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith("<"):
            raise ValueError(
                f"load_rel({filename!r}) is called from {caller}, which is not a file; use load."
            )
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def load(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Load a config file. A ``.py`` file is executed, so load only files that you trust.

        A relative import in a ``.py`` file imports another config file. Each importing file gets its own copy
        of the configs, so changes do not affect other files. Dicts are imported as DictConfigs.

        Args:
            filename: path of a ``.py``, ``.yaml`` or ``.yml`` file.
            keys: names of the variables to return; by default all configs and dicts, except those whose names
                begin with an underscore.

        Returns:
            A DictConfig of all variables, the value itself if `keys` is a string, or a tuple of values.

        Raises:
            FileNotFoundError: if there is no such file. The message lists similar paths.
            ImportError: if a relative import fails. The message names both files.
            KeyError: if a name in `keys` does not exist.
            SyntaxError: if the file, or a file that it imports, is not valid Python.
            ValueError: if the file has another extension, is not valid YAML, or its interpolations expand to
                far more than the file.
        """
        from omegaconf import DictConfig, ListConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        filename = os.fspath(filename)
        ending = os.path.splitext(filename)[1]
        if ending == ".py":
            variables = run_config_file(filename)
        elif ending in (".yaml", ".yml"):
            variables = read_yaml(filename)
            _check_interpolations(variables, filename, len(str(variables)))
        else:
            raise ValueError(f"A lazy config file must end in .py, .yaml or .yml, got {filename!r}.")
        if keys is not None:
            wanted = (keys,) if isinstance(keys, str) else tuple(keys)
            for key in wanted:
                if key not in variables:
                    near = suggest(key, (name for name in variables if not name.startswith("__")))
                    raise KeyError(f"{filename!r} has no {key!r}.{near}")
            values = tuple(as_config(variables[key]) for key in wanted)
            return values[0] if isinstance(keys, str) else values
        if ending == ".py":
            variables = {
                name: value
                for name, value in variables.items()
                if isinstance(value, (DictConfig, ListConfig, dict)) and not name.startswith("_")
            }
        try:
            return OmegaConf.create(variables, flags={"allow_objects": True})
        except (OmegaConfBaseException, RecursionError) as error:
            raise ValueError(f"{filename!r} is not a lazy config: {error}") from error

    @staticmethod
    def apply_overrides(cfg: Any, overrides: list[str]) -> Any:
        """Apply overrides, such as command-line arguments, to a config in place.

        ============================  ====================================================================
        ``train.max_iter=100``        changes a value, which must exist or be an argument of the target
        ``model.sizes.0=[1,2]``       changes a list item; a value may be a list, ``{key: value}``, ``null``
        ``+train.note=text``          adds a value, which must not exist
        ``++train.note=text``         adds or changes a value
        ``~train.note``               removes a value
        ============================  ====================================================================

        Args:
            cfg: a DictConfig.
            overrides: the overrides, applied in order.

        Returns:
            `cfg`.

        Raises:
            KeyError: if a path does not exist. The message lists similar names.
            TypeError: if `overrides` is not a list of strings.
            ValueError: if an override does not have one of these forms.
        """
        if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
            raise TypeError(f"overrides must be a list of 'path.to.key=value' strings, got {overrides!r}.")
        for text in overrides:
            apply_override(cfg, text)
        return cfg

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        """Save a config as YAML, from which `load` and `instantiate` build the same objects.

        Classes and functions are written as dotted paths, a `functools.partial` as a node with
        ``_partial_: true``, and interpolations as they are. An existing file is replaced only once the
            new one
        is complete.

        Raises:
            ValueError: if a part of the config cannot be written as YAML, such as a lambda. The message
                has its path, and nothing is written.
        """
        text = yaml.safe_dump(
            as_plain_data(cfg), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
        )
        write_bytes_atomically(os.fspath(filename), lambda file: file.write(text.encode()))

    @staticmethod
    def to_py(cfg: Any, prefix: str = "cfg.") -> str:
        """Return a config as Python code with assignments and calls, for reading and not for execution.

        Args:
            cfg: a DictConfig.
            prefix: prefix of the assigned names.
        """
        return as_python(cfg, prefix.removesuffix("."))
