"""The last values of one scalar."""

from array import array

import numpy as np
from fvcore.common.history_buffer import HistoryBuffer

__all__ = ["ScalarHistory"]


class ScalarHistory(HistoryBuffer):
    """fvcore's `HistoryBuffer` in 16 bytes a value: its lists of pairs grow by ten times as much, and a
    training puts in some thirty scalars at each of its 90000 steps.
    """

    def __init__(self, max_length: int = 10000) -> None:
        """
        Args:
            max_length: how many of the last values are kept at least; at most there are twice as many.
        """
        super().__init__(max_length)
        del self._data
        self._values = array("d")
        self._iterations = array("q")

    def update(self, value: float, iteration: float | None = None) -> None:
        """Adds a value; without an iteration it belongs to the number of values so far."""
        if len(self._values) >= 2 * self._max_length:
            # Half of it at once, as every removal moves what stays.
            del self._values[: self._max_length], self._iterations[: self._max_length]
        self._values.append(value)
        self._iterations.append(self._count if iteration is None else int(iteration))
        self._count += 1
        self._global_avg += (value - self._global_avg) / self._count

    def latest(self) -> float:
        """The last value."""
        return self._values[-1]

    def median(self, window_size: int) -> float:
        """The median of the last `window_size` values."""
        return float(np.median(self._values[-window_size:]))

    def avg(self, window_size: int) -> float:
        """The mean of the last `window_size` values."""
        return float(np.mean(self._values[-window_size:]))

    def values(self) -> list[tuple[float, int]]:
        """Pairs of value and iteration, oldest first."""
        return list(zip(self._values, self._iterations))

    def count_within(self, window_size: int) -> int:
        """How many values belong to the `window_size` iterations up to the last value's."""
        first = self._iterations[-1] - window_size
        count = 0
        for iteration in reversed(self._iterations):
            if iteration <= first:
                break
            count += 1
        return count
