"""The event storage, which collects the metrics of a training run, and the writers that report them.

Code anywhere in a model calls ``get_event_storage().put_scalar(...)``. The trainer enters the storage
(``with EventStorage(start_iter) as storage``) and calls the writers periodically. Writers of CSV files and of
tracking services are in `detlib.utils.writers`.
"""

import contextlib
import datetime
import glob
import logging
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import IO, Any

import numpy as np
import torch
from fvcore.common.history_buffer import HistoryBuffer

from detlib.utils.file_io import PathManager
from detlib.utils.live_line import LiveLine
from detlib.utils.memory import peak_memory
from detlib.utils.metrics_files import json_line, open_json_file

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "NewScalars",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

logger = logging.getLogger(__name__)

# Images and histograms that no writer takes must not fill the memory.
_MAX_WAITING = 64
_SECONDS_BETWEEN_REDRAWS = 0.2

_STORAGE_STACK: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """Return the innermost active storage.

    Raises:
        RuntimeError: if there is no active storage.
    """
    if not _STORAGE_STACK:
        raise RuntimeError(
            "There is no active EventStorage. Models log to it in training mode: run them inside "
            "'with EventStorage(start_iter) as storage:'."
        )
    return _STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """Return whether a ``with EventStorage()`` block is active."""
    return bool(_STORAGE_STACK)


class ScalarHistory(HistoryBuffer):
    """The last values of one scalar: fvcore's `HistoryBuffer` in 16 bytes per value.

    The lists of pairs of the base class need ten times as much, and a training run records some thirty
    scalars in each of its 90000 steps.
    """

    def __init__(self, max_length: int = 10000) -> None:
        """
        Args:
            max_length: at least this many of the last values are kept, and at most twice as many.
        """
        super().__init__(max_length)
        del self._data
        self._values = array("d")
        self._iterations = array("q")

    def update(self, value: float, iteration: float | None = None) -> None:
        """Add a value; `iteration` defaults to the number of values so far."""
        if len(self._values) >= 2 * self._max_length:
            # Half of them in one go, because every removal moves the rest.
            del self._values[: self._max_length], self._iterations[: self._max_length]
        self._values.append(value)
        self._iterations.append(self._count if iteration is None else int(iteration))
        self._count += 1
        self._global_avg += (value - self._global_avg) / self._count

    def latest(self) -> float:
        """Return the last value."""
        return self._values[-1]

    def median(self, window_size: int) -> float:
        """Return the median of the last `window_size` values."""
        return float(np.median(self._values[-window_size:]))

    def avg(self, window_size: int) -> float:
        """Return the mean of the last `window_size` values."""
        return float(np.mean(self._values[-window_size:]))

    def values(self) -> list[tuple[float, int]]:
        """Return pairs of value and iteration, oldest first."""
        return list(zip(self._values, self._iterations))

    def count_within(self, window_size: int) -> int:
        """Return how many values belong to the `window_size` iterations up to that of the last value."""
        first = self._iterations[-1] - window_size
        count = 0
        for iteration in reversed(self._iterations):
            if iteration <= first:
                break
            count += 1
        return count


