"""Matching of a file's parameter names to a model's, and the report of what was loaded."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LoadReport", "group_by_module", "match_by_longest_suffix", "match_part", "strip_common_prefix"]

logger = logging.getLogger(__name__)

# `match_part`: of the names in one part of the model, or of the file's names, at least this share must agree.
_MIN_MATCHED = 0.5
# `LoadReport`: warn if at most this share of the model was loaded.
_FEW = 0.1


def strip_common_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Remove `prefix` (such as "module." of a parallel wrapper) if every name starts with it."""
    if state and all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}
    return dict(state)


def match_by_longest_suffix(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Rename the entries of a file that holds only a part of the model, such as a backbone.

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


def _flat(name: str) -> str:
    """timm's feature extractors write ``stages_0.blocks`` for what its files call ``stages.0.blocks``."""
    return re.sub(r"\.(?=\d+(?:\.|$))", "_", name)


def match_part(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> tuple[dict[str, Any], str] | None:
    """Find the part of a model that a file's weights belong to.

    That is the place under which most of the file's names lie with the same shapes: for a file with
    "layer1.0.conv1.weight" and a model with "backbone.timm_model.layer1.0.conv1.weight" it is
    "backbone.timm_model".

    Args:
        model_shapes: shape of each parameter and buffer of the model, by name.
        state: the file's arrays by name.

    Returns:
        The file's arrays under the model's names, those that fit nothing under their own, and the place; None
        if some name is the model's own, or no place fits.
    """
    if not state or any(name in model_shapes for name in state):
        return None
    files = {_flat(name): (name, tuple(value.shape)) for name, value in state.items()}
    found: dict[str, dict[str, str]] = {}  # place in the model -> name in the file -> name in the model
    below: Counter[str] = Counter()
    for name, shape in model_shapes.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            place = ".".join(parts[:i])
            below[place] += 1
            ours = files.get(_flat(".".join(parts[i:])))
            if ours is not None and ours[1] == tuple(shape):
                found.setdefault(place, {})[ours[0]] = name
    if not found:
        return None
    place = max(found, key=lambda p: (len(found[p]), -below[p], -len(p)))
    names = found[place]
    if len(names) < _MIN_MATCHED * min(below[place], len(state)):
        return None
    return {names.get(name, name): value for name, value in state.items()}, place


@dataclass
class LoadReport:
    """How a file's parameters and buffers met a model's."""

    path: str
    loaded: list[str] = field(default_factory=list)
    """Names in the model that got their value from the file."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Of `loaded`: name in the model to its other name in the file."""
    missing_keys: list[str] = field(default_factory=list)
    """In the model, not in the file."""
    unexpected_keys: list[str] = field(default_factory=list)
    """In the file, not in the model; under the file's names."""
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(name, shape in the file, shape in the model)."""

    def log(self) -> None:
        """Say what happened in one message a kind, with the names of one module on one line."""
        total = len(self.loaded) + len(self.missing_keys) + len(self.incorrect_shapes)
        if len(self.loaded) <= _FEW * total:
            logger.warning("%s", self._almost_nothing(total))
        elif not (self.missing_keys or self.unexpected_keys or self.incorrect_shapes):
            logger.info("All %d parameters and buffers of the model were loaded from %s", total, self.path)
        else:
            logger.info("Loaded from %s:\n%s", self.path, self._by_part())
        if self.renamed:
            pairs = Counter(
                (theirs.rpartition(".")[0], ours.rpartition(".")[0]) for ours, theirs in self.renamed.items()
            )
            lines = "\n".join(f"  {theirs or '(no module)'} -> {ours}" for theirs, ours in pairs)
            logger.info("%d of them have other names in the file:\n%s", len(self.renamed), lines)
        if self.incorrect_shapes:
            lines = "\n".join(
                f"  {name}: {theirs} in the file, {ours} here" for name, theirs, ours in self.incorrect_shapes
            )
            logger.warning(
                "Not loaded from %s, as the shapes differ (with another number of classes, for one); these "
                "start fresh:\n%s",
                self.path,
                lines,
            )
        if self.missing_keys:
            logger.warning(
                "Missing in %s, so left as they were:\n%s", self.path, group_by_module(self.missing_keys)
            )
        if self.unexpected_keys:
            logger.warning(
                "In %s but not in the model:\n%s", self.path, group_by_module(self.unexpected_keys)
            )

    def _by_part(self) -> str:
        """A line a part of the model: how much of it was loaded."""
        loaded = Counter(map(_part, self.loaded))
        other = Counter(map(_part, self.missing_keys))
        other.update(_part(name) for name, _, _ in self.incorrect_shapes)
        parts = dict.fromkeys([*loaded, *other])
        return "\n".join(f"  {part}: {loaded[part]} of {loaded[part] + other[part]}" for part in parts)

    def _almost_nothing(self, total: int) -> str:
        theirs, ours = self.unexpected_keys[:3], self.missing_keys[:3]
        return (
            f"Almost nothing of the model comes from {self.path}: {len(self.loaded)} of {total} parameters "
            f"and buffers. The file has names such as {', '.join(map(repr, theirs)) or 'none'}, the model "
            f"{', '.join(map(repr, ours)) or 'none'}. Is it a file of this model? If it holds a part of it "
            "under shorter names, add '?matching_heuristics=True' to its path, or '?convert=torchvision' and "
            "the like for the weights of another library."
        )


def _part(name: str) -> str:
    """The part of the model that a parameter belongs to: its first two modules."""
    return ".".join(name.split(".")[:-1][:2]) or name


def group_by_module(names: Iterable[str]) -> str:
    """List parameter names with those of one module on one line: ``fpn_lateral2.{bias, weight}``."""
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
