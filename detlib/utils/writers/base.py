"""The base of the writers, and what several of them share."""

from collections import defaultdict

from detlib.utils._event_storage import EventStorage, get_event_storage

__all__ = ["EventWriter", "NewScalars"]


class EventWriter:
    """Base of the writers, which read the storage in use and put it out."""

    def write(self) -> None:
        """Puts out what is new in `get_event_storage()`."""
        raise NotImplementedError

    def close(self) -> None:
        """Finishes the output; nothing is written after it."""

    def start(self) -> None:
        """Called before the first step of the training, with the storage in use."""

    def step(self) -> None:
        """Called after every step of the training, for what is shown between two calls of `write`."""

    def finish(self) -> None:
        """Called at the end of a training, well or badly ended: a last `write`, and `close`."""
        try:
            # Hooks such as the evaluation have put in more since the last step.
            self.write()
        finally:
            self.close()


class NewScalars:
    """Takes from the storage what was put in since the last time, as one record for each iteration."""

    def __init__(self, window_size: int) -> None:
        """
        Args:
            window_size: iterations of the median, for scalars with `smoothing_hint`.
        """
        self._window_size = window_size
        self._last_iteration = -1

    def take(self, storage: EventStorage | None = None) -> list[dict[str, float]]:
        """Returns dicts with "iteration" and the scalars of that iteration, by rising iteration.

        Args:
            storage: default the one in use.
        """
        storage = get_event_storage() if storage is None else storage
        by_iteration: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_iteration:
                by_iteration[iteration][name] = value
        if by_iteration:
            self._last_iteration = max(by_iteration)
        return [{**by_iteration[iteration], "iteration": iteration} for iteration in sorted(by_iteration)]
