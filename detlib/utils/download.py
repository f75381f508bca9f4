"""Downloads that are complete or absent, resume after interruptions, and verify checksums.

A file is downloaded to ``PATH.part`` and moved to ``PATH`` once its length and, if its name contains one, its
checksum are correct. After a lost connection the download continues where it stopped if the server still has
the same file (RFC 9110, sections 13.1.5 and 14); a stalled connection times out and counts as lost. If
multiple processes need a file, one downloads it and the others wait.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

import portalocker
from tqdm import tqdm

__all__ = ["Checksum", "DownloadError", "checksum_in_name", "download", "is_offline", "is_there"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_LONGEST_PAUSE = 30.0
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
# Names in detectron2's model zoo contain the beginning of the md5 sum, PyTorch's model names that of the
# sha256.
_NAMES_WITH_CHECKSUM = (
    (re.compile(r"model_(?:final|\d{7})_([0-9a-f]{6})\.pkl"), "md5"),
    (re.compile(r".+-([0-9a-f]{8,64})\.pth"), "sha256"),
)


class DownloadError(OSError):
    """A file could not be downloaded; the message has its URL and advice."""


@dataclass(frozen=True)
class Checksum:
    """The first digits of the checksum of a file."""

    algorithm: str
    """Name of the algorithm, as in `hashlib.new`."""
    prefix: str
    """Lower-case hexadecimal digits."""

    def of(self, path: str) -> str:
        """Return the same number of digits of the checksum of the file at `path`."""
        with open(path, "rb") as f:
            return hashlib.file_digest(f, self.algorithm).hexdigest()[: len(self.prefix)]


def checksum_in_name(name: str) -> Checksum | None:
    """Return the checksum in the name of a published file, or None.

    Examples are ``model_final_f10217.pkl`` (md5) and ``resnet50-19c8e357.pth`` (sha256).
    """
    for pattern, algorithm in _NAMES_WITH_CHECKSUM:
        if match := pattern.fullmatch(name):
            return Checksum(algorithm, match[1])
    return None


def download(
    url: str,
    path: str,
    *,
    checksum: Checksum | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    attempts: int = 6,
) -> None:
    """Download `url` to the local `path`, unless the file exists and is undamaged.

    The size and the sha256 sum of a download are recorded in ``PATH.sha256``. An existing file is compared
    with this record and with the checksum, once per process and change of the file.

    Args:
        url: an http, https or ftp URL.
        path: local path of the file; its folder is created.
        checksum: expected checksum; None for the one in the name, if any.
        headers: headers of the request, such as an authorization; not sent to other hosts on a redirect.
        timeout: seconds without data after which the connection counts as lost.
        attempts: number of consecutive connections without progress before giving up.

    Raises:
        DownloadError: if the download fails, the checksum is wrong, or `$DETLIB_OFFLINE` is set. The message
            has the URL and the path for a manual download.
    """
    checksum = checksum or checksum_in_name(os.path.basename(path))
    damage = _damage(path, checksum)
    if damage == "":
        return
    by_hand = f"You can download it manually to {path}"
    if damage is not None:
        if is_offline():
            raise DownloadError(
                f"The cached file {path} of {url} is damaged: {damage}. $DETLIB_OFFLINE disables downloads. "
                f"{by_hand}."
            )
        logger.warning("The cached file %s is damaged: %s. Downloading %s again", path, damage, url)
    elif is_offline():
        raise DownloadError(f"{url} is not in the cache, and $DETLIB_OFFLINE disables downloads. {by_hand}.")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with _only_process(path):
        if _damage(path, checksum) == "":  # another process was faster
            return
        part = _Part(path)
        try:
            _fetch(url, part, headers or {}, timeout, attempts)
            if checksum is not None and (found := checksum.of(part.path)) != checksum.prefix:
                logger.warning("%s has the wrong checksum: downloading it again", url)
                part.forget()
                _fetch(url, part, headers or {}, timeout, attempts)
                if (found := checksum.of(part.path)) != checksum.prefix:
                    part.forget()
                    raise DownloadError(
                        f"its {checksum.algorithm} sum begins with {found} instead of {checksum.prefix}: the "
                        "server has a different file under this name"
                    )
        except (OSError, http.client.HTTPException) as e:
            raise DownloadError(f"Could not download {url}: {_reason(e)}. {by_hand}.") from e
        part.finish()


_undamaged: set[tuple[str, int, int]] = set()
"""Path, size and time of change of the files that were checked."""


def _damage(path: str, checksum: Checksum | None) -> str | None:
    """Return what is wrong with an existing file; "" for nothing, None if there is no file.

    The file is compared with `checksum`, and with the size and sum that were recorded with its download.
    """
    if not os.path.isfile(path):
        return None
    status = os.stat(path)
    state = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    if state in _undamaged:
        return ""
    try:
        with open(f"{path}.sha256") as f:
            digest, size = f.read().split()
        recorded = Checksum("sha256", digest)
        if status.st_size != int(size):
            return f"it has {status.st_size} bytes instead of {size}"
    except (OSError, ValueError):  # a file that was put there by hand, or by another library
        recorded = None
    for expected in filter(None, (checksum, recorded)):
        if (found := expected.of(path)) != expected.prefix:
            return f"its {expected.algorithm} sum begins with {found[:12]} instead of {expected.prefix[:12]}"
    _undamaged.add(state)
    return ""


def is_offline() -> bool:
    """Return whether `$DETLIB_OFFLINE` disables downloads: it is set, and neither empty nor 0."""
    return os.environ.get("DETLIB_OFFLINE", "0") not in ("", "0")


def is_there(url: str, *, headers: Mapping[str, str] | None = None, timeout: float = 30.0) -> bool:
    """Return whether the server has `url`, without downloading it.

    Raises:
        DownloadError: if the server cannot be reached or returns another error.
    """
    request = _request(url, headers or {})
    request.method = "HEAD"
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as e:
        if e.code in (404, 410):
            return False
        raise DownloadError(f"Could not reach {url}: {_reason(e)}") from e
    except (OSError, http.client.HTTPException) as e:
        raise DownloadError(f"Could not reach {url}: {_reason(e)}") from e


@contextlib.contextmanager
def _only_process(path: str):
    """Context manager that holds the lock of `path`, so that no other process or thread writes it."""
    lock = portalocker.Lock(f"{path}.lock", mode="a", flags=portalocker.LOCK_EX | portalocker.LOCK_NB)
    waited = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except portalocker.exceptions.LockException:
            if not waited:
                logger.info("Waiting for another process to download %s", path)
            waited = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


class _Part:
    """The unfinished file, with the ETag or date of the server's file that it is a part of."""

    def __init__(self, path: str):
        self.final = path
        self.path = f"{path}.part"
        self._validator_path = f"{path}.part.tag"

    def size(self) -> int:
        return os.path.getsize(self.path) if os.path.isfile(self.path) else 0

    def validator(self) -> str:
        """Return the ETag or date of the server's file; "" if unknown."""
        if not os.path.isfile(self._validator_path):
            return ""
        with open(self._validator_path) as f:
            return f.read()

    def begin(self, validator: str) -> None:
        """Start from the beginning, with a file of this ETag or date."""
        self.forget()
        with open(self._validator_path, "w") as f:
            f.write(validator)

    def forget(self) -> None:
        for path in (self.path, self._validator_path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def finish(self) -> None:
        """Move the finished file to its path."""
        with open(self.path, "rb+") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            os.fsync(f.fileno())
        record = f"{self.final}.sha256"
        with contextlib.suppress(FileNotFoundError):
            os.remove(record)  # the record of an older file
        size = self.size()
        os.replace(self.path, self.final)
        with open(record, "w") as f:
            f.write(f"{digest} {size}\n")
        self.forget()


def _fetch(url: str, part: _Part, headers: Mapping[str, str], timeout: float, attempts: int) -> None:
    """Connect until the part is complete. Only attempts without progress count as failures."""
    failures, best = 0, part.size()
    while True:
        try:
            if _receive(url, part, headers, timeout):
                return
            error: Exception = DownloadError(f"the connection was lost after {part.size()} bytes")
        except urllib.error.HTTPError as e:
            if e.code == 416:  # the part does not match the server's file
                part.forget()
            elif e.code not in _RETRIED_STATUS:
                raise
            error = e
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, DownloadError) or not _is_network_error(e):
                raise
            error = e
        failures = 0 if part.size() > best else failures + 1
        best = max(best, part.size())
        if failures >= attempts:
            raise error
        pause = min(_LONGEST_PAUSE, 0.5 * 2**failures)
        logger.warning("Download of %s: %s; retrying in %.1f s", url, _reason(error), pause)
        time.sleep(pause)


