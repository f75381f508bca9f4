"""Merging values into a config: which are accepted, which are converted, and what is said of the others.

A merge is planned as a list of assignments first and carried out after, so that a config is never left half
merged.
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
    """Reads a string as a Python literal where it is one: "(1, 2)", "0.5", "None"; other values stay."""
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
    """Keys of the whole tree that look like `key`: in all, or by their last part in another section."""
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
    """The error for a key that the config lacks, with near ones."""
    if key in RENAMED_IN_2:
        return KeyError(f"Config key {key}{where} is of VERSION 1; it is now {RENAMED_IN_2[key]}.")
    near = _near_keys(key, root)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return KeyError(f"There is no config key {key}{where}.{hint}")


def _coerce(value: Any, old: Any, key: str, where: str) -> Any:
    """Returns `value` as the type of `old`, which it replaces."""
    wanted, got = type(old), type(value)
    if got not in LEAF_TYPES:
        legal = ", ".join(t.__name__ for t in LEAF_TYPES)
        raise ValueError(f"Config key {key}{where} got {value!r} of type {got.__name__}; legal are {legal}.")
    if old is None or value is None or got is wanted and wanted not in (list, tuple):
        return value
    if wanted is float and got is int:
        return float(value)
    if wanted in (list, tuple):
        if got in (list, tuple):
            nested = type(old[0]) if old and all(type(x) is type(old[0]) for x in old) else None
            if nested in (list, tuple):  # YAML has no tuples: what was dumped comes back as it was
                value = [nested(x) if type(x) in (list, tuple) else x for x in value]
            return wanted(value)
        names_wanted = all(type(x) is str for x in old) and (old or wanted is tuple)
        if got is str and names_wanted:
            return wanted([value])
    hint = ""
    if wanted in (list, tuple):
        hint = f" For one element write {f'[{value!r}]' if wanted is list else f'({value!r},)'}."
    elif wanted is str:
        hint = " Put it in quotes to make it a string."
    raise ValueError(
        f"Config key {key}{where} must be of type {wanted.__name__} (it is {old!r}), "
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
    """Yields what merging nested dicts into `node` assigns.

    Args:
        source: nested dicts, as read from a file, or a config.
        node: the section that receives them, `root` or below.
        root: the full config.
        where: tells for a dotted key where its value is from.
        prefix: dotted key of `node`, with a dot at its end; "" for `root`.

    Raises:
        KeyError: a key does not exist and new ones are not allowed there.
        ValueError: a value is of the wrong type.
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
    """Yields what one pair of the command line assigns: `value` may be a string that stands for a number or
    the like.

    Raises:
        KeyError, ValueError: as `plan_tree`.
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
