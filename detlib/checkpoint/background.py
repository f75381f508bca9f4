"""Writing of checkpoints in the background, while training continues."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["BackgroundWriter", "copy_to_host"]


class BackgroundWriter:
    """A thread that runs tasks one after the other.

    If a task fails, the next `submit` or `wait` raises its error, and tasks that are already queued are
    dropped. So whatever was to follow a failed save, such as the removal of an older file, does not happen. A
    program that exits normally finishes the tasks first.
    """

    def __init__(self, max_pending: int = 2):
        """
        Args:
            max_pending: maximum number of tasks that wait while another one runs. `submit` blocks if
                there are more, so that a slow disk slows the program down instead of filling its memory.

        Raises:
            ValueError: if `max_pending` is less than 1.
        """
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending}")
        self._max_pending = max_pending
        self._pending: deque[Future] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._failed = False

    def submit(self, task: Callable[[], None]) -> None:
        """Queue `task` to run after the tasks before it.

        Raises:
            Exception: the error of an earlier task.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) > self._max_pending):
            self._finish_oldest()
        self._pending.append(self._executor.submit(self._run, task))

    def wait(self) -> None:
        """Wait until all tasks are done.

        Raises:
            Exception: the error of a task. The tasks after it are dropped.
        """
        while self._pending:
            self._finish_oldest()

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise

    def _finish_oldest(self) -> None:
        try:
            self._pending.popleft().result()
        except BaseException:
            for later in self._pending:
                later.cancel()
            while self._pending:
                later = self._pending.popleft()
                if not later.cancelled():
                    later.exception()
            self._failed = False
            raise


def copy_to_host(value: Any) -> Any:
    """Copy a tree of containers and its tensors to main memory, where training cannot change them.

    Tensors that share memory also share it in the copy.
    """
    return _copy(value, {})


def _copy(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.cpu() if storage.device.type != "cpu" else storage.clone()
        empty = torch.empty(0, dtype=value.dtype)
        return empty.set_(storages[storage._cdata], value.storage_offset(), value.shape, value.stride())
    if isinstance(value, Mapping):
        # State dicts have the versions of their modules in the attribute _metadata.
        copy: Any = type(value)() if hasattr(value, "_metadata") else {}
        copy.update((key, _copy(item, storages)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            copy._metadata = value._metadata
        return copy
    if isinstance(value, list | tuple):
        return type(value)(_copy(item, storages) for item in value)
    return value
