"""Merging of values into a config: type checks, conversions and error messages.

A merge is first planned as a list of assignments and then carried out, so an error never leaves a config
half merged.
"""

import copy
from ast import literal_eval
from collections.abc import Callable, Iterator
from typing import Any

from yacs.config import CfgNode as Node

from detlib.config.compat import RENAMED_IN_2
from detlib.utils.suggest import near_names

__all__ = ["LEAF_TYPES", "Assignment", "plan_override", "plan_tree", "unknown_key"]

LEAF_TYPES = (tuple, list, str, int, float, bool, type(None))
Assignment = tuple[Node, str, Any]
Where = Callable[[str], str]  # dotted key -> "" or " (in FILE)"


def _nowhere(key: str) -> str:
    return ""


def decode(value: Any) -> Any:
    """Evaluate a string that is a Python literal: "(1, 2)", "0.5", "None"; return other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _all_keys(node: Node, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Node):
            yield from _all_keys(value, f"{prefix}{key}.")


def _near_keys(key: str, root: Node) -> list[str]:
    """Return up to 3 keys of the tree that resemble `key`, or have a similar last part in another section."""
    keys = list(_all_keys(root))
    leaf = key.rpartition(".")[2]
    by_leaf: dict[str, list[str]] = {}
    for option in keys:
        by_leaf.setdefault(option.rpartition(".")[2], []).append(option)
    same = near_names(key, by_leaf.get(leaf, []), n=3) or by_leaf.get(leaf, [])[:3]
    similar = near_names(key, keys, n=3)
    elsewhere = [option for name in near_names(leaf, by_leaf, n=2) for option in by_leaf[name]]
    return list(dict.fromkeys([*same, *similar, *elsewhere]))[:3]


def unknown_key(key: str, root: Node, where: str = "") -> KeyError:
    """Return the error for a key that the config does not have. It suggests similar keys."""
    if key in RENAMED_IN_2:
        return KeyError(f"Config key {key}{where} is of VERSION 1; it is now {RENAMED_IN_2[key]}.")
    near = _near_keys(key, root)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return KeyError(f"There is no config key {key}{where}.{hint}")


def _coerce(value: Any, old: Any, key: str, where: str) -> Any:
    """Convert `value` to the type of `old`, the value that it replaces."""
    expected, got = type(old), type(value)
    if got not in LEAF_TYPES:
        legal = ", ".join(t.__name__ for t in LEAF_TYPES)
        raise ValueError(
            f"Config key {key}{where} got {value!r} of type {got.__name__}; valid types are {legal}."
        )
    if old is None or value is None or got is expected and expected not in (list, tuple):
        return value
    if expected is float and got is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"Config key {key}{where} got an int of {len(str(value))} digits.") from error
    if expected in (list, tuple):
        if got in (list, tuple):
            nested = type(old[0]) if old and all(type(x) is type(old[0]) for x in old) else None
            if nested in (list, tuple):  # YAML has no tuples: restore the types of dumped values
                value = [nested(x) if type(x) in (list, tuple) else x for x in value]
            return expected(value)
        expects_names = all(type(x) is str for x in old) and (old or expected is tuple)
        if got is str and expects_names:
            return expected([value])
    hint = ""
    if expected in (list, tuple):
        hint = f" For a single element, write {f'[{value!r}]' if expected is list else f'({value!r},)'}."
    elif expected is str:
        hint = " Put it in quotes to make it a string."
    raise ValueError(
        f"Config key {key}{where} must be of type {expected.__name__} (it is {old!r}), "
        f"got {value!r} of type {got.__name__}.{hint}"
    )


def _assign(node: Node, name: str, value: Any, key: str, where: str) -> Iterator[Assignment]:
    if isinstance(value, dict):
        raise ValueError(
            f"Config key {key}{where} is a single value ({node[name]!r}), not a section; got {value!r}."
        )
    yield node, name, _coerce(value, node[name], key, where)


def plan_tree(
    source: dict[str, Any], node: Node, root: Node, where: Where = _nowhere, prefix: str = ""
) -> Iterator[Assignment]:
    """Yield the assignments that merge nested dicts into `node`.

    Args:
        source: nested dicts, as read from a file, or a config.
        node: the section to merge into: `root` or a section of it.
        root: the full config.
        where: maps a dotted key to the origin of its value, for messages.
        prefix: dotted key of `node`, with a trailing dot; "" for `root`.

    Raises:
        KeyError: if a key does not exist and its section does not allow new keys.
        ValueError: if a value has the wrong type.
    """
    for name, value in source.items():
        key = f"{prefix}{name}"
        value = decode(copy.deepcopy(value))
        if name not in node:
            if node.is_new_allowed():
                yield node, name, type(root)(value) if isinstance(value, dict) else value
            elif root.key_is_renamed(key):
                root.raise_key_rename_error(key)
            elif not root.key_is_deprecated(key):
                raise unknown_key(key, root, where(key))
        elif not isinstance(node[name], Node):
            yield from _assign(node, name, value, key, where(key))
        elif isinstance(value, dict):
            yield from plan_tree(value, node[name], root, where, f"{key}.")
        elif value is not None:  # "SECTION:" with nothing below it is an empty section
            keys = ", ".join(list(node[name])[:4])
            raise ValueError(
                f"Config key {key}{where(key)} is a section ({keys}, ...), not a value; got {value!r}."
            )


def plan_override(key: str, value: Any, root: Node) -> Iterator[Assignment]:
    """Yield the assignments for one key-value pair of the command line.

    A string that is a Python literal is evaluated, unless the key holds a string.

    Raises:
        KeyError, ValueError: see `plan_tree`.
    """
    if root.key_is_deprecated(key):
        return
    if root.key_is_renamed(key):
        root.raise_key_rename_error(key)
    *sections, name = key.split(".")
    node = root
    for part in sections:
        node = node.get(part) if isinstance(node, Node) else None
    if not isinstance(node, Node) or name not in node:
        raise unknown_key(key, root)
    old = node[name]
    if isinstance(old, Node):
        yield from plan_tree({name: decode(value)}, node, root, prefix=key[: -len(name)])
        return
    decoded = decode(value)
    if isinstance(value, str):
        if isinstance(old, str) and decoded is not None and not isinstance(decoded, str):
            decoded = value  # OUTPUT_DIR 2024 means the string
        elif isinstance(old, bool) and value.lower() in ("true", "false"):
            decoded = value.lower() == "true"
    yield from _assign(node, name, decoded, key, "")
