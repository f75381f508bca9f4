"""The storage that collects what a training run measures."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from detlib.utils._scalar_history import ScalarHistory

__all__ = ["EventStorage", "get_event_storage", "has_event_storage"]

# Pictures and histograms that no writer takes must not fill the memory.
_MAX_WAITING = 64

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
        """Number of the first iteration."""
        return self._start_iter

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
        """Adds a picture for the writers that show pictures. Of those not yet written the last 64 are kept.

        Args:
            img_name: its name.
            img_tensor: tensor or array (C, H, W), uint8 in 0..255 or float in 0..1, RGB.
        """
        self._images.append((self._prefix + img_name, img_tensor, self._iter))
        del self._images[:-_MAX_WAITING]

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Adds the distribution of the values of a tensor of any shape, in `bins` equal bins.

        Of the histograms not yet written the last 64 are kept.
        """
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
        del self._histograms[:-_MAX_WAITING]

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
        return self.history(name).count_within(window_size)

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
