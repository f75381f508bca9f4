"""Configs that are Python files: a tree of calls that are made later.

A lazy config file builds trees of `LazyCall` nodes, which `instantiate` turns into objects::

    from detlib.config import LazyCall as L
    from detlib.modeling import FPN, ResNet

    from ..common.train import train

    model = L(FPN)(bottom_up=L(ResNet)(...), in_features="${.bottom_up.out_features}", out_channels=256)
    train.max_iter = 10000

Such a file is a program: `LazyConfig.load` runs it. Load files that you trust only. YAML files hold data
alone, and nothing in them is run.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from detlib.config._lazy_files import as_config, run_config_file
from detlib.config._lazy_text import as_plain_data, as_python
from detlib.config._override import apply_override
from detlib.config._yaml import read_yaml
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.registry import dotted_path
from detlib.utils.suggest import suggest

__all__ = ["LazyCall", "LazyConfig"]


class LazyCall:
    """A call that is made by `instantiate`, not now::

        node = LazyCall(torch.nn.Conv2d)(in_channels=32, out_channels=32, kernel_size=1)
        node.out_channels = 64
        conv = instantiate(node)

    The node is a DictConfig of the keyword arguments, among which may be further nodes and interpolations
    (``"${..num_classes}"``), and of the target under ``_target_``.
    """

    def __init__(self, target: Callable | str | Mapping) -> None:
        """
        Args:
            target: a class or function, its dotted path, or a node that makes it.

        Raises:
            TypeError: it is none of these.
        """
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(f"LazyCall takes a callable or the dotted path of one, got {target!r}.")
        self._target = target

    def __call__(self, **kwargs: Any) -> Any:
        """Returns the node for a call with these keyword arguments."""
        from omegaconf import DictConfig

        # OmegaConf would take the dataclass itself for a description of the node.
        is_dataclass = isinstance(self._target, type) and dataclasses.is_dataclass(self._target)
        target = dotted_path(self._target) if is_dataclass else self._target
        content: dict = {**kwargs, "_target_": target}
        return DictConfig(content=content, flags={"allow_objects": True})


class LazyConfig:
    """Loading, changing and saving configs that are trees of `LazyCall` nodes."""

    @staticmethod
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """`load`, with a path relative to the file of the code that calls this.

        Raises:
            ValueError: the calling code is in no file.
        """
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith("<"):
            raise ValueError(f"load_rel({filename!r}) is called from {caller}, which is no file: use load.")
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def load(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Loads a config file; a ``.py`` file is run, so it must be one that you trust.

        Within a ``.py`` file, relative imports reach other config files. Every importing file gets copies of
        the configs there, so that changing them changes nothing for others, and dicts as DictConfigs.

        Args:
            filename: path of a ``.py``, ``.yaml`` or ``.yml`` file.
            keys: names of the variables to return; by default all configs and dicts, except those whose names
                begin with an underscore.

        Returns:
            A DictConfig of all; the one value when `keys` is a string, or a tuple of values.

        Raises:
            FileNotFoundError: there is no such file; near paths are listed.
            ImportError: a relative import fails; both files are named.
            KeyError: there is no variable of a name in `keys`.
            SyntaxError: the file or one that it imports is not valid Python.
            ValueError: it has another ending, or is not valid YAML.
        """
        from omegaconf import DictConfig, ListConfig, OmegaConf

        filename = os.fspath(filename)
        ending = os.path.splitext(filename)[1]
        if ending == ".py":
            variables = run_config_file(filename)
        elif ending in (".yaml", ".yml"):
            variables = read_yaml(filename)
        else:
            raise ValueError(f"A lazy config file ends in .py, .yaml or .yml, got {filename!r}.")
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
        return OmegaConf.create(variables, flags={"allow_objects": True})

    @staticmethod
    def apply_overrides(cfg: Any, overrides: list[str]) -> Any:
        """Changes a config in place as texts such as command-line arguments say.

        ============================  ====================================================================
        ``train.max_iter=100``        changes a value, which must be there or be an argument of the target
        ``model.sizes.0=[1,2]``       list items by number; lists, ``{key: value}``, ``null``, ``true``
        ``+train.note=text``          adds a value that is not there
        ``++train.note=text``         adds or changes it
        ``~train.note``               removes it
        ============================  ====================================================================

        Args:
            cfg: a DictConfig.
            overrides: the texts, applied in order.

        Returns:
            `cfg`.

        Raises:
            KeyError: the path leads nowhere; near names are listed.
            TypeError: `overrides` is no list of strings.
            ValueError: a text is not of that form.
        """
        if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
            raise TypeError(f"overrides must be a list of 'path.to.key=value' texts, got {overrides!r}.")
        for text in overrides:
            apply_override(cfg, text)
        return cfg

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        """Writes a config as YAML that `load` reads and `instantiate` makes the same objects of.

        Classes and functions are written by their dotted paths, a `functools.partial` as a node with
        ``_partial_: true``, interpolations as they are. A file that was there stays until the new one is
        whole.

        Raises:
            ValueError: a part of the config has no form in YAML, such as a lambda; its path is named, and
                nothing is written.
        """
        text = yaml.safe_dump(
            as_plain_data(cfg), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
        )
        write_bytes_atomically(os.fspath(filename), lambda file: file.write(text.encode()))

    @staticmethod
    def to_py(cfg: Any, prefix: str = "cfg.") -> str:
        """Returns a config as Python to read: assignments, nodes as calls. It is not meant to be run.

        Args:
            cfg: a DictConfig.
            prefix: what the assigned names begin with.
        """
        return as_python(cfg, prefix.removesuffix("."))