class EventStorage:
    """A collection of scalars (with their history), images and histograms by iteration.

    As a context manager it becomes the storage that `get_event_storage` returns.
    """

    def __init__(self, start_iter: int = 0) -> None:
        """
        Args:
            start_iter: the first iteration; nonzero when a run is resumed.
        """
        self._iter = self._start_iter = int(start_iter)
        self._prefix = ""
        self._history: defaultdict[str, HistoryBuffer] = defaultdict(ScalarHistory)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._images: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    @property
    def iter(self) -> int:
        """The current iteration; `step` advances it, the trainer may set it."""
        return self._iter

    @iter.setter
    def iter(self, value: int) -> None:
        self._iter = int(value)

    @property
    def start_iter(self) -> int:
        """The first iteration."""
        return self._start_iter

    @property
    def iteration(self) -> int:
        """Same as `iter`."""
        return self._iter

    def step(self) -> None:
        """Advance to the next iteration. Call this after everything of the current one is recorded."""
        self._iter += 1

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Context manager that prepends ``name/`` to all recorded names; can be nested."""
        outer = self._prefix
        self._prefix = f"{outer}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = outer

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a number to the history of `name`.

        Args:
            name: name of the scalar, such as "loss_cls" or "rpn/num_pos_anchors".
            value: a number, or a tensor of one element (reading it synchronizes with its device).
            smoothing_hint: whether writers should show a median over a window. It must be the same in every
                call.
            cur_iter: the iteration that the value belongs to; default the current one.

        Raises:
            ValueError: if `smoothing_hint` differs from an earlier call.
        """
        name = self._prefix + name
        value = float(value)
        cur_iter = self._iter if cur_iter is None else cur_iter
        known = self._smoothing_hints.setdefault(name, smoothing_hint)
        if known != smoothing_hint:
            raise ValueError(
                f"Scalar {name!r} was recorded with smoothing_hint={known} before, now {smoothing_hint}."
            )
        self._history[name].update(value, cur_iter)
        self._latest[name] = (value, cur_iter)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float
    ) -> None:
        """Add multiple numbers: ``put_scalars(loss_cls=1.0, loss_box_reg=2.0)``."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Add an image for the writers that show images. At most the last 64 unwritten images are kept.

        Args:
            img_name: name of the image.
            img_tensor: (C, H, W) RGB tensor or array, uint8 in [0, 255] or float in [0, 1].
        """
        self._images.append((self._prefix + img_name, img_tensor, self._iter))
        del self._images[:-_MAX_WAITING]

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Add the histogram of a tensor of any shape, with `bins` bins of equal width.

        At most the last 64 unwritten histograms are kept.

        Raises:
            ValueError: if the tensor is empty.
        """
        values = hist_tensor.detach().float().flatten().cpu()
        if values.numel() == 0:
            raise ValueError(f"Histogram {hist_name!r} got an empty tensor.")
        low, high = values.min().item(), values.max().item()
        counts = torch.histc(values, bins=bins)
        edges = torch.linspace(low, high, steps=bins + 1)
        self._histograms.append(
            {
                "tag": self._prefix + hist_name,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
                "global_step": self._iter,
            }
        )
        del self._histograms[:-_MAX_WAITING]

    def history(self, name: str) -> HistoryBuffer:
        """Return the history of a scalar.

        Raises:
            KeyError: if no scalar of that name was recorded.
        """
        if name not in self._history:
            raise KeyError(
                f"No scalar {name!r} was recorded in this EventStorage. Available: {sorted(self._history)}"
            )
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return all histories by name."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the last value of each scalar, and its iteration."""
        return self._latest

    def smoothing_hints(self) -> dict[str, bool]:
        """Return for each scalar whether it should be smoothed."""
        return self._smoothing_hints

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Return `latest`, with medians over the last `window_size` iterations for scalars to be smoothed."""
        return {
            name: (
                self._history[name].median(self.count_samples(name, window_size))
                if self._smoothing_hints[name]
                else value,
                iteration,
            )
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Return how many values of `name` belong to the `window_size` iterations up to its last one."""
        return self.history(name).count_within(window_size)

    def state_dict(self, window_size: int = 20) -> dict[str, list]:
        """Return the values of the last `window_size` iterations by name, as pairs of value and iteration."""
        first = self._iter - window_size
        recent = {
            name: [[*pair] for pair in history.values()[-2 * window_size :] if pair[1] > first]
            for name, history in self._history.items()
        }
        return {name: pairs for name, pairs in recent.items() if pairs}

    def load_state_dict(self, state_dict: dict[str, list]) -> None:
        """Add the values of an earlier run, for medians. They are not written again."""
        for name, pairs in state_dict.items():
            own, self._history[name] = self._history[name].values(), ScalarHistory()
            for value, iteration in [*pairs, *own]:
                self._history[name].update(value, iteration)

    def clear_images(self) -> None:
        """Drop the images; a writer calls this after writing them."""
        self._images = []

    def clear_histograms(self) -> None:
        """Drop the histograms; a writer calls this after writing them."""
        self._histograms = []

    def __enter__(self) -> "EventStorage":
        _STORAGE_STACK.append(self)
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        top = _STORAGE_STACK.pop()
        assert top is self, "EventStorage blocks must be exited in the reverse order of their entry"


class EventWriter:
    """Base class of the writers, which report the contents of the active storage."""

    def write(self) -> None:
        """Write what is new in `get_event_storage()`."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the output; nothing is written afterwards."""

    def start(self) -> None:
        """Prepare for writing. Called before the first training step, with an active storage."""

    def step(self) -> None:
        """Update displays between two calls of `write`. Called after every training step."""

    def finish(self) -> None:
        """Write a last time and close. Called at the end of training, even after an error."""
        try:
            # Hooks such as the evaluation have recorded more since the last step.
            self.write()
        finally:
            self.close()


