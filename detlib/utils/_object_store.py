"""A path handler for object stores (S3, Google Cloud, Azure, ...), through fsspec."""

import os
import posixpath
import re
import tempfile
from collections.abc import Callable
from typing import IO, Any

from iopath.common.file_io import PathHandler

__all__ = ["ObjectStoreHandler"]

_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory")


class ObjectStoreHandler(PathHandler):
    """A path handler that reads and writes URLs such as ``s3://bucket/key``.

    Credentials and endpoints come from fsspec's configuration and the store's own environment variables.
    `get_local_path` caches one copy per version of the object, so an object that changes is fetched again.
    """

    def __init__(self, cache_dir: Callable[[], str]):
        super().__init__()
        self._cache_dir = cache_dir

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{protocol}://" for protocol in _PROTOCOLS]

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **_: Any) -> str:
        system, key = _resolve(path)
        if not system.isfile(key):
            raise FileNotFoundError(f"Object {path} does not exist")
        version = re.sub(r"\W", "", str(system.ukey(key)))[:16]
        protocol, _, rest = path.partition("://")
        names = [name for name in rest.split("/") if name not in ("", ".", "..")]
        folder = os.path.join(cache_dir or self._cache_dir(), protocol, *names[:-1], version)
        local = os.path.join(folder, names[-1])
        if force or not os.path.isfile(local):
            os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder)
            os.close(handle)
            try:
                system.get_file(key, temporary)
                os.replace(temporary, local)
            finally:
                if os.path.exists(temporary):
                    os.remove(temporary)
        return local

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        system, key = _resolve(path)
        if "a" in mode:
            raise ValueError(f"Cannot append to {path} (mode {mode!r}): objects are written as a whole")
        return system.open(key, mode, **kwargs)

    def _copy(self, src_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        if not overwrite and self._exists(dst_path):
            raise FileExistsError(f"{dst_path} exists")
        system, key = _resolve(src_path)
        system.copy(key, _resolve(dst_path)[1])
        return True

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        if not overwrite and self._exists(dst_path):
            raise FileExistsError(f"{dst_path} exists")
        system, key = _resolve(dst_path)
        system.put_file(local_path, key)
        return True

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        system, key = _resolve(src_path)
        system.mv(key, _resolve(dst_path)[1])
        return True

    def _exists(self, path: str, **_: Any) -> bool:
        system, key = _resolve(path)
        return system.exists(key)

    def _isfile(self, path: str, **_: Any) -> bool:
        system, key = _resolve(path)
        return system.isfile(key)

    def _isdir(self, path: str, **_: Any) -> bool:
        system, key = _resolve(path)
        return system.isdir(key)

    def _ls(self, path: str, **_: Any) -> list[str]:
        system, key = _resolve(path)
        return [posixpath.basename(name.rstrip("/")) for name in system.ls(key, detail=False)]

    def _mkdirs(self, path: str, **_: Any) -> None:
        system, key = _resolve(path)
        if posixpath.dirname(key.strip("/")):  # do not create buckets
            system.makedirs(key, exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        system, key = _resolve(path)
        system.rm_file(key)


def _resolve(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        ImportError: if fsspec or its package for this store is not installed.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except ImportError as e:
        raise ImportError(f'{path} needs `pip install "detlib[cloud]"`: {e}') from e
