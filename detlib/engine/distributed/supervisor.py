"""What the process that starts others does: it waits for them, hands signals on, and tells how they ended."""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, cast

from detlib.engine.distributed.failures import Failure, FailureBoard, ProcessFailedError, describe_failure
from detlib.engine.distributed.interrupt import StopTraining

__all__ = ["Supervisor"]

# Seconds that the other processes have to end after a failure, before they are killed.
_GRACE = 10.0
# A forked process could use no GPU.
_START_METHOD = "spawn"
_STOP_CODES = {128 + signum: signum for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}


class Supervisor:
    """Starts processes on this machine and leaves none behind."""

    def __init__(self, board: FailureBoard, first_rank: int, is_last_to_leave: bool):
        """
        Args:
            board: where processes report failures.
            first_rank: rank of the first process on this machine.
            is_last_to_leave: wait at the end until the processes of other machines are done too, because
                the store ends with this process.
        """
        self._board = board
        self._first_rank = first_rank
        self._is_last_to_leave = is_last_to_leave
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}
        self._failures: list[Failure] = []
        self._places: dict[int, str] = {}
        self._signal = 0

    def run(self, target: Callable[..., Any], count: int, args: tuple) -> None:
        """Runs ``target(local_rank, *args)`` in `count` processes until all have ended.

        Raises:
            ProcessFailedError: if one fails; it describes the first failure of all.
            StopTraining: if they stopped because they were asked to.
            KeyboardInterrupt: on Ctrl-C before they had begun to train, or pressed twice.
        """
        context = multiprocessing.get_context(_START_METHOD)
        with self._hand_on_signals():
            try:
                for i in range(count):
                    # No daemons: these may not have children, which the data loaders need.
                    process = context.Process(target=target, args=(i, *args), daemon=False)  # type: ignore[attr-defined]
                    process.start()
                    self._processes[self._first_rank + i] = process
                self._wait()
                self._wait_for_machines()
            finally:
                for process in self._processes.values():
                    if process.is_alive():
                        process.kill()
                    process.join()
        self._tell()

    @contextlib.contextmanager
    def _hand_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(signum: int, frame) -> None:
            if self._signal == signum == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = self._signal or signum
            # Ctrl-C has reached them by itself; as SIGTERM it does not count as their second one.
            for process in self._processes.values():
                process.terminate()

        previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _wait(self) -> None:
        """Waits for all processes; once one has failed, the others have some seconds."""
        running = dict(self._processes)
        deadline = None
        while running:
            connection.wait([process.sentinel for process in running.values()], timeout=0.5)
            for rank, process in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[rank]
                self._note_end(rank, process)
            self._read_board()
            if deadline is None and self._failures:
                deadline = time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() > deadline:
                return

    def _note_end(self, rank: int, process: multiprocessing.process.BaseProcess) -> None:
        if process.exitcode == 0 or process.exitcode in _STOP_CODES:
            self._signal = self._signal or _STOP_CODES.get(process.exitcode, 0)
        elif self._signal and process.exitcode in (-signal.SIGTERM, -signal.SIGINT):
            pass  # it was told to, and had not begun to train
        else:
            failure = Failure.from_exit(rank, cast(int, process.pid), process.exitcode)
            try:
                if not self._board.noted("failure", rank) and not self._board.noted("ended", rank):
                    self._board.report(failure)
            except RuntimeError:  # the store is another machine's, and has ended
                self._failures = self._failures or [failure]

    def _read_board(self) -> None:
        # The store may be another machine's, and end before this one looks again.
        with contextlib.suppress(RuntimeError):
            if self._board.has_reports():
                self._failures = self._board.failures()
                self._places = {
                    rank: self._board.noted("place", rank) or "" for rank in self._board.ranks_with("place")
                }

    def _wait_for_machines(self) -> None:
        if not self._is_last_to_leave:
            return
        end = time.monotonic() + (_GRACE if self._failures or self._signal else self._board.timeout)
        everyone = set(range(self._board.world_size))
        while time.monotonic() < end:
            if self._board.has_reports():
                end = min(end, time.monotonic() + _GRACE)
            if everyone == self._board.finished():
                break
            time.sleep(0.1)
        self._read_board()

    def _tell(self) -> None:
        # Who was stopped before it trained leaves broken connections behind.
        own = [f for f in self._failures if f.kind != "lost" and not f.title.startswith("KeyboardInterrupt")]
        if self._signal and not own:
            raise StopTraining(self._signal)
        if self._failures:
            raise ProcessFailedError(
                describe_failure(self._failures, self._board.world_size, self._places, self._board.timeout)
            )
