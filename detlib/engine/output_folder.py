"""The output folder of a run: whether it can be written to, and a lock that keeps two training runs apart.

The lock is a file with the host and the process id of the run's main process. A killed process leaves it
behind, so a lock whose process is dead is taken over. Whether a process on another host is alive cannot be
known: the error names the host and the file, which the user may delete.
"""

import contextlib
import json
import logging
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from detlib.engine.distributed.environment import restart_count
from detlib.utils import comm
from detlib.utils.file_io import is_remote

__all__ = ["OutputFolderInUseError", "check_output_folder", "lock_output_folder"]

logger = logging.getLogger(__name__)

_NAME = ".training_lock"
_KEY = "OUTPUT_DIR (train.output_dir)"
# Seconds that processes of a killed run may need to notice that their launcher is gone.
_PATIENCE = 3.0

_depth: Counter = Counter()  # how often this process has entered the lock of each folder


class OutputFolderInUseError(RuntimeError):
    """Another training run is writing to the output folder."""


def check_output_folder(folder: str, *, is_for_training: bool = True) -> None:
    """Create the output folder, and check that files can be written and that no training run uses it.

    Args:
        folder: OUTPUT_DIR; remote folders are not checked.
        is_for_training: False does not look for another training run, as for an evaluation.

    Raises:
        OSError: if the folder is a file, or cannot be created or written to.
        OutputFolderInUseError: if another process trains in it.
    """
    if not folder or is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write_test"):
            pass
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{_KEY}: {folder} must be a folder, but it or a parent is a file") from None
    except OSError as e:
        raise type(e)(f"{_KEY}: cannot write to the folder {folder}: {e.strerror}") from None
    path = _lock_path(folder)
    if is_for_training and not _depth[path]:
        _wait_until_free(path)


@contextlib.contextmanager
def lock_output_folder(folder: str) -> Iterator[None]:
    """Context manager that reserves a folder for the training run of this process. Can be nested.

    Only the main process of a distributed run takes the lock. Remote folders are not locked.

    Args:
        folder: OUTPUT_DIR.

    Raises:
        OSError, OutputFolderInUseError: as in `check_output_folder`.
    """
    if not folder or is_remote(folder) or not comm.is_main_process():
        yield
        return
    path = _lock_path(folder)
    if not _depth[path]:
        check_output_folder(folder)
        _take(path)
    _depth[path] += 1
    try:
        yield
    finally:
        _depth[path] -= 1
        if not _depth[path] and _is_ours(_read(path)):
            with contextlib.suppress(OSError):
                os.remove(path)


def _lock_path(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), _NAME)


def _take(path: str) -> None:
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _wait_until_free(path)
            continue
        except OSError as e:
            raise type(e)(f"{_KEY}: cannot write {path}: {e.strerror}") from None
        with os.fdopen(descriptor, "w") as f:
            json.dump({**_identity(), "processes": comm.get_world_size(), "job": _job()}, f)
        return


def _wait_until_free(path: str) -> None:
    """Remove the lock of a dead process; raise an error if its process may be alive."""
    end = time.monotonic() + _PATIENCE
    while (holder := _read(path)) is not None:
        if not _may_be_alive(holder):
            _remove_stale(path, holder)
        elif time.monotonic() > end or holder.get("processes") == 1:
            raise OutputFolderInUseError(_describe(path, holder))
        else:
            time.sleep(0.1)


def _describe(path: str, holder: dict[str, Any]) -> str:
    host, pid = holder.get("host"), holder.get("pid")
    message = (
        f"{_KEY}: process {pid} on host {host} is training in {os.path.dirname(path)} since "
        f"{holder.get('since')}; use another folder"
    )
    if host != socket.gethostname():
        message += f", or delete {path} if that process has ended"
    return message


def _remove_stale(path: str, holder: dict[str, Any]) -> None:
    # Another process may have replaced the stale lock by its own since it was read.
    aside = f"{path}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) == holder:
        os.remove(aside)
        if holder:
            logger.warning(
                "Taking over %s from process %s on host %s, which has ended without removing its lock",
                os.path.dirname(path),
                holder.get("pid"),
                holder.get("host"),
            )
    else:
        os.rename(aside, path)


def _read(path: str) -> dict[str, Any] | None:
    """Return the contents of a lock; None if there is none, and {} if it was not written to the end."""
    for _ in range(10):
        try:
            with open(path) as f:
                holder = json.load(f)
            return holder if isinstance(holder, dict) else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            time.sleep(0.02)  # its process may be about to write it
    return {}


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "process started": _start_time(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_ours(holder: dict[str, Any] | None) -> bool:
    if not holder:
        return False
    return (holder.get("host"), holder.get("pid")) == (socket.gethostname(), os.getpid())


def _may_be_alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if holder.get("host") != socket.gethostname():
        # A restarted run may continue on another host.
        return not _is_restart_of(holder.get("job"))
    if pid == os.getpid():
        return False  # a lock of a former process with the same id
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # a process of another user
    started, now = holder.get("process started"), _start_time(pid)
    return now != "ended" and (not started or not now or started == now)


def _start_time(pid: int) -> str:
    """Return when a process started, "ended" for a zombie, or "" if the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _job() -> list[str]:
    """Return the launcher's name of the run, which is the same after a restart."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        if os.environ.get(name, "none") != "none":
            return [name, os.environ[name]]
    return []


def _is_restart_of(job: Any) -> bool:
    own = _job()
    # torchrun's id names one run; several commands of one Slurm job may train at the same time.
    return bool(own) and own == job and (own[0] == "TORCHELASTIC_RUN_ID" or restart_count()[0] > 0)
