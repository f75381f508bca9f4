"""Similar names for error messages."""

import difflib
from collections.abc import Iterable

__all__ = ["near_names", "suggest"]


def near_names(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` of `options` that are similar to `name`, best first, ignoring case."""
    by_fold: dict[str, list[str]] = {}
    for option in options:
        by_fold.setdefault(str(option).casefold(), []).append(str(option))
    found = difflib.get_close_matches(str(name).casefold(), by_fold, n=n, cutoff=0.6)
    return [option for fold in found for option in by_fold[fold]][:n]


def suggest(name: str, options: Iterable[str]) -> str:
    """Return ``""``, or a sentence such as ``" Did you mean 'A' or 'B'?"`` to append to an error message.

    Args:
        name: the name that the user wrote.
        options: the legal names.
    """
    near = [repr(option) for option in near_names(name, options)]
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f" Did you mean {listed}?"
