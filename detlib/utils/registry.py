"""Registries of objects by name, and the lookup of objects by dotted path."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from detlib.utils.suggest import suggest

__all__ = ["Registry", "dotted_path", "locate"]


def _describe(obj: Any) -> str:
    """Return the dotted path of a class or function, or the repr of anything else."""
    name = getattr(obj, "__qualname__", None)
    return f"{obj.__module__}.{name}" if name else repr(obj)


class _NotLocated(ImportError):
    """There is no object at a dotted path, as opposed to a module that fails on import."""


def locate(name: str) -> Any:
    """Return the object at a dotted path, importing modules as needed.

    Args:
        name: ``"package.module.Class"`` or ``"package.module.Class.method"``.

    Raises:
        ImportError: if no module of the path exists, or the module has no such attribute (the message lists
            similar names). An ImportError raised inside an existing module is passed on unchanged.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise _NotLocated(f"{name!r} is not a dotted path of Python names.")
    module, depth = None, 0
    for depth in range(len(parts), 0, -1):
        path = ".".join(parts[:depth])
        try:
            module = importlib.import_module(path)
            break
        except ModuleNotFoundError as error:
            # "a.b.C" is not a module and fails; a missing dependency of a.b is a different error.
            if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
                raise
    if module is None:
        raise _NotLocated(f"Cannot locate {name!r}: there is no module {parts[0]!r}.")
    obj: Any = module
    for i in range(depth, len(parts)):
        if not hasattr(obj, parts[i]):
            owner = ".".join(parts[:i])
            near = suggest(parts[i], (n for n in dir(obj) if not n.startswith("_")))
            raise _NotLocated(f"Cannot locate {name!r}: {owner!r} has no attribute {parts[i]!r}.{near}")
        obj = getattr(obj, parts[i])
    return obj


def dotted_path(obj: Any) -> str:
    """Return the shortest dotted path at which `locate` finds a class or function.

    Packages re-export names, so ``detlib.modeling.backbone.fpn.FPN`` becomes ``detlib.modeling.FPN``.

    Raises:
        ValueError: if it has no such path: a lambda, a local function, an object without a name, or an object
            of a script or of a file that is not a module.
    """
    if isinstance(owner := getattr(obj, "__self__", None), type):  # a class method, possibly inherited
        return f"{dotted_path(owner)}.{obj.__name__}"
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"{obj!r} has no dotted path.")
    parts = [*module.split("."), *name.split(".")]
    if module == "__main__" or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{module}.{name} has no dotted path: only names at the top of a module have one.")
    for depth in range(1, len(module.split(".")) + 1):
        path = ".".join([*parts[:depth], name])
        try:
            found = locate(path)
        except _NotLocated:
            continue
        if found == obj:
            return path
    raise ValueError(f"{module}.{name} is a different object than the {name!r} that was passed.")


class Registry(Iterable[tuple[str, Any]]):
    """A mapping from names to classes or functions, so that a config can choose them by name.

    ::

        ROI_HEADS_REGISTRY = Registry("ROI_HEADS")

        @ROI_HEADS_REGISTRY.register()
        class MyHeads(nn.Module): ...

        ROI_HEADS_REGISTRY.get("MyHeads")

    `get` also takes a dotted path (``"mypkg.heads.MyHeads"``), so that no module has to be imported for its
    side effect. Iterating yields (name, object) pairs in the order of registration.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: name of the registry, for messages.
        """
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def _do_register(self, name: str, obj: Any) -> None:
        if name in self._obj_map:
            raise ValueError(
                f"Registry {self._name!r} already has {name!r}, which is {_describe(self._obj_map[name])}: "
                f"{_describe(obj)} cannot take the same name."
            )
        self._obj_map[name] = obj

    def register(self, obj: Any = None) -> Any:
        """Register `obj` under its ``__name__``.

        Use it as a decorator, ``@R.register()``, or as a call, ``R.register(obj)``.

        Raises:
            ValueError: if the name is taken; the message has both objects.
        """
        if obj is None:
            return self.register
        self._do_register(obj.__name__, obj)
        return obj

    def get(self, name: str, *, key: str | None = None) -> Any:
        """Return the object registered as `name`, or the one at the dotted path `name`.

        Args:
            name: registered name or dotted path.
            key: the config key that has this value, for messages.

        Raises:
            KeyError: if there is neither; the message lists similar names.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        reason = ""
        if isinstance(name, str) and "." in name:
            try:
                return locate(name)
            except _NotLocated as error:
                reason = f" {error}"
        near = (
            suggest(name, self._obj_map) or f" Registered: {', '.join(sorted(self._obj_map)) or 'nothing'}."
        )
        found_in = f"{key} is {name!r}: no" if key else "No"
        raise KeyError(f"{found_in} object named {name!r} in registry {self._name!r}.{reason}{near}")

    def __contains__(self, name: str) -> bool:
        return name in self._obj_map

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._obj_map.items())

    def __len__(self) -> int:
        return len(self._obj_map)

    def __repr__(self) -> str:
        lines = [f"  {name}: {_describe(obj)}" for name, obj in self._obj_map.items()]
        return "\n".join([f"Registry {self._name!r} of {len(self)}:", *lines])
