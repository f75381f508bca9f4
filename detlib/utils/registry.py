"""Tables from names to objects, and the search for an object by its dotted path."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from detlib.utils.suggest import suggest

__all__ = ["Registry", "dotted_path", "locate"]


def _describe(obj: Any) -> str:
    """The dotted path of a class or function; the repr of anything else."""
    name = getattr(obj, "__qualname__", None)
    return f"{obj.__module__}.{name}" if name else repr(obj)


class _NotLocated(ImportError):
    """There is nothing at a dotted path, as opposed to a module there that fails when imported."""


def locate(name: str) -> Any:
    """Returns the object that lies at a dotted path, importing what is needed on the way.

    Args:
        name: ``"package.module.Class"``, also ``"package.module.Class.method"``.

    Raises:
        ImportError: no module on the path exists, or the module has no such attribute (near names listed).
            An ImportError raised inside a module that does exist comes through unchanged.
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
            # "a.b.C" fails as a module by itself; a missing dependency of a.b must not be taken for that.
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
    """Returns the shortest dotted path at which `locate` finds a class or function.

    Packages hand their names on, so ``detlib.modeling.backbone.fpn.FPN`` is called ``detlib.modeling.FPN``.

    Raises:
        ValueError: it has no such path: a lambda, a local function, an object without a name, or something
            of a script or of a file that is no module.
    """
    if isinstance(owner := getattr(obj, "__self__", None), type):  # a class method, maybe an inherited one
        return f"{dotted_path(owner)}.{obj.__name__}"
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"{obj!r} has no dotted path.")
    parts = [*module.split("."), *name.split(".")]
    if module == "__main__" or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{module}.{name} has no dotted path: only what is named in a module has one.")
    for depth in range(1, len(module.split(".")) + 1):
        path = ".".join([*parts[:depth], name])
        try:
            found = locate(path)
        except _NotLocated:
            continue
        if found == obj:
            return path
    raise ValueError(f"{module}.{name} is another object than the {name!r} that came.")


class Registry(Iterable[tuple[str, Any]]):
    """A table from names to classes or functions, so that a config can choose them by name.

    ::

        ROI_HEADS_REGISTRY = Registry("ROI_HEADS")

        @ROI_HEADS_REGISTRY.register()
        class MyHeads(nn.Module): ...

        ROI_HEADS_REGISTRY.get("MyHeads")

    `get` also takes a dotted path (``"mypkg.heads.MyHeads"``), so that no import for its side effect is
    needed. Iterating yields (name, object) pairs in the order of registration.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: what the table holds, for messages.
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
        """Registers `obj` under its ``__name__``: as a decorator ``@R.register()``, or as a call
        ``R.register(obj)``.

        Raises:
            ValueError: the name is taken; both objects are named.
        """
        if obj is None:
            return self.register
        self._do_register(obj.__name__, obj)
        return obj

    def get(self, name: str, *, key: str | None = None) -> Any:
        """Returns the object registered as `name`, or the one at the dotted path `name`.

        Args:
            name: what to look for.
            key: the config key that has this value, for messages.

        Raises:
            KeyError: there is neither; near names are listed.
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
