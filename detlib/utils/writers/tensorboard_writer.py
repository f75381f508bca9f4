"""Metrics for TensorBoard."""

import glob
import os
import time
from functools import cached_property
from typing import Any

from detlib.utils._event_storage import get_event_storage
from detlib.utils.writers.base import EventWriter, NewScalars

__all__ = ["TensorboardXWriter"]


class TensorboardXWriter(EventWriter):
    """Writes scalars, pictures and histograms for TensorBoard.

    What a run before has written of the iterations that are done again is hidden. What an evaluation that is
    made up gives may be there twice: the former points could only be hidden with the losses of that step.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            log_dir: where the event files go.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
            kwargs: further arguments of ``torch.utils.tensorboard.SummaryWriter``.
        """
        self._writer_args = {"log_dir": log_dir, **kwargs}
        self._new = NewScalars(window_size)
        self._purge_step = 0

    @cached_property
    def _writer(self) -> Any:
        # Slow to import, and no file before the first write.
        from torch.utils.tensorboard import SummaryWriter

        self._writer_args.setdefault("purge_step", self._purge_step)
        _wait_for_a_later_name(self._writer_args["log_dir"])
        return SummaryWriter(**self._writer_args)

    def write(self) -> None:
        storage = get_event_storage()
        records = self._new.take(storage)
        start_iter = storage.start_iter
        # The results of a last evaluation bear the number `start_iter`, and stay unless that comes again.
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

    TensorBoard reads the files in the order of their names, which hold the time to the second; within one,
    the numbers of process and writer decide as text, where 10 comes before 9. What the earlier writer wrote
    would hide the later.
    """
    while glob.glob(os.path.join(glob.escape(log_dir), f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.01)
