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
    """Returns a new config with every key at its default."""
    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Makes `global_cfg` hold what `cfg` holds.

    It is there for short experiments; in code that lasts, hand configs to what needs them.
    """
    global_cfg.clear()
    global_cfg.update(cfg)


@functools.cache
def config_dir() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a source checkout."""
    package = Path(str(importlib.resources.files("detlib")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "Base-RCNN-FPN.yaml").is_file():
            return folder
    raise FileNotFoundError(f"detlib was installed without its configs: there are none at {package}/configs.")


def find_config(config_path: str, folder: Path | None = None) -> str:
    """Returns the absolute path of a shipped config file.

    Args:
        config_path: its path below ``configs/``.
        folder: another folder to look in.

    Raises:
        FileNotFoundError: there is no such config; near names are listed.
    """
    folder = config_dir() if folder is None else folder
    file = folder / config_path
    if not file.is_file():
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _ENDINGS)
        near = suggest(str(config_path), sorted(there))
        raise FileNotFoundError(f"The model zoo has no config {str(config_path)!r} in {folder}.{near}")
    return str(file)


def get_config(config_path: str) -> Any:
    """Reads a shipped config, such as ``get_config("common/train.py").train``.

    Args:
        config_path: its path below ``configs/``.

    Returns:
        A `CfgNode` of a ``.yaml`` file, a DictConfig of a ``.py`` file.

    Raises:
        FileNotFoundError: there is no such config; near names are listed.
    """
    file = find_config(config_path)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg


def try_get_key(cfg: Any, *keys: str, default: Any = None) -> Any:
    """The value of the first of `keys` that a config has.

    It is for code that takes both kinds of config: ``try_get_key(cfg, "OUTPUT_DIR", "train.output_dir")``.

    Args:
        cfg: a `CfgNode` or a DictConfig.
        *keys: dotted paths.
        default: what is returned if it has none of them.
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
    """Names of the arguments of a function, and whether it takes any others by position or by name."""
    parameters = inspect.signature(func).parameters.values()
    return (
        frozenset(p.name for p in parameters if p.kind in _NAMED),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def explicit_args(
    target: Callable, from_config: Callable, args: tuple, kwargs: dict[str, Any], *, owner: str | None = None
) -> dict[str, Any]:
    """Returns the explicit arguments that a call with a config stands for.

    `from_config` gets the config and what stands beside it (an input shape, say); keywords that it does not
    know are overrides, which win over what it returns.

    Args:
        target: what will be called with the result: a function, or the bare ``__init__`` of a class.
        from_config: ``(cfg, ...) -> dict`` of arguments.
        args: positional arguments of the call, the config among them.
        kwargs: keyword arguments of the call.
        owner: name of `target` for messages.

    Raises:
        TypeError: an argument came that `target` does not have, or `from_config` did not return a dict.
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
            "@configurable without arguments goes onto __init__; on functions give from_config=..."
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
    """Lets a class or a function be called with a config in place of its own arguments.

    ::

        class Head(nn.Module):
            @configurable
            def __init__(self, *, in_channels, num_classes=80): ...

            @classmethod
            def from_config(cls, cfg, input_shape):
                return {"in_channels": input_shape.channels, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}

        Head(in_channels=256)                     # explicit
        Head(cfg, shape)                          # by config
        Head(cfg, shape, num_classes=3)           # by config, but for one

        @configurable(from_config=lambda cfg: {"size": cfg.INPUT.MIN_SIZE_TEST})
        def build_transform(size): ...

    Only a `CfgNode` as the first argument, or as the keyword ``cfg``, counts as a config.

    Args:
        init_func: the ``__init__``, when used without parentheses.
        from_config: for functions: ``(cfg, ...) -> dict`` of arguments.

    Raises:
        TypeError: wrong use; or at the call, an argument that does not exist (class and argument named).
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
