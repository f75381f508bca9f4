"""Command-line overrides of a lazy config: ``path.to.key=value``."""

import ast
import inspect
import re
from collections.abc import Iterable
from typing import Any

from detlib.config._targets import is_allowed, locate_target
from detlib.utils.suggest import suggest

__all__ = ["apply_override", "parse_override"]

_OVERRIDE = re.compile(r"(?P<mark>\+\+|\+|~)?(?P<key>[^=\s]+?)\s*(?:=(?P<value>.*))?", re.DOTALL)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"null": None, "none": None, "true": True, "false": False}
_NUMBER = re.compile(r"[-+]?(\d[\d_]*)?(\.\d*)?([eE][-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)


def parse_override(text: str) -> tuple[str, list[str | int], Any]:
    """Split ``[+|++|~]path=value`` into its mark, the parts of the path, and the value.

    Raises:
        ValueError: if `text` does not have this form.
    """
    match = _OVERRIDE.fullmatch(text.strip())
    if match is None or (match["value"] is None and match["mark"] != "~"):
        raise ValueError(f"An override has the form path.to.key=value, got {text!r}.")
    path: list[str | int] = []
    for part in match["key"].split("."):
        name, *indices = re.split(r"[\[\]]+", part)
        if not name and not (indices and path):
            raise ValueError(f"The path of the override {text!r} has an empty part.")
        steps = [name] if name else []
        steps += [index for index in indices if index]
        path += [int(step) if re.fullmatch(r"-?\d+", step) else step for step in steps]
    return match["mark"] or "", path, None if match["value"] is None else parse_value(match["value"])


def parse_value(text: str) -> Any:
    """Parse a value in the notation of Hydra or Python.

    These are ``null``, ``true``, numbers, ``[lists]``, ``{mappings: x}`` and quoted strings, and also
    ``None``, ``True`` and tuples. Anything else is a string, including interpolations such as
    ``${..num_classes}``.

    Raises:
        ValueError: if a bracket or quote is not closed, or brackets are nested too deeply.
    """
    reader = _Reader(text)
    try:
        value = reader.value(ends="")
    except RecursionError as error:
        raise ValueError(f"The value {text[:40]!r} ... is nested too deeply.") from error
    if reader.rest():  # such as "[a] b" or "'a' b", which only begins like a list or a quoted string
        return text.strip()
    return value


class _Reader:
    """A parser of one value at the start of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rest(self) -> str:
        return self._text[self._at :].strip()

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def value(self, ends: str) -> Any:
        """Read a value that ends at one of the characters `ends` or at the end of the text."""
        first = self._peek()
        if first == "{":
            return dict(self._items("{", lambda: (self._key(), self.value(",}"))))
        if first and first in "[(":
            return list(self._items(first, lambda: self.value("," + _CLOSING[first])))
        if first and first in "'\"":
            return self._quoted(first)
        return _scalar(self._bare(ends))

    def _items(self, opening: str, item: Any) -> Iterable[Any]:
        closing = _CLOSING[opening]
        self._at += 1
        while self._peek() != closing:
            if not self._peek():
                raise ValueError(f"A {opening!r} is not closed in the value {self._text!r}.")
            yield item()
            if self._peek() == ",":
                self._at += 1
            elif self._peek() != closing:
                raise ValueError(f"Expected ',' or {closing!r} before {self.rest()!r} in {self._text!r}.")
        self._at += 1

    def _key(self) -> Any:
        first = self._peek()
        key = self._quoted(first) if first and first in "'\"" else _scalar(self._bare(":,}"))
        if self._peek() != ":":
            raise ValueError(f"Expected ':' after the key {key!r} in {self._text!r}.")
        self._at += 1
        return key

    def _quoted(self, quote: str) -> str:
        match = re.compile(rf"{quote}((?:\\.|[^\\{quote}])*){quote}", re.DOTALL).match(self._text, self._at)
        if match is None:
            raise ValueError(f"A {quote} is not closed in the value {self._text!r}.")
        self._at = match.end()
        return re.sub(rf"\\([\\{quote}])", r"\1", match[1])

    def _bare(self, ends: str) -> str:
        """Read up to the first of the characters `ends` outside the braces of an interpolation."""
        start, depth = self._at, 0
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "{" and self._text[self._at - 1 : self._at] == "$":
                depth += 1
            elif depth and char == "}":
                depth -= 1
            elif not depth and char in ends:
                break
            self._at += 1
        return self._text[start : self._at].strip()


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.search(r"\d|inf|nan", text, re.IGNORECASE) and _NUMBER.fullmatch(text):
        try:
            return int(text)
        except ValueError:
            return float(text)
    if re.fullmatch(r"[-+]?0[xXoObB]\w+", text):
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):  # "0b12" is a text
            return text
    return text


def apply_override(cfg: Any, text: str) -> None:
    """Apply one override to `cfg`, a DictConfig, in place. See `LazyConfig.apply_overrides`."""
    from omegaconf.errors import GrammarParseError

    try:
        _apply(cfg, text)
    except GrammarParseError as error:  # an interpolation
        reason = str(error).splitlines()[0]
        raise ValueError(f"{text!r}: the interpolation is not valid: {reason}.") from error


def _apply(cfg: Any, text: str) -> None:
    from omegaconf import OmegaConf

    mark, path, value = parse_override(text)
    may_be_new = mark in ("+", "++")
    node = cfg
    for depth, key in enumerate(path[:-1]):
        _check_key(node, key, text, path[:depth], may_be_new=may_be_new)
        if key not in _keys(node) or node[key] is None:
            node[key] = {}
            may_be_new = True
        node = node[key]
        if not OmegaConf.is_config(node):
            raise KeyError(
                f"{text!r}: {_written(path[: depth + 1])} is not a section but {node!r}, "
                f"so it has no {path[depth + 1]!r}."
            )
    _set(node, value, mark, text, path, may_be_new=may_be_new)


def _set(node: Any, value: Any, mark: str, text: str, path: list[str | int], *, may_be_new: bool) -> None:
    """Set, add or remove the last key of `path` in `node`, its section."""
    from omegaconf import DictConfig, ListConfig

    key = path[-1]
    exists = key in _keys(node)
    if mark == "+" and exists:
        raise KeyError(f"{text!r}: {_written(path)} already exists; remove the + to change it.")
    if mark == "~" and not exists:
        near = suggest(str(key), map(str, _keys(node)))
        raise KeyError(f"{text!r}: there is no {_written(path)} to remove.{near}")
    _check_key(node, key, text, path[:-1], may_be_new=may_be_new)
    if mark == "~":
        if value is not None and node[key] != value:
            raise ValueError(f"{text!r}: {_written(path)} is {node[key]!r}, so it is not removed.")
        del node[key]
    elif isinstance(value, dict) and exists and isinstance(node[key], DictConfig):
        node[key].merge_with(value)
    elif isinstance(node, ListConfig) and not exists:
        node.append(value)
    elif _is_tuple(node):
        node._get_parent()[node._key()] = tuple(
            value if i == key % len(node) else x for i, x in enumerate(node)
        )
    else:
        node[key] = tuple(value) if exists and isinstance(value, list) and _is_tuple(node[key]) else value


def _is_tuple(value: Any) -> bool:
    """Return whether a node is a tuple. OmegaConf keeps tuples as such since version 2.4."""
    from omegaconf import OmegaConf

    return OmegaConf.get_type(value) is tuple


def _keys(node: Any) -> Iterable[Any]:
    from omegaconf import DictConfig

    return node.keys() if isinstance(node, DictConfig) else range(-len(node), len(node))


def _written(path: list[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def _check_key(node: Any, key: Any, text: str, path: list[str | int], *, may_be_new: bool) -> None:
    """Raise a KeyError if a section has no such key and its target no such argument."""
    from omegaconf import DictConfig

    if key in _keys(node):
        return
    where = _written(path) or "the config"
    if not isinstance(node, DictConfig):
        if may_be_new and key == len(node):
            return
        raise KeyError(f"{text!r}: {where} is a list of length {len(node)} and has no item {key!r}.")
    arguments = _arguments(node.get("_target_"))
    if may_be_new or key in arguments:
        return
    near = suggest(str(key), dict.fromkeys([*map(str, node.keys()), *arguments]))
    raise KeyError(f"{text!r}: {where} has no {key!r}.{near} Write +{_written([*path, key])}=... to add it.")


def _arguments(target: Any) -> list[str]:
    """Return the argument names of a node's target, or an empty list if they cannot be found out."""
    if isinstance(target, str):
        if not is_allowed(target):  # its module is not imported
            return []
        try:
            target = locate_target(target)
        except (
            ImportError,
            ValueError,
        ):  # it may exist on another machine; `instantiate` reports it otherwise
            return []
    if not callable(target):
        return []
    try:
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):
        return []
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
