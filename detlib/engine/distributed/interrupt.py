"""Stopping a training from outside: SIGTERM and Ctrl-C end it after the step under way, with a checkpoint."""

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator

from detlib.utils import comm

__all__ = ["StopTraining", "listen_for_stop", "request_stop", "stop_requested"]

logger = logging.getLogger(__name__)

_requested = 0
# The process that listens. Workers of its data loaders are forked from it, handlers and all.
_listener = 0


class StopTraining(SystemExit):
    """Ends a training that was asked to stop. If nobody catches it, the process ends with `code`.

    It is no error, hence no Exception: what logs and handles failures lets it pass.

    Attributes:
        signum: the signal that asked for it.
        code: 128 plus the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


def request_stop(signum: int = signal.SIGTERM) -> None:
    """Asks the training in this process, and by that in all, to stop after the step under way.

    Args:
        signum: the signal that it is reported as.
    """
    global _requested
    _requested = _requested or int(signum)


def stop_requested() -> int:
    """Whether any process was asked to stop. All processes must call this together, and get one answer.

    It costs one small exchange over gloo if there are several processes.

    Returns:
        The number of the signal, or 0.
    """
    return comm.agree_on_max(_requested)


def _on_signal(signum: int, frame) -> None:
    if os.getpid() != _listener:
        # A worker, whose batches are needed to the end. Terminals and Slurm signal it along.
        return
    if _requested and signum == signal.SIGINT:
        # The second Ctrl-C is of somebody who will not wait.
        raise KeyboardInterrupt
    again = " Ctrl-C again ends it at once." if signum == signal.SIGINT else ""
    logger.warning("Got %s: stopping after this step.%s", signal.Signals(signum).name, again)
    request_stop(signum)


@contextlib.contextmanager
def listen_for_stop(signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> Iterator[None]:
    """While it lasts, the given signals only ask the training to stop, see `stop_requested`.

    In a thread other than the main one, and under a handler that is not Python's own, nothing changes: who
    has set a handler knows why.
    """
    global _requested, _listener
    previous = {}
    if threading.current_thread() is threading.main_thread():
        ours = (signal.SIG_DFL, signal.default_int_handler)
        previous = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) in ours}
    for signum in previous:
        signal.signal(signum, _on_signal)
    if previous:
        _listener = os.getpid()
        _protect_forked_workers()
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if previous:
            _requested = _listener = 0


@functools.cache
def _protect_forked_workers() -> None:
    """Lets processes that are forked while this one listens end by SIGTERM from it alone.

    Slurm and systems that shut down send SIGTERM to all processes. Without its workers, the training could
    not even end its step.
    """
    if hasattr(os, "register_at_fork") and hasattr(signal, "sigwaitinfo"):
        os.register_at_fork(after_in_child=_protect_worker)


def _protect_worker() -> None:
    if not _listener or os.getppid() != _listener:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
