"""The lifecycle of a distributed process: it joins the group, runs a function, and leaves or fails."""

import datetime
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import rendezvous

from detlib.engine.distributed.environment import ProcessInfo
from detlib.engine.distributed.failures import Failure, FailureBoard, ProcessFailedError, describe_failure
from detlib.engine.distributed.interrupt import StopTraining
from detlib.engine.distributed.watchdog import Watchdog, end_process, find_neighbors, write_error_file
from detlib.utils import comm

__all__ = ["check_gpus", "host_and_port", "run_as_child", "run_here"]

# Seconds to wait for the report of the cause of a lost connection.
_GRACE = 3.0
# Seconds by which the process that failed first ends before the others. Leaving its group takes up to two.
_HEAD_START = 3.0


def host_and_port(url: str) -> tuple[str, int]:
    """Split "tcp://HOST:PORT" into host and port."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ValueError(f"dist_url must be tcp://HOST:PORT, file:///PATH, env:// or auto; got {url!r}")


def check_gpus(needed: int) -> None:
    """Raise a ValueError if this machine has fewer than `needed` GPUs."""
    available = torch.cuda.device_count()
    if needed > available:
        raise ValueError(f"{needed} GPUs were requested, but this machine has {available}")


def run_as_child(
    local_rank: int,
    world_size: int,
    local_size: int,
    machine_rank: int,
    url: str,
    timeout: datetime.timedelta,
    main_func: Callable[..., Any],
    args: tuple,
) -> None:
    """Run the function in a process that `launch` started. The launching process reports failures."""
    rank = machine_rank * local_size + local_rank
    info = ProcessInfo(rank, world_size, local_rank, local_size, url, "launch")
    board = None
    try:
        store = _join_store(info, timeout)
        board = FailureBoard(store, world_size, timeout.total_seconds())
        _Member(info, store, board, timeout).run(main_func, args)
    except BaseException as error:
        if isinstance(error, StopTraining) or (isinstance(error, SystemExit) and not error.code):
            end_process(cast(int, error.code or 0))
        if board is None:
            raise
        try:
            board.report(Failure.from_exception(rank, error))
        except RuntimeError:  # the store belongs to another machine and has ended
            traceback.print_exception(error)
        # A regular exit of Python would wait for processes that are gone.
        end_process(1)


def run_here(
    info: ProcessInfo, timeout: datetime.timedelta, main_func: Callable[..., Any], args: tuple
) -> None:
    """Run the function in this process, which a launcher has started."""
    store = _join_store(info, timeout)
    board = FailureBoard(store, info.world_size, timeout.total_seconds())
    try:
        _Member(info, store, board, timeout).run(main_func, args)
    except BaseException as error:
        if isinstance(error, SystemExit) and board.noted("done", info.rank):
            _let_others_read(info, board)
            raise
        failure = Failure.from_exception(info.rank, error)
        message = _tell_others(info, board, failure)
        _leave_broken_group()
        if failure.kind == "lost":
            if info.launcher == "torchrun":
                # torchrun reports the process that ends first as the root cause.
                time.sleep(_HEAD_START)
            raise ProcessFailedError(message) from None
        raise
    _let_others_read(info, board)


def _tell_others(info: ProcessInfo, board: FailureBoard, failure: Failure) -> str:
    """Report this process's failure, and return a description of the first failure."""
    message = describe_failure([failure], info.world_size, {}, board.timeout)
    try:
        board.report(failure)
        if failure.kind == "lost":
            message = board.wait_for_cause(_GRACE)
        _let_others_read(info, board)
    except RuntimeError:
        message += "\n\nThe process that owns the rendezvous store is gone, see its output."
    write_error_file(message, is_cause=failure.kind != "lost")
    return message


def _leave_broken_group() -> None:
    """Leave the group as `comm.shutdown` does, but without waiting for processes that are gone."""
    thread = threading.Thread(target=comm.shutdown, daemon=True)
    thread.start()
    thread.join(timeout=2)


def _let_others_read(info: ProcessInfo, board: FailureBoard) -> None:
    """Wait for the processes that need the store, if this process owns it."""
    if info.rank != 0 or info.launcher == "torchrun":
        return
    ranks = set(range(info.world_size))
    end = time.monotonic() + board.timeout
    while time.monotonic() < end and ranks - board.finished():
        if board.has_reports():
            end = min(end, time.monotonic() + 2 * _GRACE)
        time.sleep(0.1)


