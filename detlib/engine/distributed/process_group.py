"""What a process does that is one of several: it joins the others, works, and leaves, or tells why not."""

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

from detlib.engine.distributed.environment import ProcessPlace
from detlib.engine.distributed.failures import Failure, FailureBoard, ProcessFailedError, describe_failure
from detlib.engine.distributed.interrupt import StopTraining
from detlib.engine.distributed.watchdog import Watchdog, end_process, find_neighbours, write_error_file
from detlib.utils import comm

__all__ = ["check_gpus", "host_and_port", "run_as_child", "run_here"]

# Seconds for the cause of a lost connection to be reported.
_GRACE = 3.0
# Seconds by which the process that is the cause ends before the others; leaving its group takes up to two.
_HEAD_START = 3.0


def host_and_port(url: str) -> tuple[str, int]:
    """Takes "tcp://HOST:PORT" apart."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ValueError(f"dist_url is {url!r}; legal are tcp://HOST:PORT, file:///PATH, env:// and auto")


def check_gpus(needed: int) -> None:
    """Raises a ValueError if this machine has fewer GPUs."""
    there = torch.cuda.device_count()
    if needed > there:
        raise ValueError(f"{needed} GPUs were asked for, but this machine has {there}")


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
    """What a started process does. The one that has started it tells people about failures."""
    rank = machine_rank * local_size + local_rank
    place = ProcessPlace(rank, world_size, local_rank, local_size, url, "launch")
    board = None
    try:
        store = _join_store(place, timeout)
        board = FailureBoard(store, world_size, timeout.total_seconds())
        _Member(place, store, board, timeout).run(main_func, args)
    except BaseException as error:
        if isinstance(error, StopTraining) or (isinstance(error, SystemExit) and not error.code):
            end_process(cast(int, error.code or 0))
        if board is None:
            raise
        try:
            board.report(Failure.from_exception(rank, error))
        except RuntimeError:  # the store is another machine's, and has ended
            traceback.print_exception(error)
        # Past Python's own way out, which would wait for processes that are no more.
        end_process(1)


def run_here(
    place: ProcessPlace, timeout: datetime.timedelta, main_func: Callable[..., Any], args: tuple
) -> None:
    """Runs the function in this process, which a launcher has started."""
    store = _join_store(place, timeout)
    board = FailureBoard(store, place.world_size, timeout.total_seconds())
    try:
        _Member(place, store, board, timeout).run(main_func, args)
    except BaseException as error:
        if isinstance(error, SystemExit) and board.noted("done", place.rank):
            _let_others_read(place, board)
            raise
        failure = Failure.from_exception(place.rank, error)
        message = _tell_others(place, board, failure)
        _leave_broken_group()
        if failure.kind == "lost":
            if place.launcher == "torchrun":
                # It shows the process that ends first as the root cause.
                time.sleep(_HEAD_START)
            raise ProcessFailedError(message) from None
        raise
    _let_others_read(place, board)


def _tell_others(place: ProcessPlace, board: FailureBoard, failure: Failure) -> str:
    """Reports this process's failure, and returns what was the cause of all."""
    message = describe_failure([failure], place.world_size, {}, board.timeout)
    try:
        board.report(failure)
        if failure.kind == "lost":
            message = board.wait_for_cause(_GRACE)
        _let_others_read(place, board)
    except RuntimeError:
        message += "\n\nThe process that kept the meeting point of all is gone, see its output."
    write_error_file(message, is_cause=failure.kind != "lost")
    return message


def _leave_broken_group() -> None:
    """Leaves the group as `comm.shutdown` does, but without waiting for those who are gone."""
    thread = threading.Thread(target=comm.shutdown, daemon=True)
    thread.start()
    thread.join(timeout=2)


def _let_others_read(place: ProcessPlace, board: FailureBoard) -> None:
    """Waits for those who need the store, if it ends with this process."""
    if place.rank != 0 or place.launcher == "torchrun":
        return
    ranks = set(range(place.world_size))
    end = time.monotonic() + board.timeout
    while time.monotonic() < end and ranks - board.finished():
        if board.has_reports():
            end = min(end, time.monotonic() + 2 * _GRACE)
        time.sleep(0.1)