def _receive(url: str, part: _Part, headers: Mapping[str, str], timeout: float) -> bool:
    """Receive data until the connection ends, and return whether the part is complete."""
    request = _request(url, headers)
    start, validator = part.size(), part.validator()
    if start and validator:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        _refuse_web_page(response, part.final)
        length = response.headers.get("Content-Length")
        if _continues(response, start):
            logger.info("Resuming the download of %s after %d bytes", url, start)
        else:
            start = 0
            etag = response.headers.get("ETag") or ""
            # A weak ETag does not promise equal bytes.
            part.begin(etag if etag.startswith('"') else response.headers.get("Last-Modified") or "")
        total = start + int(length) if length is not None else None
        _check_space(part.final, total, start)
        if not start:
            logger.info("Downloading %s to %s", url, part.final)
        with open(part.path, "ab") as f, _progress(part.final, total, start) as advance:
            # read1 returns what has arrived, so that data before a stall are kept.
            while chunk := response.read1(_CHUNK) if hasattr(response, "read1") else response.read(_CHUNK):
                f.write(chunk)
                advance(len(chunk))
    return total is None or part.size() == total


def _request(url: str, headers: Mapping[str, str]) -> urllib.request.Request:
    # A compressed response would have another length, and could not be resumed.
    request = urllib.request.Request(url, headers={"User-Agent": "detlib", "Accept-Encoding": "identity"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # the token is for this host only
    return request


def _continues(response, start: int) -> bool:
    """Return whether the response contains the file from byte `start` on, instead of the entire file."""
    if getattr(response, "status", None) != 206:
        return False
    if (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
        return True
    raise DownloadError(f"the server returned {response.headers.get('Content-Range')!r} for bytes={start}-")


def _refuse_web_page(response, path: str) -> None:
    kind = response.headers.get_content_type() if response.headers.get("Content-Type") else ""
    if kind == "text/html" and not path.endswith((".html", ".htm")):
        raise DownloadError("the server returned a web page, such as a login form")


def _check_space(path: str, total: int | None, start: int) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    free = shutil.disk_usage(folder).free
    if total is not None and total - start > free:
        needed = (total - start) / 1e6
        raise DownloadError(f"{folder} needs {needed:.0f} MB of disk space, but {free / 1e6:.0f} MB are free")


@contextlib.contextmanager
def _progress(path: str, total: int | None, start: int):
    """Context manager that shows a progress bar on a terminal, and otherwise logs every ten seconds.

    Yields a function that takes the number of new bytes.
    """
    name = os.path.basename(path)
    if sys.stderr.isatty():
        with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    done, since = start, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, since
        done += count
        if time.monotonic() - since > 10:
            since = time.monotonic()
            of_all = f" of {total / 1e6:.1f} MB ({100 * done / total:.0f} %)" if total else " MB"
            logger.info("%s: %.1f%s", name, done / 1e6, of_all)

    yield advance


def _is_network_error(error: Exception) -> bool:
    """Return False for errors of the local disk, for which a retry does not help."""
    network = (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        socket.gaierror,
    )
    return isinstance(error, network)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server returned {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    return str(error) or type(error).__name__
