"""`instantiate`, which builds the objects that a tree of lazy nodes describes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from yacs.config import CfgNode as _YacsNode

from detlib.config._targets import locate_target
from detlib.utils.registry import dotted_path, locate
from detlib.utils.suggest import suggest

__all__ = ["instantiate", "join_path"]


def instantiate(cfg: Any) -> Any:
    """Build the objects that a tree of lazy nodes describes, innermost first.

    A mapping with ``_target_`` is a call: the target, a callable or a dotted path, is called with the other
    entries as keyword arguments. Arguments are plain Python objects: lists, dicts, numbers, other objects.
    OmegaConf's interpolations are resolved, and its dataclass nodes become instances of their dataclasses.

    A node may also have these entries, with the same meaning as in Hydra:

    - ``_args_``: a list of positional arguments;
    - ``_partial_``: True for a `functools.partial` of the call instead of its result;
    - ``_recursive_``: False to pass nodes among the arguments on without instantiating them.

    Args:
        cfg: a DictConfig, ListConfig, dict, list or tuple. Anything else is returned unchanged.

    Returns:
        The result of the target; for a mapping without ``_target_`` a dict and for a sequence a list (or
        tuple) of the instantiated items.

    Raises:
        TypeError: if a target is not callable, or does not accept the arguments. The message lists similar
            names.
        ImportError: if the dotted path of a target does not exist.
        ValueError: if the dotted path of a target is not below an allowed package, see `allow_packages`.
        Exception: any exception of a target, with a note that names the target and the path of its node.
    """
    return _build(cfg, _path_of(cfg))


def _path_of(cfg: Any) -> str:
    """Return the path of a node from the root of its tree."""
    from omegaconf import Container

    return cfg._get_full_key(None) if isinstance(cfg, Container) else ""


def join_path(path: str, key: Any) -> str:
    """Return the path of the entry `key` of the node at `path`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def _build(cfg: Any, path: str) -> Any:
    from omegaconf import Container, DictConfig, OmegaConf

    if isinstance(cfg, Container) and cfg._is_none():
        return None
    if isinstance(cfg, DictConfig):
        if dataclasses.is_dataclass(OmegaConf.get_type(cfg)):
            return OmegaConf.to_object(cfg)
    elif isinstance(cfg, (Container, list, tuple)):
        items = [_build(item, join_path(path, i)) for i, item in enumerate(cfg)]
        if isinstance(cfg, tuple) and hasattr(cfg, "_fields"):
            return type(cfg)(*items)
        return tuple(items) if OmegaConf.get_type(cfg) is tuple else items
    elif isinstance(cfg, _YacsNode) or not isinstance(cfg, Mapping):
        return cfg
    if "_target_" in cfg:
        return _call(cfg, path)
    if type(cfg) not in (DictConfig, dict):
        return cfg
    return {key: _build(value, join_path(path, key)) for key, value in cfg.items()}


def _call(node: Mapping[str, Any], path: str) -> Any:
    """Call the target of one node."""
    target = _find_target(node["_target_"], path)
    by_name = target is locate and isinstance(node["_target_"], str)
    recursive = node.get("_recursive_", True)
    arguments = {
        key: _build(value, join_path(path, key)) if recursive else value
        for key, value in node.items()
        if key not in ("_target_", "_partial_", "_recursive_")
    }
    positional = list(arguments.pop("_args_", ()))
    if by_name:  # a class or function as a value
        target = locate_target
    if node.get("_partial_", False):
        return partial(target, *positional, **arguments)
    try:
        return target(*positional, **arguments)
    except Exception as error:
        if isinstance(error, TypeError) and (reason := _misfit(target, positional, arguments)):
            raise TypeError(f"{_name(target)}{_at(path)} {reason}") from error
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_NOTE} {_name(target)}{_at(path)}")
        raise


_NOTE = "Raised while instantiating"


def _find_target(target: Any, path: str) -> Callable:
    target = _build(target, join_path(path, "_target_"))
    if isinstance(target, str):
        try:
            target = locate_target(target)
        except ImportError as error:
            error.add_note(f"It is the _target_{_at(path)}")
            raise
        except ValueError as error:
            raise ValueError(f"_target_{_at(path)}: {error}") from error
    if not callable(target):
        raise TypeError(f"_target_{_at(path)} must be a callable or the dotted path of one, got {target!r}.")
    return target


def _misfit(target: Callable, positional: list, arguments: dict[str, Any]) -> str:
    """Explain why arguments do not match the signature of a target; "" if they do or it is unknown."""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return ""
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        parameters = signature.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = next((name for name in arguments if name not in parameters), None)
        near = ""
        if unknown is not None and not takes_any:
            near = f"It has no argument {unknown!r}.{suggest(unknown, parameters)}"
        return f"cannot be called with the arguments in the config: {error}. {near}".rstrip()
    return ""


def _name(target: Callable) -> str:
    try:
        return dotted_path(target)
    except ValueError:
        return getattr(target, "__qualname__", repr(target))


def _at(path: str) -> str:
    return f" at config path {path!r}" if path else ""
