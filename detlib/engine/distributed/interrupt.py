"""Stop requests: SIGTERM and Ctrl-C end a training run after the current step, with a checkpoint."""

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
# The pid of the process that listens. Data-loader workers are forked from it, with its handlers.
_listener = 0


class StopTraining(SystemExit):
    """Raised to end a training run that was asked to stop. Uncaught, it ends the process with `code`.

    It is not an Exception, because it is not an error: failure handlers must not catch it.

    Attributes:
        signum: the signal that requested the stop.
        code: 128 plus the signal number, as in shells: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, signum: int):
        """
        Args:
            signum: the signal that requested the stop.
        """
        super().__init__(128 + signum)
        self.signum = signum


def request_stop(signum: int = signal.SIGTERM) -> None:
    """Ask the training run to stop after the current step. A request in one process stops all processes.

    Args:
        signum: the signal that the stop is reported as.
    """
    global _requested
    _requested = _requested or int(signum)


def stop_requested() -> int:
    """Return whether any process was asked to stop. All processes must call this, and get the same answer.

    With several processes it costs one small all-reduce over gloo.

    Returns:
        The number of the signal, or 0.
    """
    return comm.agree_on_max(_requested)


def _on_signal(signum: int, frame) -> None:
    if os.getpid() != _listener:
        # Data-loader worker: ignore the signal, which terminals and Slurm send to all processes. The trainer
        # still needs its batches.
        return
    if _requested and signum == signal.SIGINT:
        # Second Ctrl-C: stop immediately.
        raise KeyboardInterrupt
    again = " Press Ctrl-C again to stop immediately." if signum == signal.SIGINT else ""
    logger.warning("Got %s: stopping after this step.%s", signal.Signals(signum).name, again)
    request_stop(signum)


@contextlib.contextmanager
def listen_for_stop(signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> Iterator[None]:
    """Context manager in which the given signals only request a stop, see `stop_requested`.

    Outside of the main thread it has no effect. Signals whose handler is not Python's default keep it.
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
    """Let processes that are forked while this one listens end on SIGTERM from this process only.

    Slurm and a system shutdown send SIGTERM to all processes. Without its workers, the trainer could not
    finish the current step.
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
