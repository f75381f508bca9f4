"""The callables that a lazy config may name by a dotted path: those of allowed packages.

A callable in a Python config is trusted, as the file is a program anyway. A dotted path may come from a YAML
file or the command line, so it must be below an allowed package. Nothing else is imported.
"""

import os
from typing import Any

from detlib.utils.registry import locate

__all__ = ["allow_packages", "is_allowed", "locate_target", "trust_target"]

_VARIABLE = "DETLIB_ALLOWED_PACKAGES"
_packages = {"detlib", "torch", "torchvision"}
_trusted: set[str] = set()
_HARMLESS = {
    *(f"builtins.{name}" for name in "bool dict float frozenset int list set slice str tuple".split()),
    "collections.OrderedDict",
    "functools.partial",
}
_HARMLESS_MODULES = ("fvcore.common.param_scheduler",)
# Parts of the allowed packages that run code of a file, or start processes.
_RUN_CODE = (
    *(f"detlib.{name}" for name in "cli config engine.distributed engine.launch model_zoo".split()),
    *(f"torch.{name}" for name in "_C _ops classes export hub jit library load multiprocessing ops".split()),
    *(f"torch.{name}" for name in "package serialization utils.cpp_extension utils.model_zoo".split()),
    *(f"torch.distributed.{name}" for name in "elastic launch launcher rpc run".split()),
)


def allow_packages(*names: str) -> None:
    """Allow lazy configs in YAML, and overrides, to name callables below packages of your own.

    detlib, torch and torchvision are allowed. The environment variable $DETLIB_ALLOWED_PACKAGES, names
    separated by commas, does the same.

    Args:
        names: packages or modules, such as "my_project" or "my_project.models".

    Raises:
        ValueError: if a name is not a dotted path.
    """
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"A package is named by a dotted path, got {name!r}")
    _packages.update(names)


def trust_target(name: str) -> None:
    """Allow one dotted path, which Python code has named."""
    _trusted.add(name)


def _is_below(name: str, packages: Any) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_allowed(name: str) -> bool:
    """Return whether a config may name the callable at a dotted path, as far as the path tells."""
    if name in _trusted or name in _HARMLESS:
        return True
    from_environment = {part.strip() for part in os.environ.get(_VARIABLE, "").split(",")} - {""}
    packages = _packages | from_environment
    return _is_below(name, (*packages, *_HARMLESS_MODULES)) and not _is_below(name, _RUN_CODE)


def locate_target(name: str) -> Any:
    """Return the object at a dotted path in a lazy config.

    Raises:
        ImportError: if there is no such object.
        ValueError: if the path, or the object that it leads to, is not below an allowed package.
    """
    if not is_allowed(name):
        raise ValueError(f"{name!r} is refused: {_advice(name)}")
    target = locate(name)
    if name not in _trusted and name not in _HARMLESS:
        home = _home(target)
        # A path such as "torch.os.system" leads out of the package.
        if not is_allowed(home) and not (home.startswith("torch._C.") and name.startswith("torch.")):
            raise ValueError(f"{name!r} is refused, since it is {home!r}: {_advice(home)}")
    return target


def _home(target: Any) -> str:
    """Return the dotted path at which an object is defined, or of its owner or type."""
    for owner in (
        target,
        getattr(target, "__objclass__", None),
        getattr(target, "__self__", None),
        type(target),
    ):
        module = getattr(owner, "__module__", None)
        if isinstance(module, str):
            return f"{module}.{getattr(owner, '__qualname__', type(owner).__qualname__)}"
    return type(target).__qualname__


def _advice(name: str) -> str:
    if _is_below(name, _RUN_CODE):
        return "it can run the code of a file, which a lazy config may not do by a dotted path"
    return (
        f"a lazy config may name callables of {', '.join(sorted(_packages))} by a dotted path. To allow a "
        f"package of your own, set {_VARIABLE}={name.partition('.')[0]} or call detlib.config.allow_packages"
    )
