"""Shared checks of config values. Each error names the key, the value and what is legal."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from detlib.layers import get_norm
from detlib.utils.suggest import suggest

__all__ = ["check_choice", "check_count", "check_features", "check_norm", "config_keys", "take_features"]


def check_choice(value: Any, legal: Collection, key: str) -> None:
    """Raise ValueError unless `value`, of the config key `key`, is in `legal`; suggest similar names."""
    if value not in legal:
        near = suggest(value, legal) if isinstance(value, str) else ""
        raise ValueError(f"{key} is {value!r}; legal are {', '.join(map(repr, legal))}.{near}")


def check_count(value: int, key: str) -> None:
    """Raise ValueError unless `value`, of the config key `key`, is at least 1."""
    if value < 1:
        raise ValueError(f"{key} is {value!r}; it must be at least 1.")


def check_features(names: Sequence[str], given: Iterable[str], key: str, giver: str = "the backbone") -> None:
    """Raise ValueError unless `names` are existing features, at least one.

    Args:
        names: names of the features to use.
        given: names of the features that exist.
        key: the config key of `names`, for the message.
        giver: what computes the features, for the message.
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
    """Raise ValueError unless `norm`, of the config key `key`, is a name known to `get_norm`."""
    with config_keys(key):
        get_norm(norm, 32)


def take_features(features: dict[str, torch.Tensor], names: Sequence[str], what: str) -> list[torch.Tensor]:
    """Return the feature maps with the given names.

    This is the first check of the names in a model that was built without a config.

    Args:
        features: the backbone's output.
        names: names of the feature maps.
        what: the argument, and the config key, of `names`, for the message.

    Raises:
        ValueError: the backbone has no feature map of a name.
    """
    if any(name not in features for name in names):
        check_features(names, features, what)
    return [features[name] for name in names]


@contextlib.contextmanager
def config_keys(*keys: str) -> Iterator[None]:
    """Prefix the ValueErrors raised inside the block with the config keys `keys`.

    Components that are built inside the block know their arguments but not the config. An error that names a
    key already is unchanged.
    """
    try:
        yield
    except ValueError as error:
        if "MODEL." in str(error):
            raise
        raise ValueError(f"{', '.join(keys)}: {error}") from error
