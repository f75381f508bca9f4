"""Matching of parameter names in a file to those in a model, and the report of the loaded parameters."""

import logging
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LoadReport", "group_by_module", "match_by_longest_suffix", "match_part", "strip_common_prefix"]

logger = logging.getLogger(__name__)

# `match_part`: the minimum fraction of matching names, among those of the model part or those of the file.
_MIN_MATCHED = 0.5
# `LoadReport`: warn if at most this fraction of the model was loaded.
_FEW = 0.1
# `LoadReport`: the console shows this many lines of a list.
_CONSOLE_LINES = 8


# Wrappers of parallel training and torch.compile, and the names under which training frameworks keep a model.
_WRAPPERS = ("module.", "_orig_mod.")
_OWNERS = ("model.", "detector.", "ema.")
# `torch.optim.swa_utils.AveragedModel` counts its updates next to the parameters.
_COUNTER = "n_averaged"


def strip_common_prefix(state: Mapping[str, Any], own: Container[str]) -> tuple[dict[str, Any], str]:
    """Remove a prefix that all names of a file share, such as "module.", if the model has the other names.

    Args:
        state: the arrays of the file, by name.
        own: the names in the model.

    Returns:
        The arrays by their new names, and the prefix: one of "module.", "_orig_mod.", "model.", "detector.",
        "ema." or several of them, or "". If no prefix leads to names of the model, as for weights of
        another library, "module." and "_orig_mod." are removed.
    """
    names = [name for name in state if name != _COUNTER] if len(state) > 1 else list(state)
    common = os.path.commonprefix(names) if len(names) > 1 else "".join(names)
    candidates = [""]
    while prefix := next((p for p in _WRAPPERS + _OWNERS if common.startswith(candidates[-1] + p)), ""):
        candidates.append(candidates[-1] + prefix)
    best = max(candidates, key=lambda prefix: sum(name[len(prefix) :] in own for name in names))
    if not any(name[len(best) :] in own for name in names):
        wrappers = (c for c in candidates if not any(part in c for part in _OWNERS))
        best = max(wrappers, key=len)
    if not best:
        return dict(state), ""
    return {name[len(best) :]: state[name] for name in names}, best