def _join_store(place: ProcessPlace, timeout: datetime.timedelta) -> dist.Store:
    try:
        if place.launcher == "launch" and place.url.startswith("tcp://"):
            host, port = host_and_port(place.url)
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)
        store = next(rendezvous(place.url, place.rank, place.world_size, timeout=timeout))[0]
        if place.launcher == "torchrun":
            store = _agree_on_round(store, place.rank, place.world_size, timeout.total_seconds())
        return store
    except Exception as e:
        raise RuntimeError(
            f"Process {place.rank} of {place.world_size} could not join the others at {place.url}: {e}"
        ) from e


class _Member:
    """One process of several: it joins the others, works, and leaves."""

    def __init__(
        self, place: ProcessPlace, store: dist.Store, board: FailureBoard, timeout: datetime.timedelta
    ):
        self._place = place
        self._store = store
        self._board = board
        self._timeout = timeout

    def run(self, main_func: Callable[..., Any], args: tuple) -> None:
        """Runs the function among the others. After a failure the watch goes on: it ends what hangs."""
        place = self._place
        is_ours = place.launcher == "launch"
        watchdog = Watchdog(
            self._board,
            place.rank,
            watch_peers=not is_ours,
            watch_parent=is_ours or place.launcher == "torchrun",
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
        self._board.note("done", self._place.rank)
        watchdog.stop()
        comm.shutdown()

    def _local_place(self) -> tuple[int, int]:
        """Number of this process on its machine, and how many there are."""
        place = self._place
        if place.local_rank is not None and place.local_size is not None:
            return place.local_rank, place.local_size
        ranks = find_neighbours(self._board, place.rank)
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))) or ranks[0] % len(ranks):
            raise ValueError(
                f"Processes {ranks} are on one machine; their ranks must follow each other and every machine "
                "must have as many (srun --distribution=block)"
            )
        return ranks.index(place.rank), len(ranks)

    def _join(self) -> None:
        """Joins the process group."""
        place = self._place
        local_rank, local_size = self._local_place()
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            check_gpus(local_size)
            torch.cuda.set_device(local_rank)
            # An operation that takes longer than the timeout then ends the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        elif "OMP_NUM_THREADS" not in os.environ:
            # Each process would otherwise use every core, and they would get in each other's way.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        comm.set_timeout(self._timeout)
        try:
            dist.init_process_group(
                backend="nccl" if has_gpu else "gloo",
                store=dist.PrefixStore("detlib_group", self._store),
                world_size=place.world_size,
                rank=place.rank,
                timeout=self._timeout,
            )
        except Exception as e:
            missing = sorted(set(range(place.world_size)) - self._board.ranks_with("process"))
            who = f"; not there: {', '.join(map(str, missing))}" if missing else ""
            raise RuntimeError(
                f"Process {place.rank} of {place.world_size} could not join the others at {place.url}{who}"
            ) from e
        comm.create_local_process_group(local_size)
        comm.synchronize()


def _agree_on_round(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Returns a part of the store that only the processes of this start use. All of them call it.

    torchrun's store outlives restarts, with all that was written into it, and its counter of restarts may
    differ between machines. So rank 0 draws a name, every process answers with one of its own, and rank 0
    confirms these. Who has answered to the name of an earlier start is not confirmed, and asks again.

    Args:
        store: the store that all starts share.
        rank: of this process.
        world_size: number of processes.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: if some do not come, naming them in rank 0.
    """
    end = time.monotonic() + timeout
    own = os.urandom(8).hex()
    if rank == 0:
        store.set("detlib_round", own)
        answers = {f"detlib_answer/{own}/{r}": r for r in range(1, world_size)}
        while missing := [r for key, r in answers.items() if not store.check([key])]:
            _pause(end, f"processes {missing} of {world_size} have not come")
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
        _pause(end, "process 0 has not confirmed that all have come")


def _pause(end: float, waiting_for: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{waiting_for} in time (TRAIN.TIMEOUT)")
    time.sleep(0.02)
