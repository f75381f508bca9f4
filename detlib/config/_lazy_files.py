"""Execution of lazy config files, which may import other config files by relative path.

A config file runs with its own ``__import__`` among its builtins, so nothing global is patched and an error
in a file leaves no state behind. Absolute imports work as usual. A relative import names a file in the
folder of the importing file (``from .base import model``) or in a folder above it
(``from ..common.train import train``). The folders need not be Python packages or have valid module names.
"""

import builtins
import copy
import importlib.machinery
import os
from types import ModuleType
from typing import Any

from detlib.config._yaml import missing_config
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["as_config", "run_config_file"]


def run_config_file(path: str) -> dict[str, Any]:
    """Run a config file and return its variables.

    Raises:
        FileNotFoundError: if the file does not exist. The message lists similar paths.
        ImportError: if a relative import leads to no config file, or the imported name does not exist.
        SyntaxError: if the file, or a file that it imports, is not valid Python.
    """
    if not _is_file(path):
        raise missing_config(path)
    return _Session().variables(path)


def _is_file(path: str) -> bool:
    return PathManager.isfile(path) if "://" in path else os.path.isfile(path)


def _identity(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _relative_path(importer: str, level: int, name: str) -> str:
    """Return the path, without extension, of a relative import with `level` dots in the file `importer`."""
    scheme, mark, path = importer.rpartition("://")
    steps = [os.pardir] * (level - 1) + name.split(".")
    return scheme + mark + os.path.normpath(os.path.join(os.path.dirname(path), *steps))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy configs and plain containers; return anything else unchanged."""
    from omegaconf import Container

    if isinstance(value, Container):
        return copy.deepcopy(value, memo)
    if type(value) in (dict, list) and id(value) not in memo:
        memo[id(value)] = result = type(value)()
        if isinstance(result, dict):
            result.update((key, _copied(item, memo)) for key, item in value.items())
        else:
            result.extend(_copied(item, memo) for item in value)
    return memo.get(id(value), value)


def as_config(value: Any) -> Any:
    """Convert a dict to a DictConfig, whose entries are also attributes; return anything else unchanged."""
    from omegaconf import DictConfig

    return DictConfig(value, flags={"allow_objects": True}) if isinstance(value, dict) else value


class _Session:
    """A single load. Each file runs once, and each file that imports it gets its own copy of its configs."""

    def __init__(self) -> None:
        self._done: dict[str, dict[str, Any]] = {}
        self._running: list[str] = []

    def variables(self, path: str, asked_by: str | None = None) -> dict[str, Any]:
        identity = _identity(path)
        if identity in self._running:
            cycle = " -> ".join([*self._running[self._running.index(identity) :], identity])
            raise ImportError(f"Circular import of config files: {cycle}")
        if identity not in self._done:
            self._running.append(identity)
            try:
                self._done[identity] = self._run(path, asked_by)
            finally:
                self._running.pop()
        return self._done[identity]

    def _run(self, path: str, asked_by: str | None) -> dict[str, Any]:
        with PathManager.open(path, "rb") if "://" in path else open(path, "rb") as file:
            source = file.read()
        by = f", which {asked_by!r} imports" if asked_by else ""
        try:
            code = compile(source, path, "exec", dont_inherit=True)
        except SyntaxError as error:
            error.msg = f"{error.msg}, in the config file {path!r}{by}"
            raise
        except (ValueError, MemoryError, RecursionError) as error:  # null bytes, or deeper than the parser
            raise SyntaxError(
                f"{str(error) or 'nested too deeply'}, in the config file {path!r}{by}"
            ) from error

        def import_(name, globals=None, locals=None, fromlist=(), level=0):
            if level == 0:
                return builtins.__import__(name, globals, locals, fromlist, level)
            return self._import(path, name, fromlist or (), level)

        variables = {
            "__name__": f"lazy_config({path})",
            "__file__": path,
            "__builtins__": {**vars(builtins), "__import__": import_},
        }
        exec(code, variables)
        return variables

    def _import(self, importer: str, name: str, names: tuple[str, ...], level: int) -> ModuleType:
        """Return the module for ``from ..name import names`` in the file `importer`, with `level` dots."""
        stem = _relative_path(importer, level, name)
        statement = f"from {'.' * level}{name} import {', '.join(names)}"
        if _is_file(f"{stem}.py"):
            module = self._module(f"{stem}.py", importer)
        elif os.path.isdir(stem):
            module = self._folder(stem, names, importer)
        else:
            raise ImportError(_no_file(stem, importer, statement), name=name, path=importer)
        for attribute in names:
            if attribute != "*" and not hasattr(module, attribute):
                raise ImportError(_no_name(module, attribute, importer, statement), name=name, path=importer)
        return module

    def _module(self, path: str, importer: str) -> ModuleType:
        """Return a module with the variables of a file. Configs are copied, dicts are copied as configs."""
        variables = self.variables(path, asked_by=importer)
        module = ModuleType(variables["__name__"], variables.get("__doc__"))
        module.__file__ = path
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, origin=path)
        memo: dict[int, Any] = {}
        for key, value in variables.items():
            if not key.startswith("__") or key == "__all__":
                setattr(module, key, as_config(_copied(value, memo)))
        return module

    def _folder(self, folder: str, names: tuple[str, ...], importer: str) -> ModuleType:
        """Return a module of the imported files, for ``from ..common import train``."""
        module = ModuleType(f"lazy_config({folder})")
        module.__file__ = folder
        for attribute in names:
            file = os.path.join(folder, f"{attribute}.py")
            if _is_file(file):
                setattr(module, attribute, self._module(file, importer))
        return module


_ONLY_FILES = "Relative imports in config files can only import other config files"


def _no_file(stem: str, importer: str, statement: str) -> str:
    folder, name = os.path.split(stem)
    near = suggest(f"{name}.py", os.listdir(folder)) if os.path.isdir(folder) else ""
    return (
        f"There is no config file '{stem}.py', which {importer!r} imports ({statement}).{near} "
        f"{_ONLY_FILES}; import packages by their full name."
    )


def _no_name(module: ModuleType, attribute: str, importer: str, statement: str) -> str:
    path = module.__file__ or ""
    if not os.path.isdir(path):
        near = suggest(attribute, (name for name in vars(module) if not name.startswith("__")))
        return (
            f"The config file {path!r} has no {attribute!r}, which {importer!r} imports ({statement}).{near}"
        )
    near = suggest(f"{attribute}.py", os.listdir(path))
    package: list[str] = []
    parent = path
    while os.path.isfile(os.path.join(parent, "__init__.py")):
        parent, name = os.path.split(parent)
        package.insert(0, name)
    right = f"; write: from {'.'.join(package)} import {attribute}" if package else ""
    return (
        f"The folder {path!r} has no config file '{attribute}.py', which {importer!r} imports ({statement})."
        f"{near} {_ONLY_FILES}{right}."
    )
