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
    """Write an ADE20K label map with classes from 0, and 255 where there is none.

    Args:
        source: PNG with classes from 1, and 0 where there is none.
        target: PNG to write.

    Raises:
        ValueError: the PNG is no such map.
    """
    with Image.open(source) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.dtype != np.uint8 or labels.max(initial=0) > len(ADE20K_SEM_SEG_CATEGORIES):
        raise ValueError(
            f"{source} is no label map of ADE20K's {len(ADE20K_SEM_SEG_CATEGORIES)} classes: it has shape "
            f"{labels.shape} and values up to {labels.max(initial=0)}"
        )
    write_png(target, labels - np.uint8(1))  # 0 wraps around to 255


def prepare_ade20k(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Make ``annotations_detectron2`` of ``annotations``, both below ``root``/ADEChallengeData2016.

    Args:
        root: the folder of the data sets.
        workers: number of processes; as many as there are processors by default.
        overwrite: make what is there anew.

    Returns:
        The number of files written.

    Raises:
        FileNotFoundError: the folder of the download is not there.
        ValueError: a file in it is no label map.
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
    """(H, W) int64 segment ids of a PNG in COCO's panoptic format: red + 256 green + 256^2 blue."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64) @ [1, 256, 256 * 256]


def write_stuff_labels(source: str, target: str, labels: dict[int, int]) -> None:
    """Write the label map of one picture.

    Args:
        source: PNG of segment ids.
        target: PNG to write.
        labels: the label of each segment; id 0 stands for no segment.

    Raises:
        ValueError: a segment has no label.
    """
    found, where = np.unique(read_segment_ids(source), return_inverse=True)
    unknown = [int(segment) for segment in found if segment != 0 and segment not in labels]
    if unknown:
        raise ValueError(f"{source} has segments {unknown[:10]}, which its annotation does not name")
    table = np.array([labels.get(int(segment), UNLABELED) for segment in found], dtype=np.uint8)
    write_png(target, table[where].reshape(where.shape))


def stuff_labels() -> dict[int, int]:
    """The label of each of COCO's category ids: 0 for all things, the class index for stuff."""
    stuff = _get_builtin_metadata("coco_panoptic_separated")["stuff_dataset_id_to_contiguous_id"]
    return {c["id"]: 0 if c["isthing"] else stuff[c["id"]] for c in COCO_CATEGORIES}


def prepare_coco_stuff(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Make COCO's ``panoptic_stuff_*`` of its panoptic annotations, all below ``root``/coco.

    Of the splits train2017, val2017 and val2017_100 those are done whose file of annotations is there. The
    PNGs of the last one may be among those of val2017; they are copied then.

    Args:
        root: the folder of the data sets.
        workers: number of processes; as many as there are processors by default.
        overwrite: make what is there anew.

    Returns:
        The number of label maps written.

    Raises:
        FileNotFoundError: no file of panoptic annotations is there, or a folder of PNGs is not.
        ValueError: an annotation does not fit its PNG, or has a category that COCO has not.
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
        raise FileNotFoundError(f"None of COCO's panoptic annotations is there: {names}.")
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
