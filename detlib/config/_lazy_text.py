"""Lazy configs as text: plain data for YAML, and Python code for reading."""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, cast

from detlib.config._targets import trust_target
from detlib.config.instantiate import join_path
from detlib.utils.registry import dotted_path

__all__ = ["as_plain_data", "as_python"]

_LOCATE = "detlib.utils.registry.locate"
_WIDTH = 100


def _container(cfg: Any) -> Any:
    """Convert OmegaConf nodes, except for dataclass nodes, to dicts and lists; keep interpolations."""
    from omegaconf import Container, OmegaConf, SCMode

    if not isinstance(cfg, Container):
        return cfg
    return OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.DICT_CONFIG)


def as_plain_data(cfg: Any) -> Any:
    """Convert a config to dicts, lists and scalars from which `instantiate` builds the same objects.

    Targets become dotted paths. A `functools.partial` becomes a node with ``_partial_: true``, a dataclass
    becomes a node of its class, and any other class or function becomes a call of
    `detlib.utils.registry.locate`. Interpolations are kept as written.

    Raises:
        ValueError: if a value cannot be converted, such as a lambda. The message lists the paths of all such
            values.
    """
    refused: list[str] = []
    data = _plain(_container(cfg), "", refused)
    if refused:
        raise ValueError(
            f"These parts of the config cannot be saved: {'; '.join(refused)}. Classes and functions at the "
            "top level of a module can be saved, as can functools.partial of them and LazyCall nodes. "
            "Lambdas and other objects cannot."
        )
    return data


def _plain(value: Any, path: str, refused: list[str]) -> Any:
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, refused)
    if isinstance(value, (list, tuple)):
        return [_plain(item, join_path(path, i), refused) for i, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, enum.Enum):
        return {"_target_": _LOCATE, "name": f"{dotted_path(type(value))}.{value.name}"}
    if isinstance(value, functools.partial):
        node = {"_target_": value.func, "_partial_": True, **value.keywords}
        return _plain(node | ({"_args_": list(value.args)} if value.args else {}), path, refused)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return _plain({"_target_": type(value), **fields}, path, refused)
    name = _name(value, path, refused)
    return name and {"_target_": _LOCATE, "name": name}


def _plain_mapping(value: Mapping, path: str, refused: list[str]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    if isinstance(value, DictConfig):  # a dataclass
        value = {
            "_target_": OmegaConf.get_type(value),
            **cast(dict, OmegaConf.to_container(value, resolve=False)),
        }
    result = {}
    for key, item in value.items():
        entry_path = join_path(path, key)
        if key == "_target_" and callable(item) and not isinstance(item, functools.partial):
            result[key] = _name(item, entry_path, refused)
        else:
            result[key] = _plain(item, entry_path, refused)
    return result


def _name(value: Any, path: str, refused: list[str]) -> str | None:
    """Return the dotted path of a class or function, or add it to `refused` if it has none."""
    try:
        name = dotted_path(value)
    except ValueError as error:
        refused.append(f"{path} ({str(error).removesuffix('.')})")
        return None
    trust_target(name)  # Python code put the object into the config
    return name


def as_python(cfg: Any, prefix: str) -> str:
    """Convert a config to Python code for reading: assignments, with calls for nodes that have a target.

    Values that YAML cannot represent are written as their ``repr``.
    """
    lines: list[str] = []
    _assignments(_container(cfg), prefix, lines)
    return "\n".join(lines) + "\n"


def _assignments(value: Any, name: str, lines: list[str]) -> None:
    if isinstance(value, dict) and value and "_target_" not in value and all(map(_is_attribute, value)):
        for key, item in value.items():
            _assignments(item, f"{name}.{key}".removeprefix("."), lines)
    else:
        lines.append(f"{name} = {_python(value, 0, len(name) + 3)}")


def _is_attribute(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _python(value: Any, indent: int, used: int) -> str:
    """Format a value as Python, on multiple lines if it does not fit after `used` characters of its line."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = _plain_mapping(value, "", [])
    if isinstance(value, functools.partial):
        value = {"_target_": value.func, "_partial_": True, **value.keywords}
    if isinstance(value, dict) and "_target_" in value:
        items = [(f"{key}=", item) for key, item in value.items() if key not in ("_target_", "_partial_")]
        opening, closing = f"{_word(value['_target_'])}(", ")"
        if value.get("_partial_"):
            opening, items = "functools.partial(", [(opening[:-1], None), *items]
    elif isinstance(value, dict):
        opening, items, closing = "{", [(f"{key!r}: ", item) for key, item in value.items()], "}"
    elif isinstance(value, (list, tuple)):
        opening, items, closing = "[", [("", item) for item in value], "]"
    else:
        return _word(value) if callable(value) else repr(value)
    inner = indent + 4

    def written(start: str, item: Any) -> str:
        if item is None and start and start[-1] not in "= ":
            return start  # the function of a partial
        return start + _python(item, inner, inner + len(start))

    texts = [written(start, item) for start, item in items]
    line = f"{opening}{', '.join(texts)}{closing}"
    if used + len(line) <= _WIDTH and "\n" not in line:
        return line
    body = "".join(f"{' ' * inner}{text},\n" for text in texts)
    return f"{opening}\n{body}{' ' * indent}{closing}"


def _word(value: Any) -> str:
    """Return the shortest name under which a class or function can be imported."""
    if isinstance(value, str):
        return value
    try:
        return dotted_path(value)
    except ValueError:
        return getattr(value, "__qualname__", repr(value))