class NewScalars:
    """The scalars that were recorded since the last call of `take`, as one record per iteration."""

    def __init__(self, window_size: int) -> None:
        """
        Args:
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
        """
        self._window_size = window_size
        self._last_iteration = -1

    def take(self, storage: EventStorage | None = None) -> list[dict[str, float]]:
        """Return one dict per iteration, in ascending order, with "iteration" and its scalars.

        Args:
            storage: the storage to read; default the active one.
        """
        storage = get_event_storage() if storage is None else storage
        by_iteration: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_iteration:
                by_iteration[iteration][name] = value
        if by_iteration:
            self._last_iteration = max(by_iteration)
        return [{**by_iteration[iteration], "iteration": iteration} for iteration in sorted(by_iteration)]


class CommonMetricPrinter(EventWriter):
    """A writer that logs one line: iterations, remaining time, losses, times, learning rate and memory.

    ::

        iter: 40/480  eta: 0:16:52  total_loss: 1.93  loss_cls: 0.71  ...  time: 2.2951  last_time: 2.3107
        data_time: 0.0083  last_data_time: 0.0079  lr: 0.0078  max_mem: 1893M

    It does not log other scalars.

    On a terminal, a short form of the line is rewritten in-place during training, and the full lines go only
    to the logger's other handlers, such as the log file.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20, live: bool | None = None) -> None:
        """
        Args:
            max_iter: total number of iterations; None shows no remaining time.
            window_size: number of iterations for the median of losses and the mean of times.
            live: whether to rewrite one line in-place; None does so if stdout is a terminal.
        """
        self.logger = logger
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None  # iteration and time of the last write
        self._live = live
        self._line = LiveLine()
        self._next_drawing = 0.0

    def step(self) -> None:
        """Draw the live line, if there is one and it was not drawn a moment ago."""
        now = time.perf_counter()
        if now < self._next_drawing:
            return
        if self._live is None:
            self._live = LiveLine.is_possible()
        if not self._live:
            self._next_drawing = float("inf")
            return
        self._next_drawing = now + _SECONDS_BETWEEN_REDRAWS
        self._line.show(self._short(get_event_storage()))

    def write(self) -> None:
        storage = get_event_storage()
        if self._max_iter is not None and storage.iter == self._max_iter:
            return  # hooks write once more after the last iteration: nothing is new
        latest = storage.latest().values()
        if latest and all(iteration < storage.start_iter for _, iteration in latest):
            return  # results of a missed evaluation that is re-run on resume
        times = []
        for name in ("time", "data_time"):
            if name in storage.histories():
                history = storage.history(name)
                mean = history.avg(storage.count_samples(name, self._window_size))
                times += [f"{name}: {mean:.4f}", f"last_{name}: {history.latest():.4f}"]
        # The losses of TEST.VAL_LOSS, named "val/...", are logged when they are computed.
        losses = [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "loss" in name and not name.startswith("val/")
        ]
        eta = self._eta(storage)
        parts = [self._done(storage), eta, *losses, *times, _learning_rate(storage), peak_memory()]
        # Handlers of terminals with a live line drop these records.
        self.logger.info("  ".join(part for part in parts if part), extra={"is_progress": True})

    def close(self) -> None:
        self._line.close()

    def finish(self) -> None:
        self.close()  # the line of the last step is already written

    def _done(self, storage: EventStorage) -> str:
        return f"iter: {storage.iter + 1}" + ("" if self._max_iter is None else f"/{self._max_iter}")

    def _short(self, storage: EventStorage) -> str:
        """Return the line for a terminal, most important parts first."""
        histories = storage.histories()
        seconds = self._seconds_left(storage, None)
        parts = [self._done(storage), "" if seconds is None else f"eta: {_clock(seconds)}"]
        for name, digits in (("total_loss", ".4g"), ("time", ".3f"), ("data_time", ".3f")):
            if name in histories:
                value = histories[name].median(storage.count_samples(name, self._window_size))
                parts.append(f"{name}: {value:{digits}}")
        parts.insert(3, _learning_rate(storage))
        return "  ".join(part for part in [*parts, peak_memory()] if part)

    def _eta(self, storage: EventStorage) -> str:
        """Return the remaining time as "eta: h:mm:ss" and record it as "eta_seconds"; "" if unknown."""
        before, self._last_write = self._last_write, (storage.iter, time.perf_counter())
        seconds = self._seconds_left(storage, before)
        if seconds is None:
            return ""
        if "time" in storage.histories():
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return f"eta: {_clock(seconds)}"

    def _seconds_left(self, storage: EventStorage, before: tuple[int, float] | None) -> float | None:
        if self._max_iter is None:
            return None
        left = max(self._max_iter - storage.iter - 1, 0)
        if "time" in storage.histories():
            # The median, so that single slow iterations (evaluation, checkpoint) do not count.
            return storage.history("time").median(1000) * left
        if before is not None and storage.iter > before[0]:
            return (time.perf_counter() - before[1]) / (storage.iter - before[0]) * left
        return None


def _learning_rate(storage: EventStorage) -> str:
    histories = storage.histories()
    return f"lr: {histories['lr'].latest():.5g}" if "lr" in histories else ""


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class JSONWriter(EventWriter):
    """A writer that appends scalars to a file with one JSON object per line and iteration.

    Each line has "iteration" and the scalars of that iteration, sorted by name::

        {"data_time": 0.008, "iteration": 19, "loss_cls": 0.71, "lr": 0.0004, "total_loss": 1.93}

    A run that resumes at iteration n drops the lines of iterations n and later, which it repeats, and keeps
    the earlier ones. Results of a missed evaluation that it re-runs are added to the line of that iteration,
    if there is one. A run that starts at 0 renames the file of an earlier run to ``metrics.1.json``.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: path of the file; its directory is created.
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
        """
        PathManager.mkdirs(os.path.dirname(json_file) or ".")
        self._path = json_file
        self._file_handle: IO[str] | None = None
        self._new = NewScalars(window_size)

    def write(self) -> None:
        records = self._new.take()
        if not records:
            return
        if self._file_handle is None:
            start_iter = get_event_storage().start_iter
            self._file_handle, records = open_json_file(self._path, start_iter, records)
        for record in records:
            self._file_handle.write(json_line(record))
        self._file_handle.flush()
        with contextlib.suppress(AttributeError, OSError):  # remote files have no file descriptor
            os.fsync(self._file_handle.fileno())

    def close(self) -> None:
        if self._file_handle is not None:
            self._file_handle.close()


class TensorboardXWriter(EventWriter):
    """A writer of scalars, images and histograms for TensorBoard.

    A resumed run hides what an earlier run wrote for iterations that it repeats. Results of a missed
    evaluation that is re-run may appear twice: hiding the old points would also hide the losses of that step.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            log_dir: folder of the event files.
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
            kwargs: further arguments of ``torch.utils.tensorboard.SummaryWriter``.
        """
        self._writer_args = {"log_dir": log_dir, **kwargs}
        self._new = NewScalars(window_size)
        self._purge_step = 0

    @cached_property
    def _writer(self) -> Any:
        # Imported here because it is slow, and created here so that there is no file before the first write.
        from torch.utils.tensorboard import SummaryWriter

        self._writer_args.setdefault("purge_step", self._purge_step)
        _wait_for_a_later_name(self._writer_args["log_dir"])
        return SummaryWriter(**self._writer_args)

    def write(self) -> None:
        storage = get_event_storage()
        records = self._new.take(storage)
        start_iter = storage.start_iter
        # The last evaluation of the earlier run has iteration `start_iter`; it stays unless that is repeated.
        again = start_iter == 0 or any(record["iteration"] == start_iter for record in records)
        self._purge_step = start_iter if again else start_iter + 1
        for record in records:
            iteration = record.pop("iteration")
            for name, value in record.items():
                self._writer.add_scalar(name, value, iteration)
        for name, image, iteration in storage._images:
            self._writer.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()


def _wait_for_a_later_name(log_dir: str) -> None:
    """Wait until a new event file comes after those in `log_dir`, for up to a second.

    TensorBoard reads the files in the order of their names, which contain the time in seconds. Within a
    second, the ids of process and writer are compared as text, where 10 comes before 9, and the earlier
    writer's data would hide the later writer's.
    """
    while glob.glob(os.path.join(glob.escape(log_dir), f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.01)
