"""From a tree of lazy nodes to the objects that it describes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from yacs.config import CfgNode as _YacsNode

from detlib.utils.registry import dotted_path, locate
from detlib.utils.suggest import suggest

__all__ = ["instantiate", "join_path"]


def instantiate(cfg: Any) -> Any:
    """Makes the objects that a tree of lazy nodes describes, innermost first.

    A mapping with ``_target_`` is a call: the target, a callable or a dotted path, is called with the other
    entries as keyword arguments. The calls get plain Python: lists, dicts, numbers, objects; OmegaConf's
    interpolations are resolved, its dataclass nodes become instances of their dataclasses.

    A node may also hold these entries, with the meaning that Hydra gave them:

    - ``_args_``: a list of positional arguments;
    - ``_partial_``: True for a `functools.partial` of the call instead of its result;
    - ``_recursive_``: False to hand arguments on as they are, nodes among them.

    Args:
        cfg: a DictConfig, ListConfig, dict, list or tuple; anything else is returned as it is.

    Returns:
        What the target returns; for mappings without ``_target_`` a dict, for sequences a list (or tuple) of
        what became of their items.

    Raises:
        TypeError: a target is no callable, or does not take the arguments; near names are listed.
        ImportError: there is nothing at the dotted path of a target.
        Exception: whatever a target raises; a note names the target and the path of its node.
    """
    return _build(cfg, _path_of(cfg))


def _path_of(cfg: Any) -> str:
    """Where a node lies in the tree that it is part of."""
    from omegaconf import Container

    return cfg._get_full_key(None) if isinstance(cfg, Container) else ""


def join_path(path: str, key: Any) -> str:
    """The path of the entry `key` of the node at `path`."""
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
    """Calls the target of one node."""
    target = _find_target(node["_target_"], path)
    recursive = node.get("_recursive_", True)
    arguments = {
        key: _build(value, join_path(path, key)) if recursive else value
        for key, value in node.items()
        if key not in ("_target_", "_partial_", "_recursive_")
    }
    positional = list(arguments.pop("_args_", ()))
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


_NOTE = "This came of instantiating"


def _find_target(target: Any, path: str) -> Callable:
    target = _build(target, join_path(path, "_target_"))
    if isinstance(target, str):
        try:
            target = locate(target)
        except ImportError as error:
            error.add_note(f"It is the _target_{_at(path)}")
            raise
    if not callable(target):
        raise TypeError(f"_target_{_at(path)} must be a callable or the dotted path of one, got {target!r}.")
    return target


def _misfit(target: Callable, positional: list, arguments: dict[str, Any]) -> str:
    """Why a call does not fit the signature of its target; "" if it does, or if that cannot be told."""
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
            near = f"{unknown!r} is none of its arguments.{suggest(unknown, parameters)}"
        return f"cannot be called with what the config gives: {error}. {near}".rstrip()
    return ""


def _name(target: Callable) -> str:
    try:
        return dotted_path(target)
    except ValueError:
        return getattr(target, "__qualname__", repr(target))


def _at(path: str) -> str:
    return f" at config path {path!r}" if path else ""
