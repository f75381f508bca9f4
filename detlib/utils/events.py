"""What a training run measures: the storage that collects it and the writers that put it out.

Code anywhere in a model calls ``get_event_storage().put_scalar(...)``; the trainer holds the storage
(``with EventStorage(start_iter) as storage``) and calls the writers now and then.
"""

import contextlib
import datetime
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from detlib.utils.file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

_STORAGE_STACK: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """Returns the innermost storage in use.

    Raises:
        RuntimeError: there is none.
    """
    if not _STORAGE_STACK:
        raise RuntimeError(
            "There is no EventStorage in use. Models in training mode log into one: run them inside "
            "'with EventStorage(start_iter) as storage:'."
        )
    return _STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """True inside a ``with EventStorage()`` block."""
    return bool(_STORAGE_STACK)


class EventStorage:
    """Collects scalars (with their history), images and histograms by iteration.

    As a context manager it becomes the one that `get_event_storage` returns.
    """

    def __init__(self, start_iter: int = 0) -> None:
        """
        Args:
            start_iter: number of the first iteration, not 0 when a run is resumed.
        """
        self._iter = start_iter
        self._prefix = ""
        self._history: defaultdict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
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
    def iteration(self) -> int:
        """The same as `iter`."""
        return self._iter

    def step(self) -> None:
        """Goes on to the next iteration; to be called after all of this one is put in."""
        self._iter += 1

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Puts ``name/`` before all names that are put in inside the block; blocks nest."""
        outer = self._prefix
        self._prefix = f"{outer}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = outer

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Adds a number to the history of `name`.

        Args:
            name: as "loss_cls" or "rpn/num_pos_anchors".
            value: a number or a tensor of one element (which waits for its device).
            smoothing_hint: whether writers should show a median over a window. It must be the same at every
                call.
            cur_iter: the iteration it belongs to; default the current one.

        Raises:
            ValueError: `smoothing_hint` differs from before.
        """
        name = self._prefix + name
        value = float(value)
        cur_iter = self._iter if cur_iter is None else cur_iter
        known = self._smoothing_hints.setdefault(name, smoothing_hint)
        if known != smoothing_hint:
            raise ValueError(
                f"Scalar {name!r} was put with smoothing_hint={known} before, now {smoothing_hint}."
            )
        self._history[name].update(value, cur_iter)
        self._latest[name] = (value, cur_iter)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float
    ) -> None:
        """Adds several numbers: ``put_scalars(loss_cls=1.0, loss_box_reg=2.0)``."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Adds a picture for the writers that show pictures.

        Args:
            img_name: its name.
            img_tensor: tensor or array (C, H, W), uint8 in 0..255 or float in 0..1, RGB.
        """
        self._images.append((self._prefix + img_name, img_tensor, self._iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Adds the distribution of the values of a tensor of any shape, in `bins` equal bins."""
        values = hist_tensor.detach().float().flatten().cpu()
        if values.numel() == 0:
            raise ValueError(f"Histogram {hist_name!r} got a tensor without elements.")
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

    def history(self, name: str) -> HistoryBuffer:
        """Returns the history of a scalar.

        Raises:
            KeyError: nothing was put under that name.
        """
        if name not in self._history:
            raise KeyError(
                f"No scalar {name!r} was put into this EventStorage. There are: {sorted(self._history)}"
            )
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Returns all histories by name."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Returns for each scalar its last value and the iteration of it."""
        return self._latest

    def smoothing_hints(self) -> dict[str, bool]:
        """Returns for each scalar whether it should be smoothed."""
        return self._smoothing_hints

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As `latest`, with the median over the last `window_size` iterations where smoothing is wanted."""
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
        """Returns how many values of `name` belong to the `window_size` iterations up to its last one."""
        values = self.history(name).values()
        first = values[-1][1] - window_size
        count = 0
        for _, iteration in reversed(values):
            if iteration <= first:
                break
            count += 1
        return count

    def clear_images(self) -> None:
        """Forgets the pictures; a writer calls it once they are written."""
        self._images = []

    def clear_histograms(self) -> None:
        """Forgets the histograms; a writer calls it once they are written."""
        self._histograms = []

    def __enter__(self) -> "EventStorage":
        _STORAGE_STACK.append(self)
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        top = _STORAGE_STACK.pop()
        assert top is self, "EventStorage blocks were left in another order than they were entered"


class EventWriter:
    """Base of the writers, which read the storage in use and put it out."""

    def write(self) -> None:
        """Puts out what is new in `get_event_storage()`."""
        raise NotImplementedError

    def close(self) -> None:
        """Finishes the output; nothing is written after it."""


class JSONWriter(EventWriter):
    """Appends scalars to a file with one JSON object per line and iteration.

    Each line has "iteration" and the scalars of that iteration, sorted by name::

        {"data_time": 0.008, "iteration": 19, "loss_cls": 0.71, "lr": 0.0004, "total_loss": 1.93}
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: the file; its directory is made. What it holds is kept, so a resumed run goes on below.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
        """
        PathManager.mkdirs(os.path.dirname(json_file) or ".")
        cut_short = _lacks_newline(json_file)
        self._file_handle = PathManager.open(json_file, "a")
        if cut_short:
            # The run before was killed in the middle of a line: keep ours apart from it.
            self._file_handle.write("\n")
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        by_iteration: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = value
        if not by_iteration:
            return
        for iteration in sorted(by_iteration):
            record = by_iteration[iteration] | {"iteration": iteration}
            self._file_handle.write(json.dumps(record, sort_keys=True) + "\n")
        self._last_write = max(by_iteration)
        self._file_handle.flush()
        with contextlib.suppress(AttributeError, OSError):  # remote files have no descriptor
            os.fsync(self._file_handle.fileno())

    def close(self) -> None:
        self._file_handle.close()


def _lacks_newline(path: str) -> bool:
    if not PathManager.isfile(path):
        return False
    with PathManager.open(path, "rb") as f:
        if f.seek(0, os.SEEK_END) == 0:
            return False
        f.seek(-1, os.SEEK_END)
        return f.read(1) != b"\n"


class TensorboardXWriter(EventWriter):
    """Writes scalars, pictures and histograms for TensorBoard."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            log_dir: where the event files go.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
            kwargs: further arguments of ``torch.utils.tensorboard.SummaryWriter``.
        """
        self._window_size = window_size
        self._writer_args = {"log_dir": log_dir, **kwargs}
        self._last_write = -1

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # slow to import, and no file before the first write

        return SummaryWriter(**self._writer_args)

    def write(self) -> None:
        storage = get_event_storage()
        newest = self._last_write
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                self._writer.add_scalar(name, value, iteration)
                newest = max(newest, iteration)
        self._last_write = newest
        for name, image, iteration in storage._images:
            self._writer.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()


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
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        """
        Args:
            max_iter: number of iterations in all; without it no time left is shown.
            window_size: iterations over which losses (median) and times (mean) are taken.
        """
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None  # iteration and clock of the write before

    def write(self) -> None:
        storage = get_event_storage()
        if self._max_iter is not None and storage.iter == self._max_iter:
            return  # hooks after the last iteration write once more: nothing is new
        done = f"iter: {storage.iter + 1}" + ("" if self._max_iter is None else f"/{self._max_iter}")
        eta = self._eta(storage)
        times = []
        for name in ("time", "data_time"):
            if name in storage.histories():
                history = storage.history(name)
                mean = history.avg(storage.count_samples(name, self._window_size))
                times += [f"{name}: {mean:.4f}", f"last_{name}: {history.latest():.4f}"]
        histories = storage.histories()
        losses = [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in histories.items()
            if "loss" in name and not name.startswith("val")
        ]
        lr = f"lr: {histories['lr'].latest():.5g}" if "lr" in histories else ""
        parts = [done, f"eta: {eta}" if eta else "", *losses, *times, lr, _peak_memory()]
        self.logger.info("  ".join(part for part in parts if part))

    def _eta(self, storage: EventStorage) -> str:
        """Time left as h:mm:ss, "" if unknown; also put in as the scalar "eta_seconds"."""
        if self._max_iter is None:
            return ""
        left = self._max_iter - storage.iter - 1
        now = (storage.iter, time.perf_counter())
        before, self._last_write = self._last_write, now
        if "time" in storage.histories():
            # The median: one slow iteration (an evaluation, a checkpoint) shall not count.
            per_iter = storage.history("time").median(1000)
        elif before is not None and now[0] > before[0]:
            per_iter = (now[1] - before[1]) / (now[0] - before[0])
        else:
            return ""
        seconds = per_iter * left
        if "time" in storage.histories():
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return str(datetime.timedelta(seconds=int(seconds)))
