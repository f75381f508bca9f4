"""Saves a checkpoint every so many iterations."""

import os
from typing import Any

from detlib.checkpoint.checkpointer import Checkpointer

__all__ = ["PeriodicCheckpointer"]


class PeriodicCheckpointer:
    """Saves ``PREFIX_0004999.pth`` and the like, and ``PREFIX_final.pth`` after the last iteration."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ):
        """
        Args:
            checkpointer: what saves.
            period: number of iterations between two files; 0 or less saves the final one only.
            max_iter: number of iterations in the whole training, None if there is no last one.
            max_to_keep: how many files to keep, the oldest being removed; None keeps all. The final file
                does not count.
            file_prefix: how file names begin.

        Raises:
            ValueError: if `max_to_keep` is less than 1.
        """
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep must be None or at least 1, got {max_to_keep}")
        self.checkpointer = checkpointer
        self.period = int(period)
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep
        self.file_prefix = file_prefix
        self.path_manager = checkpointer.path_manager
        self.recent_checkpoints: list[str] = []

    def is_due(self, iteration: int) -> bool:
        """Whether `step` would save anything after `iteration` (counted from 0)."""
        return self._is_periodic(iteration) or self._is_final(iteration)

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Saves if it is time to.

        Args:
            iteration: the iteration that has just been done, in [0, max_iter - 1].
            **kwargs: more entries for the file.
        """
        state = {"iteration": iteration, **kwargs}
        if self._is_periodic(iteration):
            name = f"{self.file_prefix}_{iteration:07d}"
            self._note(f"{name}.pth")
            self.checkpointer.save(name, **state)
            self._remove_old()
        if self._is_final(iteration):
            self.checkpointer.save(f"{self.file_prefix}_final", **state)

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves now, under a name of your own, which is never removed."""
        self.checkpointer.save(name, **kwargs)

    def _is_periodic(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _is_final(self, iteration: int) -> bool:
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def _note(self, newest: str) -> None:
        """Counts a file in before it is saved, so that the state within it knows of it."""
        path = os.path.join(self.checkpointer.save_dir, newest)
        self.recent_checkpoints = [old for old in self.recent_checkpoints if old != path] + [path]

    def _remove_old(self) -> None:
        """Forgets and deletes the oldest file once there are more than `max_to_keep`."""
        if self.max_to_keep is None or not self.checkpointer.save_to_disk:
            return
        while len(self.recent_checkpoints) > self.max_to_keep:
            old = self.recent_checkpoints.pop(0)
            # Only when the newest one is safe on disk.
            self.checkpointer.then(lambda old=old: self._remove(old))

    def _remove(self, path: str) -> None:
        if self.path_manager.exists(path):
            self.path_manager.rm(path)

    def state_dict(self) -> dict[str, Any]:
        """Which files to remove in time, so that a resumed training goes on with it."""
        return {"recent_checkpoints": [os.path.basename(path) for path in self.recent_checkpoints]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.checkpointer.save_dir
        self.recent_checkpoints = [os.path.join(folder, name) for name in state_dict["recent_checkpoints"]]
