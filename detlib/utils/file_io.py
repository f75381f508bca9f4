"""Files by path or address: detlib's own iopath `PathManager`.

Local paths work as with `open`. ``http://``, ``https://`` and ``ftp://`` addresses are downloaded once into
the cache
directory: ``$DETLIB_CACHE``, else ``$FVCORE_CACHE``, else ``~/.torch/iopath_cache``.

    with PathManager.open(path, "rb") as f: ...
    local_file = PathManager.get_local_path("https://host/file.pkl")
"""

import os
from typing import Any

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

__all__ = ["CachedURLHandler", "PathHandler", "PathManager", "PathManagerBase"]


class CachedURLHandler(HTTPURLHandler):
    """iopath's download handler with detlib's cache directory."""

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        if cache_dir is None and os.environ.get("DETLIB_CACHE"):
            cache_dir = os.path.expanduser(os.environ["DETLIB_CACHE"])
        return super()._get_local_path(path, force=force, cache_dir=cache_dir, **kwargs)


# An instance of its own: handlers that users add here do not leak into other libraries, nor theirs in here.
PathManager = PathManagerBase()
PathManager.register_handler(CachedURLHandler())
