"""Where the label files of YOLO's images are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from detlib.utils.file_io import PathManager

__all__ = ["LabelFinder", "find_labels", "label_file_of"]

logger = logging.getLogger(__name__)

_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
_LABEL_FOLDERS = ("labels", "label")


def label_file_of(image: str) -> str:
    """Return where an image's labels should be: in `labels` instead of `images`, else next to the image."""
    stem = os.path.splitext(image)[0]
    head, folder, tail = f"/{stem}".rpartition("/images/")
    return f"{head}/labels/{tail}.txt"[1:] if folder else f"{stem}.txt"


class LabelFinder:
    """Finds the label files of images, in upper or lower case.

    They are searched in this order: in a folder `labels` instead of `images` (or `imgs`, `img`), next to the
    image, and in a folder `labels` next to or inside the folder of the image.
    """

    def __init__(self) -> None:
        self._listings: dict[str, dict[str, str]] = {}

    def find(self, image: str) -> str | None:
        """Return the path of an image's label file; None if there is none."""
        name = os.path.splitext(os.path.basename(image))[0] + ".txt"
        for folder in self._folders(image):
            found = self._list(folder)
            entry = found.get(name) or found.get(name.lower())
            if entry is not None:
                return os.path.join(folder, entry)
        return None

    def searched(self, image: str) -> str:
        """Return the paths where an image's labels were searched, for messages."""
        name = os.path.splitext(os.path.basename(image))[0] + ".txt"
        return ", ".join(
            dict.fromkeys([label_file_of(image), *(f"{f}/{name}" for f in self._folders(image))])
        )

    def _folders(self, image: str) -> Iterator[str]:
        """Yield the existing folders where the labels of an image may be."""
        folder = os.path.dirname(image)
        parts = folder.split("/")
        for i in reversed(range(len(parts))):
            if parts[i].lower() in _IMAGE_FOLDERS:
                yield from self._labels_in("/".join(parts[:i]), *parts[i + 1 :])
                break
        yield folder
        yield from self._labels_in(folder)
        yield from self._labels_in(os.path.dirname(folder))
        yield from self._labels_in(os.path.dirname(folder), os.path.basename(folder))

    def _labels_in(self, parent: str, *rest: str) -> Iterator[str]:
        listed = self._list(parent)
        for name in _LABEL_FOLDERS:
            if name in listed:
                yield os.path.join(parent, listed[name], *rest)

    def _list(self, folder: str) -> dict[str, str]:
        """Return the entries of a folder, by name and by name in lower case; {} if it does not exist."""
        if folder not in self._listings:
            try:
                names = sorted(PathManager.ls(folder or "."))
            except OSError:
                names = []
            self._listings[folder] = {name.lower(): name for name in names} | {name: name for name in names}
        return self._listings[folder]


def find_labels(images: list[str], source: str) -> list[str | None]:
    """Return the label file of each image, and log how many have none.

    Args:
        images: the images of a split.
        source: names the split in messages.

    Raises:
        ValueError: No image has a label file.
    """
    finder = LabelFinder()
    found = [finder.find(image) for image in images]
    missing = [image for image, labels in zip(images, found) if labels is None]
    if len(missing) == len(images):
        raise ValueError(
            f"{source}: none of the {len(images)} images has a label file. Looked for: "
            f"{finder.searched(images[0])}."
        )
    if missing:
        logger.warning(
            "%s: labels were found for %d of %d images; the others count as images without objects. Looked "
            "for, e.g., %s",
            source,
            len(images) - len(missing),
            len(images),
            finder.searched(missing[0]),
        )
    elsewhere = [
        (image, labels) for image, labels in zip(images, found) if labels not in (None, label_file_of(image))
    ]
    if elsewhere:
        logger.warning("%s: the labels of %s are in %s", source, *elsewhere[0])
    return found
