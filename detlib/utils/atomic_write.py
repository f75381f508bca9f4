"""Atomic writes: a file is written completely or not at all."""

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from detlib.utils.file_io import PathManager, is_remote

__all__ = ["remove_unfinished_files", "write_bytes_atomically"]

_ENDING = ".unfinished"
_REASONS = {
    errno.ENOSPC: "The disk is full: ",
    errno.EDQUOT: "Your disk quota is used up: ",
    errno.EFBIG: "The file exceeds the size limit of the process or file system: ",
    errno.EROFS: "The file system cannot be written to: ",
}


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

    Raises:
        OSError: if the file cannot be written; it states the reason, such as a full disk, and `path`.
        Exception: any other exception of `write`.
    """
    handled = sys.exc_info()[1]
    try:
        if is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                local = os.path.join(folder, "content")
                with open(local, "wb") as f:
                    write(f)
                PathManager.copy_from_local(local, path, overwrite=True)
        else:
            _write_local(path, write)
    except Exception as error:
        reason = _disk_error(error, handled)
        if reason is None:
            raise
        raise OSError(reason.errno, _explain(reason), path) from error


def _write_local(path: str, write: Callable[[Any], None]) -> None:
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
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _sync_folder(folder)


def _disk_error(error: BaseException, handled: BaseException | None) -> OSError | None:
    """Return the error of the operating system that led to `error`, or None.

    `torch.save` fails with "unexpected pos" after a failed write, whose error is the context of its own. An
    error that the caller was already handling is not the reason.
    """
    cause: BaseException | None = error
    while cause is not None and cause is not handled:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _explain(error: OSError) -> str:
    return f"{_REASONS.get(error.errno or 0, '')}{error.strerror or error}"


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
