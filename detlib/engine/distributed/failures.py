"""Failure reports that the processes of a training run share.

A process that fails writes a report to a store that all processes share. There the others read why their peer
is gone, instead of seeing only a broken connection, or nothing until the timeout. A broken connection is
reported as a consequence, so that it never hides its cause.
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
    "The usual cause is that the system ran out of memory (check `dmesg` or the job's log). Fewer "
    "DATALOADER.NUM_WORKERS, and fewer or smaller images per batch, need less memory."
)
_SIGNAL_HINTS = {
    "SIGKILL": _MEMORY_HINT,
    "SIGABRT": "A library aborted, see above; NCCL does so if an operation takes longer than TRAIN.TIMEOUT.",
    "SIGBUS": "Probably out of shared memory: check `df -h /dev/shm`, and use fewer DATALOADER.NUM_WORKERS.",
    "SIGSEGV": "Compiled code crashed; PYTHONFAULTHANDLER=1 shows where.",
}

# Words in errors of communication whose peer is gone or late. Errors of the store and of NCCL have types.
_COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "monitoredbarrier")


class ProcessFailedError(RuntimeError):
    """A process of a distributed training run failed; the message has its rank and traceback."""


@dataclass(frozen=True)
class Failure:
    """The failure of one process.

    Attributes:
        rank: rank of the process.
        kind: "error": it raised an exception; "gone": it ended without a report; "lost": a collective
            operation failed because of another process, or timed out.
        title: the exception's type and message, or how the process ended.
        details: the traceback, or "".
        order: increasing in the order of the reports.
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
            rank: rank of the process.
            pid: its process id.
            exit_code: as in `subprocess`, negative for signals; None if unknown.
        """
        who = f"pid {pid} on {socket.gethostname()}"
        if exit_code is None:
            return cls(
                rank, "gone", f"disappeared without an error ({who}). If it was killed: {_MEMORY_HINT}"
            )
        if exit_code >= 0:
            return cls(rank, "gone", f"exited with code {exit_code} without an error ({who}).")
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = "unknown"
        hint = _SIGNAL_HINTS.get(name, "")
        return cls(rank, "gone", f"was killed by signal {-exit_code} ({name}; {who}). {hint}".strip())


def is_communication_error(error: BaseException) -> bool:
    """Return whether an error comes from communication, so that another process is its likely cause."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _COMMUNICATION_WORDS)


def describe_failure(
    failures: Sequence[Failure], world_size: int, stacks: Mapping[int, str], timeout: float
) -> str:
    """Describe the failure that caused the others, with its traceback.

    Args:
        failures: all reported failures, at least one.
        world_size: number of processes.
        stacks: stack traces of processes that did not fail, by rank.
        timeout: seconds after which a collective operation times out.
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
            f"{waiting} of {world_size} timed out waiting for {_listed(missing).lower()} after {timeout:g} s "
            "(TRAIN.TIMEOUT)."
        )
    else:
        text = f"{waiting} of {world_size} lost the connection to each other."
    parts = [text, f"Process {first.rank} was at:\n\n{first.details or first.title}"]
    parts += [f"Process {r} was at:\n\n{stacks[r]}" for r in missing if r in stacks]
    return "\n\n".join(parts)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(r) for r in sorted(ranks)[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"Process {shown}" if len(ranks) == 1 else f"Processes {shown}"


class FailureBoard:
    """The failure reports of all processes, in a shared store. Each thread needs its own board."""

    def __init__(self, store: dist.Store, world_size: int, timeout: float):
        """
        Args:
            store: the store that all processes share; it is cloned, so that waiting on it does not block
                others.
            world_size: number of processes.
            timeout: seconds after which a collective operation times out, for messages.
        """
        self._source = store
        self._store = dist.PrefixStore("detlib", store.clone())
        self.world_size = world_size
        self.timeout = timeout

    def clone(self) -> "FailureBoard":
        """Return a board for another thread."""
        return FailureBoard(self._source, self.world_size, self.timeout)

    def note(self, name: str, rank: int, value: str = "yes") -> None:
        """Record something about a process: "process", "stack", "done" or "ended"."""
        self._store.set(f"{name}/{rank}", value)

    def noted(self, name: str, rank: int) -> str | None:
        """Return what was recorded about a process, without waiting; None if nothing was."""
        key = f"{name}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def ranks_with(self, name: str) -> set[int]:
        """Return the ranks for which `name` was recorded."""
        return {rank for rank in range(self.world_size) if self._store.check([f"{name}/{rank}"])}

    def report(self, failure: Failure) -> None:
        """Report a failure. Later reports about the same process are ignored."""
        content = asdict(failure)
        content["order"] = self._store.add("order", 1)
        self._store.compare_set(f"failure/{failure.rank}", "", json.dumps(content))
        self._store.add("reports", 1)

    def has_reports(self) -> bool:
        """Return whether any process has failed; one short request to the store."""
        return self._store.add("reports", 0) > 0

    def failures(self) -> list[Failure]:
        """Return all reports, by rank."""
        texts = (self.noted("failure", rank) for rank in range(self.world_size))
        return [Failure(**json.loads(text)) for text in texts if text]

    def finished(self) -> set[int]:
        """Return the ranks that have finished, have failed, or were ended because of another."""
        ranks = (self.ranks_with(name) for name in ("done", "failure", "ended"))
        return set().union(*ranks)

    def wait_for_cause(self, seconds: float) -> str:
        """Wait until the cause of the reported failures is known, and describe it.

        The cause of a lost connection may be reported after the loss. If no process reports a cause, the
        stack traces of those that did not fail are included.

        Args:
            seconds: how long to wait at most.
        """
        end = time.monotonic() + seconds
        while True:
            failures = self.failures()
            known = any(f.kind != "lost" for f in failures)
            lost = {f.rank for f in failures}
            asked_all = lost | self.ranks_with("stack") == set(range(self.world_size))
            if known or time.monotonic() > end or (asked_all and time.monotonic() > end - seconds / 2):
                stacks = {r: self.noted("stack", r) or "" for r in self.ranks_with("stack")}
                return describe_failure(failures, self.world_size, stacks, self.timeout)
            time.sleep(0.05)
