"""What a run wrote into its ``metrics.json``, one JSON object a line, put in order."""

import json
import math
import os
import re
from dataclasses import dataclass, field

from detlib.utils.file_io import PathManager

__all__ = ["EvaluationName", "Records", "parse_evaluation", "read_records"]

_VALIDATION = re.compile(r"^(?:val|validation)[/_]")
_LOSS = re.compile(r"(?:^|[/_])loss")
_RATE = re.compile(r"^(?:lr|lr/.+|.+/lr|lr_.+)$")
_TASKS = "bbox|segm|keypoints|box_proposals|sem_seg|panoptic_seg"
_EVALUATION = re.compile(rf"^(?:(?P<dataset>.+)/)?(?P<task>(?:{_TASKS})(?:_TTA)?)/(?P<metric>.+)$")
# What the trainer measures beside losses, under names that look like those of an evaluation.
_TRAINING_GROUPS = {"fast_rcnn", "keypoint_head", "mask_rcnn", "roi_head", "rpn"}


@dataclass(frozen=True)
class EvaluationName:
    """The parts of a name such as ``bbox/AP-cat``, or with several data sets ``shapes:val/bbox/AP``.

    Attributes:
        dataset: "" where there is one data set only.
        task: "bbox", "segm", "sem_seg_TTA" and so on.
        metric: "AP", "AP50", "mIoU".
        of_class: the class; "" for metrics of the whole.
    """

    dataset: str
    task: str
    metric: str
    of_class: str = ""

    @property
    def group(self) -> str:
        """The task, with the data set before it if there are several."""
        return f"{self.dataset}/{self.task}" if self.dataset else self.task


def parse_evaluation(name: str) -> EvaluationName | None:
    """Take the name of a scalar apart; None if it is no result of an evaluation."""
    found = _EVALUATION.match(name)
    if found is None:
        # A task that only its user knows.
        group, slash, metric = name.rpartition("/")
        if not slash or set(group.split("/")) & _TRAINING_GROUPS or _VALIDATION.match(name):
            return None
        if _LOSS.search(metric) or _RATE.match(name):
            return None
        return EvaluationName("", group, metric)
    metric, _, of_class = found["metric"].partition("-")
    if found["metric"].startswith("min(IoU, B-Iou)"):
        metric, of_class = "min(IoU, B-Iou)", found["metric"].partition(")")[2].removeprefix("-")
    return EvaluationName(found["dataset"] or "", found["task"], metric, of_class)


Series = tuple[list[int], list[float]]


@dataclass
class Records:
    """The scalars of a run.

    Attributes:
        by_iteration: the scalars of each iteration, which rise.
        skipped_lines: numbers, from 1, of lines that are no JSON object with an iteration.
        restarts: iterations at which a run went on after an earlier one had come further.
    """

    by_iteration: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped_lines: list[int] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All names that occur, sorted."""
        return sorted({name for scalars in self.by_iteration.values() for name in scalars})

    @property
    def last_iteration(self) -> int:
        """The last iteration that something is known of, from 0; -1 without any."""
        return max(self.by_iteration, default=-1)

    def series(self, name: str) -> Series:
        """The iterations and the finite values of a scalar."""
        pairs = [(i, scalars[name]) for i, scalars in self.by_iteration.items() if name in scalars]
        pairs = [(i, value) for i, value in pairs if math.isfinite(value)]
        return [i for i, _ in pairs], [value for _, value in pairs]

    def losses(self) -> list[str]:
        """Names of the losses of training, the total first."""
        names = [name for name in self.names if _LOSS.search(name) and not _VALIDATION.match(name)]
        names = [name for name in names if parse_evaluation(name) is None]
        return sorted(names, key=lambda name: (name != "total_loss", name))

    def validation_losses(self) -> dict[str, list[str]]:
        """Names of the validation losses, on one or more sets, by the losses that they correspond to."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            prefix = _VALIDATION.match(name)
            if prefix and _LOSS.search(name):
                base = name[prefix.end() :].rpartition("/")[2]
                found.setdefault("total_loss" if base == "loss" else base, []).append(name)
        return found

    def learning_rates(self) -> list[str]:
        """Names of the learning rates."""
        return [name for name in self.names if _RATE.match(name)]

    def evaluations(self) -> dict[str, dict[str, str]]:
        """Names of scalars by task and metric, without those of single classes."""
        groups: dict[str, dict[str, str]] = {}
        for name in self.names:
            parsed = parse_evaluation(name)
            if parsed is not None and not parsed.of_class:
                groups.setdefault(parsed.group, {})[parsed.metric] = name
        return groups

    def last_values(self) -> dict[str, tuple[int, float]]:
        """The iteration and the value of the last occurrence of each scalar, nan among them."""
        return {name: (i, v) for i, scalars in self.by_iteration.items() for name, v in scalars.items()}

    def per_class(self) -> dict[str, dict[str, dict[str, float]]]:
        """The last metrics of single classes: ``{"sem_seg": {"sky": {"IoU": 81.0, ...}}}``."""
        groups: dict[str, dict[str, dict[str, float]]] = {}
        for name, (_, value) in self.last_values().items():
            parsed = parse_evaluation(name)
            if parsed is not None and parsed.of_class:
                of_class = groups.setdefault(parsed.group, {}).setdefault(parsed.of_class, {})
                of_class[parsed.metric] = value
        return groups

    def training_seconds(self) -> float:
        """The time of all iterations, each as long as the lines say; 0 if they say nothing."""
        total, before = 0.0, -1
        for iteration, scalars in self.by_iteration.items():
            if math.isfinite(scalars.get("time", math.nan)):
                total += scalars["time"] * (iteration - before)
                before = iteration
        return total


def read_records(path: str) -> Records:
    """Read ``metrics.json``.

    Lines that a kill has cut short are skipped. Where the iteration goes back, a run was resumed or begun
    anew: what was written of that iteration and later ones before is replaced.

    Args:
        path: the file; without it the records are empty.
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
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        return None
    scalars = {
        name: float(value)
        for name, value in record.items()
        if name != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return record["iteration"], scalars
