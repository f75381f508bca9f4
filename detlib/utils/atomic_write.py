"""Atomic writes: a file is written completely or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from detlib.utils.file_io import PathManager, is_remote

__all__ = ["remove_unfinished_files", "write_bytes_atomically"]

_ENDING = ".unfinished"


def _read_umask() -> int:
    """Return the umask of the process, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# Read once, because setting it affects files that other threads create at the same time.
_UMASK = _read_umask()


def write_bytes_atomically(path: str, write: Callable[[Any], None]) -> None:
    """Call ``write(file)`` with a temporary file, and move the file to `path` once it is safely on disk.

    After a crash, a full disk or a power failure, the previous file at `path` is intact. For remote storage
    ("scheme://..."), a local file is written and uploaded as a whole.
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
        # mkstemp creates files that only the owner can read; give this one the usual permissions.
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = path  # errors such as a full disk come without a file name
        raise
    _sync_folder(folder)


def remove_unfinished_files(folder: str) -> None:
    """Remove the temporary files that killed processes left in `folder`.

    Nothing may write to the folder at the same time.
    """
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(_ENDING):
            os.remove(os.path.join(folder, name))


def _sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a power failure, on systems that can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
