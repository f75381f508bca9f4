"""Default configs, shipped configs, and `configurable`, which builds components from configs."""

import functools
import importlib.resources
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as _YacsNode

from detlib.config.cfg_node import CfgNode
from detlib.config.defaults import _C
from detlib.config.lazy import LazyConfig
from detlib.utils.suggest import suggest

__all__ = [
    "CfgNode",
    "config_dir",
    "configurable",
    "explicit_args",
    "find_config",
    "get_cfg",
    "get_config",
    "global_cfg",
    "set_global_cfg",
    "try_get_key",
]

_ENDINGS = (".yaml", ".py")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

global_cfg = CfgNode()


def get_cfg() -> CfgNode:
    """Return a new config with every key at its default."""
    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Copy the content of `cfg` to `global_cfg`.

    The global config is meant for short experiments. Permanent code should pass configs as arguments.
    """
    global_cfg.clear()
    global_cfg.update(cfg)


@functools.cache
def config_dir() -> Path:
    """Return the folder of the shipped configs: in the package, or next to it in a source checkout."""
    package = Path(str(importlib.resources.files("detlib")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "Base-RCNN-FPN.yaml").is_file():
            return folder
    raise FileNotFoundError(f"detlib was installed without its configs: {package}/configs does not exist.")


def find_config(config_path: str, folder: Path | None = None) -> str:
    """Return the absolute path of a shipped config file.

    Args:
        config_path: path below ``configs/``.
        folder: another folder to search instead.

    Raises:
        FileNotFoundError: if there is no such config. The message lists similar names.
    """
    folder = config_dir() if folder is None else folder
    file = folder / config_path
    if not file.is_file():
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _ENDINGS)
        near = suggest(str(config_path), sorted(there))
        raise FileNotFoundError(f"The model zoo has no config {str(config_path)!r} in {folder}.{near}")
    return str(file)


def get_config(config_path: str) -> Any:
    """Load a shipped config, such as ``get_config("common/train.py").train``.

    Args:
        config_path: path below ``configs/``.

    Returns:
        A `CfgNode` for a ``.yaml`` file, a DictConfig for a ``.py`` file.

    Raises:
        FileNotFoundError: if there is no such config. The message lists similar names.
    """
    file = find_config(config_path)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg


def try_get_key(cfg: Any, *keys: str, default: Any = None) -> Any:
    """Return the value of the first of `keys` that a config has.

    This serves code that accepts both types of config: ``try_get_key(cfg, "OUTPUT_DIR",
    "train.output_dir")``.

    Args:
        cfg: a `CfgNode` or a DictConfig.
        *keys: dotted paths.
        default: the value to return if `cfg` has none of the keys.
    """
    for key in keys:
        value = cfg
        for part in key.split("."):
            if not hasattr(value, "keys") or part not in value:
                break
            value = value[part]
        else:
            return value
    return default


def _has_config(args: tuple, kwargs: dict[str, Any]) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, _YacsNode)


@functools.cache
def _names(func: Callable) -> tuple[frozenset[str], bool, bool]:
    """Return the argument names of a function, and whether it has ``*args`` and ``**kwargs``."""
    parameters = inspect.signature(func).parameters.values()
    return (
        frozenset(p.name for p in parameters if p.kind in _NAMED),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def explicit_args(
    target: Callable, from_config: Callable, args: tuple, kwargs: dict[str, Any], *, owner: str | None = None
) -> dict[str, Any]:
    """Translate a call with a config to explicit arguments.

    `from_config` receives the config and the other arguments of the call, such as an input shape. Keyword
    arguments that `from_config` does not have override the values that it returns.

    Args:
        target: the callable that the result is for: a function, or the undecorated ``__init__`` of a class.
        from_config: ``(cfg, ...) -> dict`` of arguments.
        args: positional arguments of the call, including the config.
        kwargs: keyword arguments of the call.
        owner: name of `target` for messages.

    Raises:
        TypeError: if `target` does not have one of the arguments, or `from_config` does not return a dict.
    """
    owner = owner or target.__qualname__
    known, _, takes_any_kw = _names(from_config)
    passed = {name: value for name, value in kwargs.items() if takes_any_kw or name in known}
    overrides = {name: value for name, value in kwargs.items() if name not in passed}
    result = from_config(*args, **passed)
    if not isinstance(result, dict):
        raise TypeError(f"{owner}: from_config must return a dict of arguments, got {type(result).__name__}.")
    accepted, _, accepts_any = _names(target)
    accepted = accepted - {"self"}
    for source, names in (("from_config returned", result), ("the call gave", overrides)):
        for name in names:
            if name not in accepted and not accepts_any:
                raise TypeError(
                    f"{owner} has no argument {name!r}, which {source}.{suggest(name, accepted)} "
                    f"Its arguments: {', '.join(sorted(accepted))}."
                )
    return {**result, **overrides}


def _wrap_init(init: Callable) -> Callable:
    if not inspect.isfunction(init) or init.__name__ != "__init__":
        raise TypeError(
            "@configurable without arguments must decorate __init__; for a function, pass from_config=..."
        )

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _has_config(args, kwargs):
            init(self, *args, **kwargs)
            return
        cls = type(self)
        from_config = getattr(cls, "from_config", None)
        if from_config is None or not inspect.ismethod(from_config):
            raise TypeError(
                f"{cls.__qualname__} has @configurable on __init__: "
                "it needs a class method from_config(cls, cfg, ...)."
            )
        init(self, **explicit_args(init, from_config, args, kwargs, owner=cls.__qualname__))

    return wrapped


def _wrap_function(function: Callable, from_config: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _has_config(args, kwargs):
            return function(*args, **kwargs)
        return function(**explicit_args(function, from_config, args, kwargs))

    wrapped.from_config = from_config  # type: ignore[attr-defined]
    return wrapped


def configurable(init_func: Callable | None = None, *, from_config: Callable | None = None) -> Callable:
    """Decorate an ``__init__`` or a function so that it can also be called with a config.

    ::

        class Head(nn.Module):
            @configurable
            def __init__(self, *, in_channels, num_classes=80): ...

            @classmethod
            def from_config(cls, cfg, input_shape):
                return {"in_channels": input_shape.channels, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}

        Head(in_channels=256)                     # explicit arguments
        Head(cfg, shape)                          # arguments from the config
        Head(cfg, shape, num_classes=3)           # from the config, except for num_classes

        @configurable(from_config=lambda cfg: {"size": cfg.INPUT.MIN_SIZE_TEST})
        def build_transform(size): ...

    A call is a call with a config if the first argument, or the keyword argument ``cfg``, is a `CfgNode`.

    Args:
        init_func: the ``__init__``, when used without parentheses.
        from_config: for functions: ``(cfg, ...) -> dict`` of arguments.

    Raises:
        TypeError: if the decorator is used in a wrong way. Calls with a config raise it for an argument that
            does not exist, and name the class and the argument.
    """
    if init_func is not None:
        if from_config is not None:
            raise TypeError("@configurable on __init__ takes no from_config=...: make it a class method.")
        return _wrap_init(init_func)
    if from_config is None:
        return _wrap_init
    if not callable(from_config):
        raise TypeError(f"from_config must be a function, got {from_config!r}.")
    parameters = list(inspect.signature(from_config).parameters)
    if not parameters or parameters[0] != "cfg":
        raise TypeError("The first argument of from_config must be named 'cfg'.")
    return functools.partial(_wrap_function, from_config=from_config)
