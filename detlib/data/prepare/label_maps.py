"""Label maps of ADE20K's 150 classes, and of COCO's stuff for Panoptic FPN."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
from PIL import Image

from detlib.data.datasets.builtin import COCO_PANOPTIC_FILES
from detlib.data.datasets.builtin_meta import (
    ADE20K_SEM_SEG_CATEGORIES,
    COCO_CATEGORIES,
    _get_builtin_metadata,
)
from detlib.data.prepare.parallel import check_folder, check_workers, missing, run_jobs, write_png

__all__ = ["prepare_ade20k", "prepare_coco_stuff"]

UNLABELED = 255


def shift_ade20k_labels(source: str, target: str) -> None:
    """Write an ADE20K label map with classes from 0, and 255 for no label.

    Args:
        source: PNG with classes from 1, and 0 for no label.
        target: PNG to write.

    Raises:
        ValueError: The PNG is not such a map.
    """
    with Image.open(source) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.dtype != np.uint8 or labels.max(initial=0) > len(ADE20K_SEM_SEG_CATEGORIES):
        raise ValueError(
            f"{source} is not a label map of ADE20K's {len(ADE20K_SEM_SEG_CATEGORIES)} classes: it has shape "
            f"{labels.shape} and values up to {labels.max(initial=0)}"
        )
    write_png(target, labels - np.uint8(1))  # 0 wraps around to 255


def prepare_ade20k(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Derive `annotations_detectron2` from `annotations`, both below `root`/ADEChallengeData2016.

    Args:
        root: the folder of the datasets.
        workers: number of processes; by default the number of processors.
        overwrite: write existing files again.

    Returns:
        The number of files written.

    Raises:
        FileNotFoundError: The folder of the download does not exist.
        ValueError: A file in it is not a label map.
    """
    workers = check_workers(workers)
    base = os.path.join(root, "ADEChallengeData2016")
    check_folder(os.path.join(base, "annotations"), "ADE20K's label maps (of the scene parsing benchmark)")
    jobs = []
    for split in ("training", "validation"):
        folder = os.path.join(base, "annotations", split)
        check_folder(folder, "ADE20K's label maps")
        names = sorted(name for name in os.listdir(folder) if name.endswith(".png"))
        to = os.path.join(base, "annotations_detectron2", split)
        jobs += [(os.path.join(folder, name), os.path.join(to, name)) for name in names]
    jobs = missing(jobs, overwrite)
    run_jobs(shift_ade20k_labels, jobs, workers, "ADE20K")
    return len(jobs)


def read_segment_ids(path: str) -> np.ndarray:
    """Read the (H, W) int64 segment ids of a PNG in COCO's panoptic format: red + 256 green + 256^2 blue."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64) @ [1, 256, 256 * 256]


def write_stuff_labels(source: str, target: str, labels: dict[int, int]) -> None:
    """Write the label map of one image.

    Args:
        source: PNG of segment ids.
        target: PNG to write.
        labels: the label of each segment; id 0 means no segment.

    Raises:
        ValueError: A segment has no label.
    """
    found, inverse = np.unique(read_segment_ids(source), return_inverse=True)
    unknown = [int(segment) for segment in found if segment != 0 and segment not in labels]
    if unknown:
        raise ValueError(f"{source} has segments {unknown[:10]}, which its annotation does not list")
    table = np.array([labels.get(int(segment), UNLABELED) for segment in found], dtype=np.uint8)
    write_png(target, table[inverse].reshape(inverse.shape))


def stuff_labels() -> dict[int, int]:
    """Return the label of each COCO category id: 0 for things, the class index for stuff."""
    stuff = _get_builtin_metadata("coco_panoptic_separated")["stuff_dataset_id_to_contiguous_id"]
    return {c["id"]: 0 if c["isthing"] else stuff[c["id"]] for c in COCO_CATEGORIES}


def prepare_coco_stuff(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Derive COCO's `panoptic_stuff_*` from its panoptic annotations, all below `root`/coco.

    Of the splits train2017, val2017 and val2017_100, those with an annotation file are processed. The PNGs of
    the last one may be among those of val2017; they are copied then.

    Args:
        root: the folder of the datasets.
        workers: number of processes; by default the number of processors.
        overwrite: write existing files again.

    Returns:
        The number of label maps written.

    Raises:
        FileNotFoundError: There is no file of panoptic annotations, or a folder of PNGs does not exist.
        ValueError: An annotation does not match its PNG, or has a category that COCO does not have.
    """
    workers = check_workers(workers)
    base = os.path.join(root, "coco")
    files = [
        (
            os.path.join(base, "annotations", name + ".json"),
            os.path.join(base, folder),
            os.path.join(base, to),
        )
        for folder, name, to in COCO_PANOPTIC_FILES.values()
    ]
    present = [entry for entry in files if os.path.isfile(entry[0])]
    if not present:
        names = ", ".join(repr(path) for path, _, _ in files)
        raise FileNotFoundError(f"None of COCO's panoptic annotations exists: {names}.")
    known, jobs = stuff_labels(), []
    for path, folder, to in present:
        with open(path) as file:
            annotations = json.load(file)["annotations"]
        source = folder
        if not os.path.isdir(folder) and folder.endswith("_100"):
            source = folder.removesuffix("_100")
        check_folder(source, "COCO's PNGs of panoptic segments")
        for annotation in annotations:
            name, segments = annotation["file_name"], annotation["segments_info"]
            unknown = [s["category_id"] for s in segments if s["category_id"] not in known]
            if unknown:
                raise ValueError(f"{path}: segments of {name!r} have the category ids {unknown}")
            labels = {segment["id"]: known[segment["category_id"]] for segment in segments}
            jobs.append((os.path.join(source, name), os.path.join(to, name), labels))
            if source != folder:
                os.makedirs(folder, exist_ok=True)
                shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    jobs = missing(jobs, overwrite)
    run_jobs(write_stuff_labels, jobs, workers, "COCO stuff")
    return len(jobs)
