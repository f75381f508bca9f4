"""How the processes of a training tell each other why one of them failed.

A process that fails leaves a report in the store that all share. The others read there why their peer is
gone, where they would otherwise see a broken connection, or nothing for half an hour. A broken connection is
itself reported as such, so that it never hides its cause.
"""

import json
import signal
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

__all__ = ["Failure", "FailureBoard", "ProcessFailedError", "describe_failure", "is_communication_error"]

_MEMORY_HINT = (
    "Most often that is the system's answer to memory running out (`dmesg` or the job's log tells). Fewer "
    "DATALOADER.NUM_WORKERS, fewer or smaller pictures in a batch need less of it."
)
_SIGNAL_HINTS = {
    "SIGKILL": _MEMORY_HINT,
    "SIGABRT": "A library gave up, see above; NCCL does so when an operation took longer than TRAIN.TIMEOUT.",
    "SIGBUS": "Shared memory ran out, probably: see `df -h /dev/shm`, and use fewer DATALOADER.NUM_WORKERS.",
    "SIGSEGV": "Compiled code failed; PYTHONFAULTHANDLER=1 shows where.",
}

# What communication says when a peer is gone or does not come. Errors of the store and of NCCL have types.
_COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "monitoredbarrier")


class ProcessFailedError(RuntimeError):
    """One of the processes of a training failed; the message tells which, how, and where in its code."""


@dataclass(frozen=True)
class Failure:
    """What is known of the failure of one process.

    Attributes:
        rank: its rank.
        kind: "error": it raised an exception; "gone": it ended without a word; "lost": an operation with
            the others failed, which has its cause elsewhere, or took too long.
        title: the exception's type and message, or how the process ended.
        details: the traceback, or "".
        order: the first failure has the lowest.
    """

    rank: int
    kind: str
    title: str
    details: str = ""
    order: int = 0

    @classmethod
    def from_exception(cls, rank: int, error: BaseException) -> "Failure":
        title = "".join(traceback.format_exception_only(error)).strip()
        kind = "lost" if is_communication_error(error) else "error"
        return cls(rank, kind, title, "".join(traceback.format_exception(error)).strip())

    @classmethod
    def from_exit(cls, rank: int, pid: int, exit_code: int | None) -> "Failure":
        """
        Args:
            rank: the process's rank.
            pid: its number in the system.
            exit_code: as `subprocess` has it, negative for signals; None if it is not known.
        """
        who = f"pid {pid} on {socket.gethostname()}"
        if exit_code is None:
            return cls(rank, "gone", f"is gone without a word ({who}). If it was killed: {_MEMORY_HINT}")
        if exit_code >= 0:
            return cls(rank, "gone", f"ended with exit code {exit_code} and without a word ({who}).")
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = "unknown"
        hint = _SIGNAL_HINTS.get(name, "")
        return cls(rank, "gone", f"was ended by signal {-exit_code} ({name}; {who}). {hint}".strip())


def is_communication_error(error: BaseException) -> bool:
    """Whether an error comes from an operation between processes, so that its cause is likely another's."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _COMMUNICATION_WORDS)


def describe_failure(
    failures: Sequence[Failure], world_size: int, places: Mapping[int, str], timeout: float
) -> str:
    """What a person should read: the failure that caused the others, with its traceback.

    Args:
        failures: all that were reported, at least one.
        world_size: number of processes.
        places: where processes that did not fail were at that time, as tracebacks.
        timeout: seconds after which an operation is given up.
    """
    causes = sorted((f for f in failures if f.kind != "lost"), key=lambda f: f.order)
    if causes:
        cause = causes[0]
        if cause.kind == "gone":
            return f"Process {cause.rank} of {world_size} {cause.title}"
        text = f"Process {cause.rank} of {world_size} failed with {cause.title}"
        return f"{text}\n\n{cause.details}" if cause.details else text
    first = min(failures, key=lambda f: f.rank)
    missing = sorted(set(range(world_size)) - {f.rank for f in failures})
    waiting = _listed([f.rank for f in failures])
    if missing:
        text = (
            f"{waiting} of {world_size} waited in vain for {_listed(missing).lower()}; an operation is given "
            f"up after {timeout:g} s (TRAIN.TIMEOUT)."
        )
    else:
        text = f"{waiting} of {world_size} lost the connection to each other."
    parts = [text, f"Process {first.rank} was at:\n\n{first.details or first.title}"]
    parts += [f"Process {r} was at:\n\n{places[r]}" for r in missing if r in places]
    return "\n\n".join(parts)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(r) for r in sorted(ranks)[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"Process {shown}" if len(ranks) == 1 else f"Processes {shown}"


class FailureBoard:
    """The reports of all processes, in a store. Each thread needs a board of its own."""

    def __init__(self, store: dist.Store, world_size: int, timeout: float):
        """
        Args:
            store: what all processes share; it is cloned, so that a wait in it holds up nobody.
            world_size: number of processes.
            timeout: seconds after which an operation between processes is given up, for messages.
        """
        self._source = store
        self._store = dist.PrefixStore("detlib", store.clone())
        self.world_size = world_size
        self.timeout = timeout

    def clone(self) -> "FailureBoard":
        """A board for another thread."""
        return FailureBoard(self._source, self.world_size, self.timeout)

    def note(self, name: str, rank: int, value: str = "yes") -> None:
        """Notes something about a process: "process", "place", "done" or "ended"."""
        self._store.set(f"{name}/{rank}", value)

    def noted(self, name: str, rank: int) -> str | None:
        """What was noted about a process, without waiting for it."""
        key = f"{name}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def ranks_with(self, name: str) -> set[int]:
        """The processes about which something was noted."""
        return {rank for rank in range(self.world_size) if self._store.check([f"{name}/{rank}"])}

    def report(self, failure: Failure) -> None:
        """Leaves a report. The first one about a process stays."""
        content = asdict(failure)
        content["order"] = self._store.add("order", 1)
        self._store.compare_set(f"failure/{failure.rank}", "", json.dumps(content))
        self._store.add("reports", 1)

    def has_reports(self) -> bool:
        """Whether any process has failed: one short question to the store."""
        return self._store.add("reports", 0) > 0

    def failures(self) -> list[Failure]:
        """All reports, by rank."""
        texts = (self.noted("failure", rank) for rank in range(self.world_size))
        return [Failure(**json.loads(text)) for text in texts if text]

    def finished(self) -> set[int]:
        """The processes that are through, have failed, or were ended because of another."""
        ranks = (self.ranks_with(name) for name in ("done", "failure", "ended"))
        return set().union(*ranks)

    def wait_for_cause(self, seconds: float) -> str:
        """Waits, once there is a report, until the cause is known, and describes it.

        The cause of a lost connection may be reported after it. Where all are lost or waiting, those who do
        not wait are asked where they are.
        """
        end = time.monotonic() + seconds
        while True:
            failures = self.failures()
            known = any(f.kind != "lost" for f in failures)
            lost = {f.rank for f in failures}
            asked_all = lost | self.ranks_with("place") == set(range(self.world_size))
            if known or time.monotonic() > end or (asked_all and time.monotonic() > end - seconds / 2):
                places = {r: self.noted("place", r) or "" for r in self.ranks_with("place")}
                return describe_failure(failures, self.world_size, places, self.timeout)
            time.sleep(0.05)
