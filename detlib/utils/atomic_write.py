"""Writing files whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from detlib.utils.file_io import PathManager, is_remote

__all__ = ["remove_unfinished_files", "write_bytes_atomically"]

_ENDING = ".unfinished"


def _read_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# Read once: setting it while other threads make files would change theirs.
_UMASK = _read_umask()


def write_bytes_atomically(path: str, write: Callable[[Any], None]) -> None:
    """Calls ``write(file)`` on a temporary file and moves that to `path` once it is safe on disk.

    A crash, a full disk or a lost power line leaves what was at `path` before. What goes to remote storage
    ("scheme://...") is written to a local file and handed over as a whole.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "content")
            with open(local, "wb") as f:
                write(f)
            PathManager.copy_from_local(local, path, overwrite=True)
        return
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=_ENDING)
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        # mkstemp makes files that only the owner can read; ours are as open as any other file.
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = path  # a full disk is told without a name
        raise
    _sync_folder(folder)


def remove_unfinished_files(folder: str) -> None:
    """Removes what killed processes left of files that they were writing to `folder`. Nothing may be writing
    there at the same time."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(_ENDING):
            os.remove(os.path.join(folder, name))


def _sync_folder(folder: str) -> None:
    """Makes a rename in `folder` last over a power loss, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
