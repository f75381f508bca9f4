"""Cityscapes' training ids and panoptic annotations, equal to those of cityscapesscripts."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from detlib.data.datasets.cityscapes import find_cityscapes_files, read_png, to_train_ids
from detlib.data.datasets.cityscapes_labels import CITYSCAPES_LABELS
from detlib.data.prepare.parallel import check_folder, check_workers, missing, run_jobs, write_png
from detlib.utils.atomic_write import write_bytes_atomically

__all__ = ["prepare_cityscapes"]

_PER_LABEL = 1000  # instance ids are label id * 1000 + number


def write_train_ids(source: str, target: str) -> None:
    """Convert a map of label ids to one of training ids, with 255 for ignored labels."""
    write_png(target, to_train_ids(read_png(source)))


def write_segments(source: str, target: str) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Write the PNG of segment ids of one image in COCO's panoptic format.

    Args:
        source: PNG of instance ids.
        target: PNG to write.

    Returns:
        Height and width, and the entries of `segments_info`.
    """
    instance_ids = read_png(source).astype(np.int64)
    by_id = {label.id: label for label in CITYSCAPES_LABELS}
    kept, segments = np.zeros_like(instance_ids), []
    for segment_id in np.unique(instance_ids).tolist():
        grouped = segment_id < _PER_LABEL
        label = by_id.get(segment_id if grouped else segment_id // _PER_LABEL)
        if label is None:
            raise ValueError(f"{source}: the instance id {segment_id} belongs to no label of Cityscapes")
        if label.ignored:
            continue
        mask = instance_ids == segment_id
        kept[mask] = segment_id
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        segments.append(
            {
                "id": segment_id,
                "category_id": label.id,
                "area": int(mask.sum()),
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
                "iscrowd": int(grouped and label.has_instances),
            }
        )
    colors = np.stack([kept % 256, kept // 256, kept // 256 // 256], axis=2)
    write_png(target, colors.astype(np.uint8))
    return instance_ids.shape, segments


def _categories() -> list[dict[str, Any]]:
    return [
        {
            "id": label.id,
            "name": label.name,
            "color": list(label.color),
            "supercategory": label.category,
            "isthing": int(label.has_instances),
        }
        for label in CITYSCAPES_LABELS
        if not label.ignored
    ]


def _prepare_panoptic(files: list[tuple[str, str]], folder: str, workers: int) -> int:
    """Write the PNGs of a split into `folder`, and the annotations next to it; return the number of PNGs."""
    names = [os.path.basename(stem) for _, stem in files]
    jobs = [
        (stem + "instanceIds.png", os.path.join(folder, f"{name}panoptic.png"))
        for (_, stem), name in zip(files, names)
    ]
    images, annotations = [], []
    found = run_jobs(write_segments, jobs, workers, os.path.basename(folder))
    for name, ((height, width), segments) in zip(names, found):
        image_id = name.removesuffix("_gtFine_")
        images.append(
            {"id": image_id, "width": width, "height": height, "file_name": f"{name}leftImg8bit.png"}
        )
        annotations.append(
            {"image_id": image_id, "file_name": f"{name}panoptic.png", "segments_info": segments}
        )
    content = {"images": images, "categories": _categories(), "annotations": annotations}
    text = json.dumps(content, sort_keys=True, indent=4)
    write_bytes_atomically(folder + ".json", lambda file: file.write(text.encode()))
    return len(jobs)


def prepare_cityscapes(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Derive Cityscapes' maps of training ids and panoptic annotations, below `root`/cityscapes.

    Args:
        root: the folder of the datasets.
        workers: number of processes; by default the number of processors.
        overwrite: write existing files again. Panoptic annotations exist if their JSON file does.

    Returns:
        The number of PNGs written.

    Raises:
        FileNotFoundError: A folder or file of the download does not exist.
        ValueError: A PNG has ids that Cityscapes does not have.
    """
    workers = check_workers(workers)
    base = os.path.join(root, "cityscapes")
    check_folder(os.path.join(base, "gtFine"), "Cityscapes' fine annotations")
    count, done = 0, 0
    for split in ("train", "val", "test"):
        gt_dir = os.path.join(base, "gtFine", split)
        if not os.path.isdir(gt_dir):
            continue
        done += 1
        files = find_cityscapes_files(os.path.join(base, "leftImg8bit", split), gt_dir)
        jobs = [(stem + "labelIds.png", stem + "labelTrainIds.png") for _, stem in files]
        jobs = missing(jobs, overwrite)
        run_jobs(write_train_ids, jobs, workers, f"labelTrainIds of {split}")
        count += len(jobs)
        folder = os.path.join(base, "gtFine", f"cityscapes_panoptic_{split}")
        if split != "test" and (overwrite or not os.path.isfile(folder + ".json")):
            count += _prepare_panoptic(files, folder, workers)
    if not done:
        raise FileNotFoundError(
            f"{os.path.join(base, 'gtFine')!r} has none of the folders train, val and test."
        )
    return count
