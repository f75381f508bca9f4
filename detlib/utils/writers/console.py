"""Metrics on the terminal and in the log."""

import datetime
import logging
import sys
import time

import torch

from detlib.utils._event_storage import EventStorage, get_event_storage
from detlib.utils.live_line import LiveLine
from detlib.utils.writers.base import EventWriter

__all__ = ["CommonMetricPrinter"]

_SECONDS_BETWEEN_DRAWINGS = 0.2


def _peak_memory() -> str:
    """Peak memory in MiB: of CUDA tensors where CUDA is in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return f"max_mem: {peak / unit:.0f}M (process)"


class CommonMetricPrinter(EventWriter):
    """Logs one line: iterations done, time left, losses, times, learning rate and memory.

    ::

        iter: 40/480  eta: 0:16:52  total_loss: 1.93  loss_cls: 0.71  ...  time: 2.2951  last_time: 2.3107
        data_time: 0.0083  last_data_time: 0.0079  lr: 0.0078  max_mem: 1893M

    Scalars other than these are for the other writers.

    On a terminal a short form of it is rewritten in place while training goes on, and the full lines go to
    the other handlers of the logger only, such as the log file.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20, live: bool | None = None) -> None:
        """
        Args:
            max_iter: number of iterations in all; without it no time left is shown.
            window_size: iterations over which losses (median) and times (mean) are taken.
            live: whether to rewrite one line in place; None does so where stdout is a terminal.
        """
        self.logger = logging.getLogger("detlib.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None  # iteration and clock of the write before
        self._live = live
        self._line = LiveLine()
        self._next_drawing = 0.0

    def step(self) -> None:
        """Draws the live line, if there is one and it was not drawn a moment ago."""
        now = time.perf_counter()
        if now < self._next_drawing:
            return
        if self._live is None:
            self._live = LiveLine.is_possible()
        if not self._live:
            self._next_drawing = float("inf")
            return
        self._next_drawing = now + _SECONDS_BETWEEN_DRAWINGS
        self._line.show(self._short(get_event_storage()))

    def write(self) -> None:
        storage = get_event_storage()
        if self._max_iter is not None and storage.iter == self._max_iter:
            return  # hooks after the last iteration write once more: nothing is new
        latest = storage.latest().values()
        if latest and all(iteration < storage.start_iter for _, iteration in latest):
            return  # results of an evaluation that is made up before the first step
        times = []
        for name in ("time", "data_time"):
            if name in storage.histories():
                history = storage.history(name)
                mean = history.avg(storage.count_samples(name, self._window_size))
                times += [f"{name}: {mean:.4f}", f"last_{name}: {history.latest():.4f}"]
        # The losses of TEST.VAL_LOSS are logged when they are taken, by the names "val/...".
        losses = [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "loss" in name and not name.startswith("val/")
        ]
        eta = self._eta(storage)
        parts = [self._done(storage), eta, *losses, *times, _learning_rate(storage), _peak_memory()]
        # Terminals with a live line leave these out.
        self.logger.info("  ".join(part for part in parts if part), extra={"is_progress": True})

    def close(self) -> None:
        self._line.close()

    def finish(self) -> None:
        self.close()  # the last step's line is written

    def _done(self, storage: EventStorage) -> str:
        return f"iter: {storage.iter + 1}" + ("" if self._max_iter is None else f"/{self._max_iter}")

    def _short(self, storage: EventStorage) -> str:
        """What fits into one line of a terminal, the important first."""
        histories = storage.histories()
        seconds = self._seconds_left(storage, None)
        parts = [self._done(storage), "" if seconds is None else f"eta: {_clock(seconds)}"]
        for name, digits in (("total_loss", ".4g"), ("time", ".3f"), ("data_time", ".3f")):
            if name in histories:
                value = histories[name].median(storage.count_samples(name, self._window_size))
                parts.append(f"{name}: {value:{digits}}")
        parts.insert(3, _learning_rate(storage))
        return "  ".join(part for part in [*parts, _peak_memory()] if part)

    def _eta(self, storage: EventStorage) -> str:
        """Time left as "eta: h:mm:ss", "" if unknown; also put in as the scalar "eta_seconds"."""
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
            # The median: one slow iteration (an evaluation, a checkpoint) shall not count.
            return storage.history("time").median(1000) * left
        if before is not None and storage.iter > before[0]:
            return (time.perf_counter() - before[1]) / (storage.iter - before[0]) * left
        return None


def _learning_rate(storage: EventStorage) -> str:
    histories = storage.histories()
    return f"lr: {histories['lr'].latest():.5g}" if "lr" in histories else ""


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
