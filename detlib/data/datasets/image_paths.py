"""Finding images whose paths were written on another machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence

from detlib.utils.file_io import PathManager

__all__ = ["ImageFinder", "split_path"]

logger = logging.getLogger(__name__)

_MAX_PARTS = 64  # of a path, so that the search for it is bounded


def split_path(stated: str) -> list[str]:
    """Return the parts of a path without drive and root: "C:\\a\\b.png" is ["a", "b.png"]."""
    path = re.sub(r"^(file://|[A-Za-z]:)", "", stated.strip())
    if "://" in path:  # a URL: only the name of the file is of use here
        path = path.split("?")[0].split("#")[0].rpartition("/")[2]
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")][-_MAX_PARTS:]


class ImageFinder:
    """Finds images by their stated paths.

    A path is first tried as it is written, relative to the root. Backslashes are read as slashes. If that is
    not a file, its leading folders are left out one by one: "/content/data/images/a.jpg" is found as
    "images/a.jpg" or "a.jpg" below the root. The first such image is logged.
    """

    def __init__(self, root: str, folders: Sequence[str] = ("", "images", "JPEGImages")) -> None:
        """
        Args:
            root: folder of the dataset.
            folders: folders below the root in which paths are tried, in this order.
        """
        self.root = root
        self.folders = tuple(folders)
        self._logged = False

    def candidates(self, stated: str) -> Iterator[str]:
        """Yield the paths where an image may be, the likeliest first."""
        parts = split_path(stated)
        if not parts:
            return
        native = stated.replace("\\", "/")
        if os.path.isabs(native):
            yield native
        seen = set()
        for start in range(len(parts)):
            tail = parts[start:]
            if ".." in tail and start == 0 and not os.path.isabs(native):
                yield os.path.normpath(os.path.join(self.root, *tail))
            if ".." in tail:
                continue
            for folder in self.folders:
                path = os.path.join(self.root, folder, *tail)
                if path not in seen:
                    seen.add(path)
                    yield path

    def find(self, stated: str) -> str | None:
        """Return the path of an image, or None if there is none.

        Args:
            stated: the path in the annotations.
        """
        for path in self.candidates(stated):
            if PathManager.isfile(path):
                self._log(stated, path)
                return path
        return None

    def _log(self, stated: str, path: str) -> None:
        if self._logged or path == stated or path.endswith("/" + stated):
            return
        self._logged = True
        logger.warning("The image %r does not exist under this path; using %r", stated, path)
