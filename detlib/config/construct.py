"""How components are made from a config: `configurable`, and the ``from_config`` that goes with it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode as _YacsNode

from detlib.utils.suggest import suggest

__all__ = ["configurable", "explicit_args"]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


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
