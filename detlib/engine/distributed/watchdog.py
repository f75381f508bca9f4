"""The watchdog thread of each process, which ends the process after another one has failed."""

import contextlib
import json
import multiprocessing
import multiprocessing.util
import os
import socket
import sys
import threading
import time
import traceback

from detlib.engine.distributed.failures import Failure, FailureBoard

__all__ = ["Watchdog", "end_process", "find_neighbors", "write_error_file"]

# Seconds between checks, and seconds that a process has to end by itself after another one, or it, has
# failed.
_PERIOD = 0.5
_GRACE = 3.0
_GRACE_OF_FAILED = 15.0


def end_process(exit_code: int) -> None:
    """End this process immediately, after its data-loader workers.

    A regular exit of Python would wait for threads, and for libraries that wait for processes that are gone.
    """
    for child in multiprocessing.active_children():
        child.kill()
    # Otherwise Python warns about leaked semaphores, after the message that should come last.
    _run_finalizers = multiprocessing.util._run_finalizers  # type: ignore[attr-defined]
    cleaning = threading.Thread(target=_run_finalizers, args=(0,), daemon=True)
    cleaning.start()
    cleaning.join(timeout=1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def write_error_file(message: str, *, is_cause: bool) -> None:
    """Write an error message for torchrun, which prints it at the end.

    Args:
        message: the message.
        is_cause: whether this process is the cause of the failure. torchrun reports the earliest error as the
            root cause, and its timestamps are in full seconds, in which multiple processes may end.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    seconds = int(time.time()) + (not is_cause)
    content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(seconds)}}
    with contextlib.suppress(OSError), open(path, "w") as f:
        json.dump({"message": content}, f)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as f:
            # The state follows the name, which is in parentheses. Zombies have ended.
            return f.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return os.name != "posix" or not os.path.isdir("/proc/self")


def _this_system() -> str:
    """Identify the host and its pid namespace, in which process ids are unique."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def find_neighbors(board: FailureBoard, rank: int) -> list[int]:
    """Return the ranks on the same machine as `rank`, itself included. Waits until all have registered.

    Raises:
        RuntimeError: if some do not register in time; the message names them.
    """
    everyone = set(range(board.world_size))
    end = time.monotonic() + board.timeout
    while missing := everyone - board.ranks_with("process"):
        if time.monotonic() > end:
            raise RuntimeError(f"Processes {sorted(missing)} of {board.world_size} did not join in time")
        time.sleep(0.05)
    systems = [str(board.noted("process", r)).partition(" ")[2] for r in range(board.world_size)]
    return [r for r in range(board.world_size) if systems[r] == systems[rank]]


class Watchdog:
    """A thread that monitors the other processes while this one works.

    Twice a second it checks whether any process has reported a failure, whether the processes on this machine
    are alive (a killed process reports nothing), and whether the process that started this one is alive
    (otherwise nothing would end this one). After a failure, this process has a few seconds to end by itself;
    then the watchdog ends it, whatever it is doing.
    """

    def __init__(self, board: FailureBoard, rank: int, *, watch_peers: bool, watch_parent: bool):
        """
        Args:
            board: the board on which failures are reported.
            rank: rank of this process.
            watch_peers: monitor the other processes on this machine. Not needed if the process that started
                them does so.
            watch_parent: end this process if the process that started it is gone.
        """
        self._board = board.clone()
        self._rank = rank
        self._watch_peers = watch_peers
        self._watch_parent = watch_parent
        self._parent = os.getppid()
        self._peers: dict[int, int] = {}
        self._stop = threading.Event()
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="detlib-watchdog", daemon=True)

    def start(self) -> None:
        """Register this process and start the thread."""
        self._board.note("process", self._rank, f"{os.getpid()} {_this_system()}")
        self._thread.start()

    def find_peers(self) -> None:
        """Find the processes on this machine. Waits until all processes have started their watchdogs."""
        if self._watch_peers:
            for rank in find_neighbors(self._board, self._rank):
                if rank != self._rank:
                    self._peers[rank] = int(str(self._board.noted("process", rank)).split()[0])

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        failed_checks = 0
        while not self._stop.wait(_PERIOD):
            if self._watch_parent and not self._has_parent():
                self._end("Its parent process is gone")
            try:
                self._report_missing_peers()
                failed = self._board.has_reports()
                failed_checks = 0
            except RuntimeError:
                # Another process owns the store, and ends soon after a failure of its own.
                failed_checks += 1
                if failed_checks * _PERIOD >= _GRACE:
                    self._end("The process that owns the rendezvous store is gone, see its output")
                continue
            if failed:
                self._follow()

    def _has_parent(self) -> bool:
        parent = multiprocessing.parent_process()
        return os.getppid() == self._parent if parent is None else parent.is_alive()

    def _report_missing_peers(self) -> None:
        for rank, pid in self._peers.items():
            if _is_alive(pid) or self._board.noted("done", rank) or self._board.noted("failure", rank):
                continue
            self._board.report(Failure.from_exit(rank, pid, None))

    def _follow(self) -> None:
        """End this process after another one's failure, unless it ends by itself."""
        grace = _GRACE_OF_FAILED
        if self._board.noted("failure", self._rank) is None:
            grace = _GRACE
            frame = sys._current_frames().get(self._main_thread)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            self._board.note("stack", self._rank, stack.rstrip())
        if self._stop.wait(grace):
            return
        message = self._board.wait_for_cause(_GRACE)
        self._board.note("ended", self._rank)
        self._end(message)

    def _end(self, message: str) -> None:
        write_error_file(message, is_cause=False)
        first_line = message.partition("\n")[0]
        print(f"Ending process {self._rank}. {first_line}", file=sys.stderr, flush=True)
        end_process(1)
