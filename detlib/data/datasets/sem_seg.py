"""Semantic segmentation data: one picture of labels beside each picture."""

import logging
import os
from pathlib import PurePath

from detlib.utils.file_io import PathManager

__all__ = ["load_sem_seg"]

logger = logging.getLogger(__name__)


def load_sem_seg(gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg") -> list[dict]:
    """Pairs the pictures of a folder with the label maps of another that have the same name.

    Args:
        gt_root: folder of the label maps: pictures whose pixel values are class indices.
        image_root: folder of the pictures.
        gt_ext: extension of the label maps.
        image_ext: extension of the pictures.

    Returns:
        Dicts in the standard format, sorted by name, with "file_name" and "sem_seg_file_name". Pictures
        without a label map and label maps without a picture are left out, with a warning.

    Raises:
        FileNotFoundError: a folder does not exist, or holds no file of its extension.
        ValueError: no name is in both.
    """
    images = _files_by_name(image_root, image_ext, "image_root")
    labels = _files_by_name(gt_root, gt_ext, "gt_root")
    names = sorted(images.keys() & labels.keys())
    if not names:
        raise ValueError(
            f"load_sem_seg: no label map in {gt_root!r} has the name of a picture in {image_root!r}; the "
            f"first are {min(labels)!r} and {min(images)!r}."
        )
    alone = len(images) + len(labels) - 2 * len(names)
    if alone:
        logger.warning(
            "%d files in %s or %s have no partner of the same name; %d pairs are used.",
            alone,
            image_root,
            gt_root,
            len(names),
        )
    logger.info("Loaded %d images with semantic segmentation from %s", len(names), image_root)
    return [{"file_name": images[name], "sem_seg_file_name": labels[name]} for name in names]


def _files_by_name(folder: str, extension: str, argument: str) -> dict[str, str]:
    """Returns the paths of a folder's files with an extension, by their names without it."""
    if not PathManager.isdir(folder):
        raise FileNotFoundError(f"load_sem_seg: the folder {folder!r} ({argument}) does not exist.")
    suffix = "." + extension.lstrip(".")
    found = {
        PurePath(name).stem: os.path.join(folder, name)
        for name in PathManager.ls(folder)
        if name.endswith(suffix)
    }
    if not found:
        raise FileNotFoundError(f"load_sem_seg: the folder {folder!r} ({argument}) has no {suffix} files.")
    return found
