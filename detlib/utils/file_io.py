"""Files by path or URL: detlib's own instance of iopath's `PathManager`.

Local paths work as with `open`. Files at ``http://``, ``https://``, ``ftp://`` and
``hf://owner/repo[@revision]/file`` URLs are downloaded once into the cache directory, see `cache_dir`.
``s3://``, ``gs://``, ``az://`` and other object stores are read and written through fsspec
(``pip install "detlib[cloud]"``).

    with PathManager.open(path, "rb") as f: ...
    local_file = PathManager.get_local_path("https://host/file.pkl")
"""

import hashlib
import os
import re
from typing import IO, Any
from urllib.parse import urlsplit

from iopath.common.file_io import PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

from detlib.utils._object_store import ObjectStoreHandler
from detlib.utils.download import download, is_there

__all__ = [
    "CachedURLHandler",
    "HuggingFaceHandler",
    "ObjectStoreHandler",
    "PathHandler",
    "PathManager",
    "PathManagerBase",
    "cache_dir",
    "is_remote",
    "safe_name",
]

# The cache omits the name of this host, so that detectron2 finds the files too.
_ZOO_HOST = "dl.fbaipublicfiles.com"


def cache_dir() -> str:
    """Return the folder of downloads: ``$DETLIB_CACHE``, ``$FVCORE_CACHE`` or ``~/.torch/iopath_cache``."""
    for name in ("DETLIB_CACHE", "FVCORE_CACHE"):
        if os.environ.get(name):
            return os.path.expanduser(os.environ[name])
    return os.path.expanduser("~/.torch/iopath_cache")


def safe_name(dataset: str) -> str:
    """Return the name or URI of a dataset as a legal name of a file or folder."""
    return re.sub(r"[^\w.-]+", "_", dataset)


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL instead of a local path."""
    return "://" in path


class CachedURLHandler(PathHandler):
    """A path handler that downloads each URL once, see `detlib.utils.download.download`."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://", "ftp://"]

    def url(self, path: str) -> str:
        """Return the URL to download for `path`."""
        return path

    def headers(self) -> dict[str, str]:
        """Return the headers of each request."""
        return {}

    def cached_path(self, path: str, folder: str | None = None) -> str:
        """Return the path of the file in the cache, whether it exists or not."""
        parts = urlsplit(self.url(path))
        names = [name for name in parts.path.split("/") if name not in ("", ".", "..")] or ["index"]
        if parts.query:  # another query means another file
            stem, ending = os.path.splitext(names[-1])
            names[-1] = f"{stem}-{hashlib.sha256(parts.query.encode()).hexdigest()[:12]}{ending}"
        host = [] if parts.hostname == _ZOO_HOST else [parts.netloc.rpartition("@")[2].replace(":", "_")]
        return os.path.join(folder or cache_dir(), *host, *names)

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **_: Any) -> str:
        local = self.cached_path(path, cache_dir)
        if force and os.path.isfile(local):
            os.remove(local)
        download(self.url(path), local, headers=self.headers())
        return local

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        if set(mode) - set("rbt"):
            raise ValueError(f"{path} is read-only and cannot be opened with mode {mode!r}")
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path: str, **_: Any) -> bool:
        return os.path.isfile(self.cached_path(path)) or is_there(self.url(path), headers=self.headers())

    _isfile = _exists


class HuggingFaceHandler(CachedURLHandler):
    """A path handler of ``hf://owner/repo/path/of/file``, a file of the Hugging Face hub.

    ``hf://owner/repo@revision/file`` is the file of a branch, tag or commit. `$HF_TOKEN` gives access to
    private repositories, and `$HF_ENDPOINT` is the URL of another hub.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["hf://"]

    def headers(self) -> dict[str, str]:
        token = os.environ.get("HF_TOKEN")
        return {"Authorization": f"Bearer {token}"} if token else {}

    def url(self, path: str) -> str:
        """Return the https URL of an ``hf://`` URL.

        Raises:
            ValueError: if owner, repository or file is missing.
        """
        owner, _, rest = path.removeprefix("hf://").partition("/")
        repo, _, file = rest.partition("/")
        repo, _, revision = repo.partition("@")
        if not (owner and repo and file):
            raise ValueError(
                f"{path!r} does not have the form hf://owner/repo/file or hf://owner/repo@revision/file"
            )
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{owner}/{repo}/resolve/{revision or 'main'}/{file}"


# A separate instance, so that handlers that users register here do not affect other libraries, and vice
# versa.
PathManager = PathManagerBase()
PathManager.register_handler(CachedURLHandler())
PathManager.register_handler(HuggingFaceHandler())
PathManager.register_handler(ObjectStoreHandler(cache_dir))