def match_by_longest_suffix(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Rename the entries of a file with a part of the model, such as a backbone.

    A name in the file matches a name in the model if they are equal, or if the model's name ends in "." and
    the file's name. Each name in the model takes the longest match: of "conv1.weight" and
    "stem.conv1.weight", "backbone.bottom_up.stem.conv1.weight" takes the second.

    Args:
        model_shapes: shape of each parameter and buffer of the model, by name.
        state: the arrays of the file, by name.

    Returns:
        The arrays by their names in the model. Arrays without a match keep their name. An array that matches
        a single name takes that name even if the shape differs, so that the difference can be reported.

    Raises:
        ValueError: if an entry of the file matches multiple names in the model.
    """
    candidates: dict[str, list[str]] = {}  # name in the file -> matching names in the model
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
                f"'{suffix}' in the checkpoint matches both '{fitting[0]}' and '{fitting[1]}' in the model: "
                "rename the file's entries, or save it without 'matching_heuristics'"
            )
        if fitting or len(names) == 1:
            taken[suffix] = (fitting or names)[0]
    return {taken.get(name, name): value for name, value in state.items()}


def _longest_suffix(name: str, candidates: Mapping[str, Any]) -> str | None:
    """Return the longest of `candidates` that `name` is equal to, or ends in after a dot."""
    while name not in candidates:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def _flat(name: str) -> str:
    """Replace dots before numbers, as timm's feature extractors do: ``stages.0`` becomes ``stages_0``."""
    return re.sub(r"\.(?=\d+(?:\.|$))", "_", name)


def match_part(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> tuple[dict[str, Any], str] | None:
    """Find the part of a model that the weights in a file belong to.

    This is the module in which most names of the file exist with the same shapes. For a file with
    "layer1.0.conv1.weight" and a model with "backbone.timm_model.layer1.0.conv1.weight", it is
    "backbone.timm_model".

    Args:
        model_shapes: shape of each parameter and buffer of the model, by name.
        state: the arrays of the file, by name.

    Returns:
        The arrays by their names in the model, where arrays without a match keep their name, and the name of
        the module. None if any name of the file is a name in the model, or if no module matches.
    """
    if not state or any(name in model_shapes for name in state):
        return None
    files = {_flat(name): (name, tuple(value.shape)) for name, value in state.items()}
    found: dict[str, dict[str, str]] = {}  # module of the model -> name in the file -> name in the model
    below: Counter[str] = Counter()
    for name, shape in model_shapes.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            module = ".".join(parts[:i])
            below[module] += 1
            ours = files.get(_flat(".".join(parts[i:])))
            if ours is not None and ours[1] == tuple(shape):
                found.setdefault(module, {})[ours[0]] = name
    if not found:
        return None
    module = max(found, key=lambda p: (len(found[p]), -below[p], -len(p)))
    names = found[module]
    if len(names) < _MIN_MATCHED * min(below[module], len(state)):
        return None
    return {names.get(name, name): value for name, value in state.items()}, module


@dataclass
class LoadReport:
    """The parameters and buffers that were loaded from a file, and those that were not."""

    path: str
    loaded: list[str] = field(default_factory=list)
    """Names in the model whose values were loaded."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names of `loaded` that differ in the file: name in the model to name in the file."""
    missing_keys: list[str] = field(default_factory=list)
    """Names in the model that are not in the file."""
    unexpected_keys: list[str] = field(default_factory=list)
    """Names in the file that are not in the model."""
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(name, shape in the file, shape in the model)."""

    def log(self) -> None:
        """Log the report, with one message per category and the names of a module on one line.

        If there is a log file, the console shows the first lines of a long message only.
        """
        total = len(self.loaded) + len(self.missing_keys) + len(self.incorrect_shapes)
        if len(self.loaded) <= _FEW * total:
            logger.warning("%s", self._almost_nothing(total))
        elif not (self.missing_keys or self.unexpected_keys or self.incorrect_shapes):
            logger.info("All %d parameters and buffers of the model were loaded from %s", total, self.path)
        else:
            _log_lines(logging.INFO, f"Loaded from {self.path}:", self._by_part())
        if self.renamed:
            pairs = Counter(
                (theirs.rpartition(".")[0], ours.rpartition(".")[0]) for ours, theirs in self.renamed.items()
            )
            lines = [f"  {theirs or '(no module)'} -> {ours}" for theirs, ours in pairs]
            _log_lines(logging.INFO, f"{len(self.renamed)} of them have different names in the file:", lines)
        if self.incorrect_shapes:
            lines = [
                f"  {name}: {theirs} in the file, {ours} in the model"
                for name, theirs, ours in self.incorrect_shapes
            ]
            title = (
                f"Not loaded from {self.path}, since the shapes differ (for example, because the number of "
                "classes does). These keep their initial values:"
            )
            _log_lines(logging.WARNING, title, lines)
        if self.missing_keys:
            title = f"Missing in {self.path}. These keep their initial values:"
            _log_lines(logging.WARNING, title, group_by_module(self.missing_keys).split("\n"))
        if self.unexpected_keys:
            title = f"In {self.path} but not in the model:"
            _log_lines(logging.WARNING, title, group_by_module(self.unexpected_keys).split("\n"))

    def _by_part(self) -> list[str]:
        """Return the number of loaded parameters of each part of the model, one line per part."""
        loaded = Counter(map(_part, self.loaded))
        other = Counter(map(_part, self.missing_keys))
        other.update(_part(name) for name, _, _ in self.incorrect_shapes)
        parts = dict.fromkeys([*loaded, *other])
        return [f"  {part}: {loaded[part]} of {loaded[part] + other[part]}" for part in parts]

    def _almost_nothing(self, total: int) -> str:
        theirs, ours = self.unexpected_keys[:3], self.missing_keys[:3]
        return (
            f"Almost nothing was loaded from {self.path}: {len(self.loaded)} of {total} parameters and "
            f"buffers. The file has names such as {', '.join(map(repr, theirs)) or 'none'}, the model "
            f"{', '.join(map(repr, ours)) or 'none'}. Is it a file for this model? If it has a part of the "
            "model under shorter names, add '?matching_heuristics=True' to its path. For weights of another "
            "library, add an option such as '?convert=torchvision'."
        )


def _log_lines(level: int, title: str, lines: list[str]) -> None:
    """Log all lines, but only the first ones to the console if there is a log file."""
    console = lines
    if len(lines) > _CONSOLE_LINES:
        hidden = len(lines) - _CONSOLE_LINES + 1
        console = [*lines[: _CONSOLE_LINES - 1], f"  ... and {hidden} more lines in the log file"]
    extra = {"console_message": "\n".join([title, *console])}
    logger.log(level, "%s", "\n".join([title, *lines]), extra=extra)


def _part(name: str) -> str:
    """Return the part of the model that a parameter belongs to: the first two modules in its name."""
    return ".".join(name.split(".")[:-1][:2]) or name


def group_by_module(names: Iterable[str]) -> str:
    """Format parameter names with those of a module on one line: ``fpn_lateral2.{bias, weight}``."""
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
