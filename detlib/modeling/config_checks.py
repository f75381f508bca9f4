"""Checks of config values that components share: each error names the key, what came and what is legal."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from detlib.layers import get_norm
from detlib.utils.suggest import suggest

__all__ = ["check_choice", "check_count", "check_features", "check_norm", "config_keys", "take_features"]


def check_choice(value: Any, legal: Collection, key: str) -> None:
    """Raise ValueError unless `value` of the config key `key` is one of `legal`; near names are listed."""
    if value not in legal:
        near = suggest(value, legal) if isinstance(value, str) else ""
        raise ValueError(f"{key} is {value!r}; legal are {', '.join(map(repr, legal))}.{near}")


def check_count(value: int, key: str) -> None:
    """Raise ValueError unless `value` of the config key `key` is at least 1."""
    if value < 1:
        raise ValueError(f"{key} is {value!r}; it must be at least 1.")


def check_features(names: Sequence[str], given: Iterable[str], key: str, giver: str = "the backbone") -> None:
    """Raise ValueError unless `names`, of the config key `key`, are features that exist, and at least one.

    Args:
        names: features that somebody wants to use.
        given: features that there are.
        key: the config key that names them.
        giver: what gives features, for the message.
    """
    given = list(given)
    unknown = [name for name in names if name not in given]
    if unknown or not names:
        wrong = (
            ", ".join(map(repr, unknown)) + " is not among them" if unknown else "it must name at least one"
        )
        near = suggest(unknown[0], given) if unknown else ""
        raise ValueError(f"{key} is {list(names)}; {giver} gives {given}: {wrong}.{near}")


def check_norm(norm: str, key: str) -> None:
    """Raise ValueError unless `norm`, of the config key `key`, is a name that `get_norm` knows."""
    with config_keys(key):
        get_norm(norm, 32)


def take_features(features: dict[str, torch.Tensor], names: Sequence[str], what: str) -> list[torch.Tensor]:
    """The maps that a part of a model works on.

    Models that were built without a config meet a wrong name here first.

    Args:
        features: what the backbone gave.
        names: the maps wanted.
        what: the argument, and the config key, that names them.

    Raises:
        ValueError: a name that the backbone does not give.
    """
    if any(name not in features for name in names):
        check_features(names, features, what)
    return [features[name] for name in names]


@contextlib.contextmanager
def config_keys(*keys: str) -> Iterator[None]:
    """Put `keys` in front of the ValueErrors of what is built within, which knows arguments but no config.

    An error that names a key already comes through unchanged.
    """
    try:
        yield
    except ValueError as error:
        if "MODEL." in str(error):
            raise
        raise ValueError(f"{', '.join(keys)}: {error}") from error
