"""`CfgNode`, a tree of config keys that is read from YAML."""

from collections.abc import Iterable
from typing import Any

import yaml
from yacs.config import CfgNode as _YacsNode

from detlib.config._merge import LEAF_TYPES, Assignment, plan_override, plan_tree
from detlib.config._yaml import BASE_KEY, parse_yaml, read_yaml_with_bases
from detlib.config.compat import upgrade_tree
from detlib.utils.suggest import suggest

__all__ = ["CfgNode"]


class CfgNode(_YacsNode):
    """A section of a config: a dict of values and nested sections, whose keys are also attributes.

    Values are int, float, str, bool, None, or lists and tuples. Merging accepts only existing keys and keeps
    their types: an int is converted to a float, a list to a tuple, and a name to a tuple of names. A merge
    that fails changes nothing. YAML is read safely: a config file cannot run code.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        near = "" if name.startswith("_") else suggest(name, (str(key) for key in self))
        raise AttributeError(f"This config section has no key {name!r}.{near}")

    def __setattr__(self, name: str, value: Any) -> None:
        if self.is_frozen():
            raise AttributeError(
                f"Cannot set {name} to {value!r}: the config is frozen; call cfg.defrost() to change it."
            )
        if name in self.__dict__:
            raise AttributeError(f"{name!r} is an internal attribute of CfgNode, not a config key.")
        if isinstance(value, dict) and not isinstance(value, _YacsNode):
            value = type(self)(value)
        if not isinstance(value, _YacsNode) and type(value) not in LEAF_TYPES:
            legal = ", ".join(t.__name__ for t in LEAF_TYPES)
            raise TypeError(
                f"Config key {name} got {value!r} of type {type(value).__name__}; valid types are {legal}."
            )
        self[name] = value

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read a YAML file and its `_BASE_` files into nested dicts; see `merge_from_file`."""
        return read_yaml_with_bases(filename)[0]

    @classmethod
    def load_cfg(cls, cfg_file_obj_or_str: Any) -> "CfgNode":
        """Create a config from an open YAML file or a YAML text. `_BASE_` is not supported here."""
        is_text = isinstance(cfg_file_obj_or_str, str)
        text = cfg_file_obj_or_str if is_text else cfg_file_obj_or_str.read()
        return cls(
            parse_yaml(text, "<string>" if is_text else getattr(cfg_file_obj_or_str, "name", "<file>"))
        )

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Merge a YAML file and the files that its key `_BASE_` names. The file overrides its bases.

        `_BASE_` is a path or a list of paths: relative to the file, absolute, below ``~``, or URLs. A file of
        VERSION 1 is upgraded to the current version.

        Args:
            cfg_filename: a file, or a URL such as "https://...".
            allow_unsafe: has no effect and is accepted for compatibility. Python objects are never loaded: of
                the Python tags only ``!!python/object/apply:eval ["..."]`` is supported, and evaluated as
                arithmetic.

        Raises:
            FileNotFoundError: if the file or a base does not exist. The message lists similar paths.
            KeyError: if a key does not exist. The message lists similar keys.
            ValueError: if the file is not a valid config, or a value has the wrong type.
        """
        tree, origins = read_yaml_with_bases(cfg_filename)
        if "VERSION" in self:
            model = self.get("MODEL")
            meta_architecture = model.get("META_ARCHITECTURE") if isinstance(model, dict) else None
            upgrade_tree(tree, str(cfg_filename), meta_architecture)
        self._apply(plan_tree(tree, self, self, lambda key: f" (in {origins.get(key, cfg_filename)})"))

    def merge_from_other_cfg(self, cfg_other: dict[str, Any]) -> None:
        """Merge another config, or nested dicts.

        Raises:
            KeyError, ValueError: see `merge_from_file`.
            TypeError: if `cfg_other` is not a dict.
        """
        if not isinstance(cfg_other, dict):
            raise TypeError(f"cfg_other must be a CfgNode or a dict, got {type(cfg_other).__name__}.")
        if BASE_KEY in cfg_other:
            raise KeyError(f"{BASE_KEY} is only supported in files; use merge_from_file.")
        self._apply(plan_tree(cfg_other, self, self))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge the key-value pairs of a command line.

        A string that is a Python literal is evaluated, unless the key holds a string.

        Args:
            cfg_list: keys and values in turn: ``["SOLVER.BASE_LR", "0.01", "INPUT.MIN_SIZE_TRAIN",
                "(240,)"]``.

        Raises:
            KeyError: if a key does not exist. The message lists similar keys.
            ValueError: if the number of items is odd, or a value has the wrong type.
        """
        if len(cfg_list) % 2:
            stray = next((item for item in cfg_list if isinstance(item, str) and "=" in item), None)
            hint = f" Write {' '.join(stray.split('=', 1))}, with a space." if stray else ""
            raise ValueError(
                f"Overrides must be pairs of KEY VALUE, got {len(cfg_list)} items: {list(cfg_list)}.{hint}"
            )
        pairs = list(zip(cfg_list[0::2], cfg_list[1::2]))
        for key, _ in pairs:
            if not isinstance(key, str):
                raise ValueError(f"Overrides must be pairs of KEY VALUE, got {key!r} in place of a key.")
        self._apply(step for key, value in pairs for step in plan_override(key, value, self))

    def _apply(self, plan: Iterable[Assignment]) -> None:
        steps = list(plan)  # raises all errors before the first assignment
        if self.is_frozen():
            raise AttributeError("Cannot merge: the config is frozen; call cfg.defrost() to change it.")
        for node, key, value in steps:
            node[key] = value

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Return the config as YAML for `merge_from_file`. Arguments are passed to ``yaml.safe_dump``."""
        return yaml.safe_dump(_plain(self), *args, **kwargs)


def _plain(value: Any) -> Any:
    """Convert sections to dicts and tuples to lists, since YAML has no other containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