def _join_store(info: ProcessInfo, timeout: datetime.timedelta) -> dist.Store:
    try:
        if info.launcher == "launch" and info.url.startswith("tcp://"):
            host, port = host_and_port(info.url)
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)
        store = next(rendezvous(info.url, info.rank, info.world_size, timeout=timeout))[0]
        if info.launcher == "torchrun":
            store = _agree_on_round(store, info.rank, info.world_size, timeout.total_seconds())
        return store
    except Exception as e:
        raise RuntimeError(
            f"Process {info.rank} of {info.world_size} could not join the rendezvous at {info.url}: {e}"
        ) from e


class _Member:
    """One process of the group: it joins, runs the function and leaves."""

    def __init__(
        self, info: ProcessInfo, store: dist.Store, board: FailureBoard, timeout: datetime.timedelta
    ):
        self._info = info
        self._store = store
        self._board = board
        self._timeout = timeout

    def run(self, main_func: Callable[..., Any], args: tuple) -> None:
        """Join the group, run the function and leave. After a failure the watchdog keeps running."""
        info = self._info
        is_ours = info.launcher == "launch"
        watchdog = Watchdog(
            self._board,
            info.rank,
            watch_peers=not is_ours,
            watch_parent=is_ours or info.launcher == "torchrun",
        )
        watchdog.start()
        self._join()
        watchdog.find_peers()
        try:
            main_func(*args)
        except SystemExit as end:
            if not isinstance(end, StopTraining) and end.code not in (None, 0):
                raise
            self._leave(watchdog)
            raise
        self._leave(watchdog)

    def _leave(self, watchdog: Watchdog) -> None:
        self._board.note("done", self._info.rank)
        watchdog.stop()
        comm.shutdown()

    def _local_rank_and_size(self) -> tuple[int, int]:
        """Return the rank of this process on its machine, and the number of processes there."""
        info = self._info
        if info.local_rank is not None and info.local_size is not None:
            return info.local_rank, info.local_size
        ranks = find_neighbors(self._board, info.rank)
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))) or ranks[0] % len(ranks):
            raise ValueError(
                f"Processes {ranks} are on one machine; the ranks on a machine must be consecutive and all "
                "machines must have the same number of processes (srun --distribution=block)"
            )
        return ranks.index(info.rank), len(ranks)

    def _join(self) -> None:
        """Join the process group."""
        info = self._info
        local_rank, local_size = self._local_rank_and_size()
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            check_gpus(local_size)
            torch.cuda.set_device(local_rank)
            # A collective operation that takes longer than the timeout ends the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        elif "OMP_NUM_THREADS" not in os.environ:
            # Otherwise each process would use all cores.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        comm.set_timeout(self._timeout)
        try:
            dist.init_process_group(
                backend="nccl" if has_gpu else "gloo",
                store=dist.PrefixStore("detlib_group", self._store),
                world_size=info.world_size,
                rank=info.rank,
                timeout=self._timeout,
            )
        except Exception as e:
            missing = sorted(set(range(info.world_size)) - self._board.ranks_with("process"))
            who = f"; missing: {', '.join(map(str, missing))}" if missing else ""
            raise RuntimeError(
                f"Process {info.rank} of {info.world_size} could not join the group at {info.url}{who}"
            ) from e
        comm.create_local_process_group(local_size)
        comm.synchronize()


def _agree_on_round(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return a namespace of the store that only the processes of this start use. All of them must call this.

    torchrun's store survives restarts with its contents, and its restart counter may differ between machines.
    So rank 0 draws a name, every process answers with its own name, and rank 0 confirms these. A process
    that answered to the name of an earlier start is not confirmed, and tries again.

    Args:
        store: the store that all starts share.
        rank: rank of this process.
        world_size: number of processes.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: if some processes do not join; the message of rank 0 names them.
    """
    end = time.monotonic() + timeout
    own = os.urandom(8).hex()
    if rank == 0:
        store.set("detlib_round", own)
        answers = {f"detlib_answer/{own}/{r}": r for r in range(1, world_size)}
        while missing := [r for key, r in answers.items() if not store.check([key])]:
            _pause(end, f"Processes {missing} of {world_size} did not join")
        store.set(f"detlib_confirmed/{own}", json.dumps([store.get(key).decode() for key in answers]))
        return dist.PrefixStore(own, store)
    name = ""
    while True:
        if store.check(["detlib_round"]) and (latest := store.get("detlib_round").decode()) != name:
            name = latest
            store.set(f"detlib_answer/{name}/{rank}", own)
        confirmed = f"detlib_confirmed/{name}"
        if name and store.check([confirmed]) and own in json.loads(store.get(confirmed)):
            return dist.PrefixStore(name, store)
        _pause(end, "Process 0 did not confirm the start")


def _pause(end: float, waiting_for: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{waiting_for} in time (TRAIN.TIMEOUT)")
    time.sleep(0.02)
