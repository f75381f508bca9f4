"""Matching of a file's parameter names to a model's, and readable reports about the names."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["group_by_module", "match_by_longest_suffix", "strip_common_prefix"]


def strip_common_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Removes `prefix` (such as "module." of a parallel wrapper) if every name starts with it."""
    if state and all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}
    return dict(state)


def match_by_longest_suffix(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Renames the entries of a file that holds only a part of the model, such as a backbone.

    A name of the file fits a name of the model that equals it or ends in "." and it. Each name of the model
    takes the longest name that fits: of "conv1.weight" and "stem.conv1.weight",
    "backbone.bottom_up.stem.conv1.weight" takes the second.

    Args:
        model_shapes: shape of each parameter and buffer of the model, by name.
        state: the file's arrays by name.

    Returns:
        The arrays under the model's names; those that fit nothing keep their own name. One that fits a single
        name but not its shape takes that name, so that the difference can be told.

    Raises:
        ValueError: if one entry of the file would go to several places of the model.
    """
    candidates: dict[str, list[str]] = {}  # name in the file -> names in the model that end so
    for name in sorted(model_shapes):
        suffix = _longest_suffix(name, state)
        if suffix is not None:
            candidates.setdefault(suffix, []).append(name)
    taken = {}
    for suffix, names in candidates.items():
        shape = tuple(state[suffix].shape)
        fitting = [name for name in names if tuple(model_shapes[name]) == shape]
        if len(fitting) > 1:
            raise ValueError(
                f"'{suffix}' of the checkpoint fits both '{fitting[0]}' and '{fitting[1]}' of the model: "
                "rename the file's entries, or save it without 'matching_heuristics'"
            )
        if fitting or len(names) == 1:
            taken[suffix] = (fitting or names)[0]
    return {taken.get(name, name): value for name, value in state.items()}


def _longest_suffix(name: str, candidates: Mapping[str, Any]) -> str | None:
    """The longest of `candidates` that `name` equals or ends in, at a dot."""
    while name not in candidates:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def group_by_module(names: Iterable[str]) -> str:
    """Lists parameter names with those of one module on one line: ``fpn_lateral2.{bias, weight}``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        groups.setdefault(module, []).append(leaf)
    lines = []
    for module, leaves in groups.items():
        listed = ", ".join(sorted(leaves))
        text = listed if len(leaves) == 1 else f"{{{listed}}}"
        lines.append(f"  {module}.{text}" if module else f"  {listed}")
    return "\n".join(lines)
