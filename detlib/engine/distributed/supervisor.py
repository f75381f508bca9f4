"""The supervisor in the launching process, which waits for its children and reports failures."""

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

# Seconds that the other processes have to end after a failure before they are killed.
_GRACE = 10.0
# Forked processes cannot use CUDA.
_START_METHOD = "spawn"
_STOP_CODES = {128 + signum: signum for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}


class Supervisor:
    """A supervisor that starts processes on this machine, waits for them and leaves none behind."""

    def __init__(self, board: FailureBoard, first_rank: int, is_last_to_leave: bool):
        """
        Args:
            board: the board on which processes report failures.
            first_rank: rank of the first process on this machine.
            is_last_to_leave: whether to wait at the end for the processes of other machines too, because the
                store ends with this process.
        """
        self._board = board
        self._first_rank = first_rank
        self._is_last_to_leave = is_last_to_leave
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}
        self._failures: list[Failure] = []
        self._stacks: dict[int, str] = {}
        self._signal = 0

    def run(self, target: Callable[..., Any], count: int, args: tuple) -> None:
        """Run ``target(local_rank, *args)`` in `count` processes until all have ended.

        Raises:
            ProcessFailedError: if a process fails; the message describes the first failure.
            StopTraining: if they stopped on request.
            KeyboardInterrupt: on a Ctrl-C before training began, or on a second one.
        """
        context = multiprocessing.get_context(_START_METHOD)
        with self._forward_signals():
            try:
                for i in range(count):
                    # Not daemons, because daemons cannot have children, which data loaders start.
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
        self._raise_outcome()

    @contextlib.contextmanager
    def _forward_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(signum: int, frame) -> None:
            if self._signal == signum == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = self._signal or signum
            # The terminal sends Ctrl-C to the processes as well; SIGTERM does not count as a second one.
            for process in self._processes.values():
                process.terminate()

        previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _wait(self) -> None:
        """Wait for all processes; once one has failed, the others have a few seconds to end."""
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
            pass  # asked to stop before training began
        else:
            failure = Failure.from_exit(rank, cast(int, process.pid), process.exitcode)
            try:
                if not self._board.noted("failure", rank) and not self._board.noted("ended", rank):
                    self._board.report(failure)
            except RuntimeError:  # the store belongs to another machine and has ended
                self._failures = self._failures or [failure]

    def _read_board(self) -> None:
        # The store may belong to another machine, and end at any time.
        with contextlib.suppress(RuntimeError):
            if self._board.has_reports():
                self._failures = self._board.failures()
                self._stacks = {
                    rank: self._board.noted("stack", rank) or "" for rank in self._board.ranks_with("stack")
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

    def _raise_outcome(self) -> None:
        # A process that was stopped before training leaves broken connections behind.
        own = [f for f in self._failures if f.kind != "lost" and not f.title.startswith("KeyboardInterrupt")]
        if self._signal and not own:
            raise StopTraining(self._signal)
        if self._failures:
            raise ProcessFailedError(
                describe_failure(self._failures, self._board.world_size, self._stacks, self._board.timeout)
            )
