"""Safe reading of YAML configs with base files, and errors that name the file and line."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from detlib.config._expression import evaluate
from detlib.utils.file_io import PathManager
from detlib.utils.safe_yaml import PlainLoader, load_plain_yaml
from detlib.utils.suggest import near_names

__all__ = ["BASE_KEY", "missing_config", "parse_yaml", "read_yaml", "read_yaml_with_bases"]

BASE_KEY = "_BASE_"
_PYTHON_TAG = "tag:yaml.org,2002:python/"
_EVAL_TAG = _PYTHON_TAG + "object/apply:eval"
_MAX_CHAIN = 50

logger = logging.getLogger(__name__)


class _Loader(PlainLoader):
    """A loader of plain data and of the one Python tag in published configs, which `evaluate` handles."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                line = key.start_mark.line + 1
                logger.warning(
                    "%s, line %d: key %r appears twice; the last value is used", self.name, line, key.value
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep=deep)


def _construct_eval(loader: _Loader, node: yaml.Node) -> Any:
    arguments = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise yaml.constructor.ConstructorError(
            None, None, 'the tag !!python/object/apply:eval takes one string: ["..."]', node.start_mark
        )
    try:
        return evaluate(arguments[0])
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def _refuse_python(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None,
        None,
        f"the tag !!python/{suffix} is refused, since it can run code; write plain YAML "
        "(for a tuple, write a list [a, b])",
        node.start_mark,
    )


_Loader.add_constructor(_EVAL_TAG, _construct_eval)
_Loader.add_multi_constructor(_PYTHON_TAG, _refuse_python)


def parse_yaml(text: str | bytes, name: str = "<string>") -> dict[str, Any]:
    """Parse a YAML mapping. An empty text gives an empty dict.

    Args:
        text: the YAML; see `load_plain_yaml`.
        name: name of the source, for messages.

    Raises:
        ValueError: if `text` is not valid YAML, is not a mapping, has a tag of a Python object, or its
            aliases expand to far more values than it has.
    """
    data = load_plain_yaml(text, name, _Loader)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(
            f"{name}: a config must be a mapping of keys to values, got a {type(data).__name__}."
        )
    return data


def _near_paths(path: str) -> Iterator[str]:
    """Yield existing files with a path similar to `path`, which does not exist."""
    wanted = Path(path)
    below_configs = Path("configs") / wanted
    if not wanted.is_absolute() and below_configs.is_file():
        yield str(below_configs)
    parent = wanted.parent
    if parent.is_dir():
        yield from (str(parent / name) for name in near_names(wanted.name, os.listdir(parent)))
        folders = parent.parent
    else:
        folders = (
            next(folder for folder in parent.parents if folder.is_dir()) if parent.parents else Path(".")
        )
    # The right name in the wrong folder.
    for folder in sorted(folders.iterdir()):
        candidate = folder / wanted.name
        if candidate.is_file() and candidate != wanted:
            yield str(candidate)


def missing_config(path: str, asked_by: str | None = None) -> FileNotFoundError:
    """Return the error for a config file that does not exist. It suggests similar paths.

    Args:
        path: the missing file.
        asked_by: the config that has `path` as its base.
    """
    try:
        near = list(dict.fromkeys(_near_paths(path)))[:3]
    except (OSError, ValueError):  # the path is too long, or a folder cannot be read
        near = []
    by = f", which {asked_by!r} names as its {BASE_KEY}" if asked_by else ""
    hint = (
        f" Did you mean {' or '.join(map(repr, near))}?"
        if near
        else f" The working directory is {os.getcwd()!r}."
    )
    return FileNotFoundError(f"There is no config file {path!r}{by}.{hint}")


def read_yaml(path: str, asked_by: str | None = None) -> dict[str, Any]:
    """Read a single YAML file without following its `_BASE_`.

    Args:
        path: a file, or a URL that `PathManager` supports.
        asked_by: the config that has `path` as its base, for messages.

    Raises:
        FileNotFoundError: if the file does not exist. The message lists similar paths.
        ValueError: see `parse_yaml`.
    """
    if "://" not in path and not os.path.isfile(path):
        raise missing_config(path, asked_by)
    with PathManager.open(path, "rb") as f:
        return parse_yaml(f.read(), path)


def _resolve(base: str, path: str) -> str:
    """Return the path of a base, which may be absolute, below the home directory (~), a URL, or relative."""
    if base.startswith("~"):
        return os.path.expanduser(base)
    if "://" in base or os.path.isabs(base):
        return base
    return os.path.join(os.path.dirname(path), base)


def _overlay(upper: dict[str, Any], lower: dict[str, Any], path: str, prefix: str = "") -> None:
    """Merge `upper` into `lower`, section by section. Other values are replaced."""
    for key, value in upper.items():
        if isinstance(value, dict) and key in lower:
            if not isinstance(lower[key], dict):
                raise ValueError(
                    f"{path}: {prefix}{key} is a section here, but a single value in the {BASE_KEY} file."
                )
            _overlay(value, lower[key], path, f"{prefix}{key}.")
        else:
            lower[key] = _unshared(value)


def _unshared(value: Any) -> Any:
    """Copy dicts and lists, each occurrence by itself, so that a later merge changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def read_yaml_with_bases(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a YAML config and merge it over the configs that its key `_BASE_` names.

    `_BASE_` is a path or a list of paths. Later bases override earlier ones, and the file itself overrides
    all of them. Paths are relative to the file, absolute, below ``~``, or URLs. Each file is read once.

    Returns:
        The merged mapping, and the file that each of its dotted keys comes from.

    Raises:
        FileNotFoundError: if the file or a base does not exist.
        ValueError: if a file is not a valid config, the bases form a cycle, or more than 50 follow each
            other.
    """
    return _with_bases(os.fspath(path), (), {})


def _with_bases(path: str, chain: tuple[str, ...], done: dict[str, Any]) -> tuple[dict, dict[str, str]]:
    """Read and merge one file. `chain` has the files that lead to it, `done` the results by file."""
    try:
        identity = path if "://" in path else os.path.realpath(path)
    except (OSError, ValueError) as error:
        by = f", which {chain[-1]!r} names as its {BASE_KEY}" if chain else ""
        raise ValueError(f"There is no config file {path!r}{by}: {error}") from error
    if identity in chain:
        raise ValueError(f"Circular {BASE_KEY}: {' -> '.join((*chain, identity))}")
    if identity in done:
        return done[identity]
    if len(chain) >= _MAX_CHAIN:
        raise ValueError(f"{path}: {BASE_KEY} leads from {chain[0]!r} over more than {_MAX_CHAIN} files.")
    own = read_yaml(path, asked_by=chain[-1] if chain else None)
    bases = own.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: {BASE_KEY} must be a path or a list of paths, got {bases!r}.")
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    # Of a base that is named twice, the last mention decides.
    for base in reversed(dict.fromkeys(reversed(bases))):
        tree, base_origins = _with_bases(_resolve(base, path), (*chain, identity), done)
        _overlay(tree, merged, path)
        origins |= base_origins
    _overlay(own, merged, path)
    done[identity] = merged, origins | dict.fromkeys(_keys(own), path)
    return done[identity]
