"""What loading a file did to a model, in words."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from detlib.checkpoint.key_matching import group_by_module

__all__ = ["LoadReport"]

logger = logging.getLogger(__name__)

_FEW = 0.1


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
        """Says what happened in one message a kind, with the names of one module on one line."""
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
