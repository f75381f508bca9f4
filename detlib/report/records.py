"""The scalars of a run, read from its ``metrics.json`` (one JSON object per line)."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from detlib.utils.file_io import PathManager

__all__ = ["EvaluationName", "Records", "parse_evaluation", "read_records"]

_VALIDATION = re.compile(r"^(?:val|validation)[/_]")
_LOSS = re.compile(r"(?:^|[/_])loss")
_LEARNING_RATE = re.compile(r"^(?:lr|lr/.+|.+/lr|lr_.+)$")
_TASKS = "bbox|segm|keypoints|box_proposals|sem_seg|panoptic_seg"
_EVALUATION = re.compile(rf"^(?:(?P<dataset>.+)/)?(?P<task>(?:{_TASKS})(?:_TTA)?)/(?P<metric>.+)$")
# Training statistics whose names look like those of evaluation results.
_TRAINING_GROUPS = {"fast_rcnn", "keypoint_head", "mask_rcnn", "roi_head", "rpn"}


@dataclass(frozen=True)
class EvaluationName:
    """The parts of a name such as ``bbox/AP-cat``, or ``shapes:val/bbox/AP`` if there are several datasets.

    Attributes:
        dataset: name of the dataset, or "" if there is only one.
        task: "bbox", "segm", "sem_seg_TTA" and so on.
        metric: "AP", "AP50", "mIoU" and so on.
        of_class: the class, or "" for metrics over all classes.
    """

    dataset: str
    task: str
    metric: str
    of_class: str = ""

    @property
    def group(self) -> str:
        """Task, prefixed with the dataset if there are several."""
        return f"{self.dataset}/{self.task}" if self.dataset else self.task


def parse_evaluation(name: str) -> EvaluationName | None:
    """Parse the name of a scalar. Return None if it is not an evaluation result."""
    found = _EVALUATION.match(name)
    if found is None:
        # A user-defined task.
        group, slash, metric = name.rpartition("/")
        if not slash or set(group.split("/")) & _TRAINING_GROUPS or _VALIDATION.match(name):
            return None
        if _LOSS.search(metric) or _LEARNING_RATE.match(name):
            return None
        return EvaluationName("", group, metric)
    metric, _, of_class = found["metric"].partition("-")
    if found["metric"].startswith("min(IoU, B-Iou)"):
        metric, of_class = "min(IoU, B-Iou)", found["metric"].partition(")")[2].removeprefix("-")
    return EvaluationName(found["dataset"] or "", found["task"], metric, of_class)


_MAX_INTEGER = 2**63  # larger ones may be too large for a float

Series = tuple[list[int], list[float]]


@dataclass
class Records:
    """The scalars of a run.

    Attributes:
        by_iteration: scalars by iteration, in ascending order.
        skipped_lines: 1-based numbers of the lines that are not a JSON object with an iteration.
        restarts: iterations from which the run was resumed after it had already progressed further.
    """

    by_iteration: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped_lines: list[int] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of all scalars, sorted."""
        return sorted({name for scalars in self.by_iteration.values() for name in scalars})

    @property
    def last_iteration(self) -> int:
        """Last recorded iteration, 0-based; -1 if there is none."""
        return max(self.by_iteration, default=-1)

    def series(self, name: str) -> Series:
        """Return the iterations and the values of a scalar, without values that are not finite."""
        pairs = [(i, scalars[name]) for i, scalars in self.by_iteration.items() if name in scalars]
        pairs = [(i, value) for i, value in pairs if math.isfinite(value)]
        return [i for i, _ in pairs], [value for _, value in pairs]

    def losses(self) -> list[str]:
        """Return the names of the training losses, the total loss first."""
        names = [name for name in self.names if _LOSS.search(name) and not _VALIDATION.match(name)]
        names = [name for name in names if parse_evaluation(name) is None]
        return sorted(names, key=lambda name: (name != "total_loss", name))

    def validation_losses(self) -> dict[str, list[str]]:
        """Return the names of the validation losses, grouped by the corresponding training loss."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            prefix = _VALIDATION.match(name)
            if prefix and _LOSS.search(name):
                base = name[prefix.end() :].rpartition("/")[2]
                found.setdefault("total_loss" if base == "loss" else base, []).append(name)
        return found

    def learning_rates(self) -> list[str]:
        """Return the names of the learning rates."""
        return [name for name in self.names if _LEARNING_RATE.match(name)]

    def evaluations(self) -> dict[str, dict[str, str]]:
        """Return the names of the evaluation scalars by task and metric, without per-class metrics."""
        groups: dict[str, dict[str, str]] = {}
        for name in self.names:
            parsed = parse_evaluation(name)
            if parsed is not None and not parsed.of_class:
                groups.setdefault(parsed.group, {})[parsed.metric] = name
        return groups

    def last_values(self) -> dict[str, tuple[int, float]]:
        """Return the iteration and the value of the last occurrence of each scalar, which may be nan."""
        return {name: (i, v) for i, scalars in self.by_iteration.items() for name, v in scalars.items()}

    def per_class(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the last per-class metrics: ``{"sem_seg": {"sky": {"IoU": 81.0, ...}}}``."""
        groups: dict[str, dict[str, dict[str, float]]] = {}
        for name, (_, value) in self.last_values().items():
            parsed = parse_evaluation(name)
            if parsed is not None and parsed.of_class:
                of_class = groups.setdefault(parsed.group, {}).setdefault(parsed.of_class, {})
                of_class[parsed.metric] = value
        return groups

    def training_seconds(self) -> float:
        """Return the total time of all iterations from the recorded times; 0 if none is recorded."""
        total, previous = 0.0, -1
        for iteration, scalars in self.by_iteration.items():
            if math.isfinite(scalars.get("time", math.nan)):
                total += scalars["time"] * (iteration - previous)
                previous = iteration
        return total


def read_records(path: str) -> Records:
    """Read ``metrics.json``.

    Lines truncated by a killed process are skipped. Where the iteration decreases, the run was resumed or
    restarted: earlier records of that iteration and later ones are replaced.

    Args:
        path: path of the file. If it does not exist, the records are empty.
    """
    records = Records()
    if not PathManager.isfile(os.fspath(path)):
        return records
    kept: list[tuple[int, dict[str, float]]] = []
    with PathManager.open(path, "r", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            parsed = _parse(line)
            if parsed is None:
                records.skipped_lines.append(number)
                continue
            if kept and parsed[0] < kept[-1][0]:
                records.restarts.append(parsed[0])
                while kept and kept[-1][0] >= parsed[0]:
                    kept.pop()
            kept.append(parsed)
    for iteration, scalars in kept:
        records.by_iteration.setdefault(iteration, {}).update(scalars)
    records.restarts = [i for i in records.restarts if i <= records.last_iteration]
    return records


def _parse(line: str) -> tuple[int, dict[str, float]] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        return None
    if abs(record["iteration"]) > _MAX_INTEGER:
        return None
    scalars = {
        name: float(value)
        for name, value in record.items()
        if name != "iteration" and (isinstance(value, float) or _is_integer(value))
    }
    return record["iteration"], scalars


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX_INTEGER
