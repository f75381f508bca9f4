"""Roboflow's COCO export: a folder for each split, with its images and `_annotations.coco.json`.

The first category has id 0 and stands for the entire dataset: it is the supercategory of the others, and no
annotation has it. It is not a class.
"""

from __future__ import annotations

import os
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.coco import load_coco_content, read_categories, read_coco_json
from detlib.data.datasets.keypoint_names import keypoint_metadata
from detlib.data.datasets.split_names import split_names
from detlib.utils.file_io import PathManager

__all__ = [
    "ANNOTATION_FILE",
    "find_roboflow_split",
    "load_roboflow",
    "read_roboflow_json",
    "register_roboflow",
    "roboflow_metadata",
    "roboflow_splits",
    "without_root_category",
]

ANNOTATION_FILE = "_annotations.coco.json"


def register_roboflow(
    name: str, dirname: str, split: str, *, empty_boxes: str = "error", overwrite: bool = False
) -> None:
    """Register a split of Roboflow's COCO export.

    Args:
        name: the name to use in `cfg.DATASETS`.
        dirname: the folder with the folders of the splits.
        split: "train", "valid" or "test".
        empty_boxes: see `detlib.data.datasets.load_coco_json`.
        overwrite: replace a dataset that is already registered under `name`.
    """
    folder = find_roboflow_split(dirname, split)
    DatasetCatalog.register(
        name, lambda: load_roboflow(dirname, split, name, empty_boxes=empty_boxes), overwrite=overwrite
    )
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(**roboflow_metadata(folder))


def find_roboflow_split(dirname: str, split: str) -> str:
    """Return the folder of a split; "val" finds "valid" too.

    Raises:
        FileNotFoundError: No such folder has annotations; the message lists the existing splits.
    """
    for name in split_names(split):
        folder = os.path.join(dirname, name)
        if PathManager.isfile(os.path.join(folder, ANNOTATION_FILE)):
            return folder
    if not PathManager.isdir(dirname):
        raise FileNotFoundError(f"Folder {dirname!r} does not exist.")
    splits = roboflow_splits(dirname)
    raise FileNotFoundError(
        f"{os.path.join(dirname, split, ANNOTATION_FILE)!r} does not exist. {dirname!r} has the splits: "
        f"{', '.join(splits) or 'none'}."
    )


def roboflow_splits(dirname: str) -> list[str]:
    """Return the names of the folders that have annotations."""
    names = sorted(PathManager.ls(dirname))
    return [name for name in names if PathManager.isfile(os.path.join(dirname, name, ANNOTATION_FILE))]


def without_root_category(coco: dict) -> dict:
    """Return the content of an annotation file without the category that stands for the entire dataset.

    That category has id 0 and the supercategory "none", is the supercategory of others, and has no
    annotations.
    """
    categories = coco.get("categories") or []
    parents = [category.get("supercategory") for category in categories if category.get("id") != 0]
    root = [
        category
        for category in categories
        if category.get("id") == 0
        and category.get("supercategory") == "none"
        and (category.get("name") in parents)
    ]
    used = any(annotation.get("category_id") == 0 for annotation in coco.get("annotations") or ())
    if not root or used:
        return coco
    return {**coco, "categories": [category for category in categories if category is not root[0]]}


def read_roboflow_json(folder: str) -> dict:
    """Read the annotation file in the folder of a split, without the root category."""
    return without_root_category(read_coco_json(os.path.join(folder, ANNOTATION_FILE)))


def roboflow_metadata(folder: str) -> dict[str, Any]:
    """Return the metadata of the split in a folder: classes, image folder, and keypoints if there are any."""
    json_file = os.path.join(folder, ANNOTATION_FILE)
    categories = read_roboflow_json(folder)["categories"]
    thing_classes, id_map = read_categories(categories, json_file)
    return {
        "evaluator_type": "coco",
        "image_root": folder,
        "thing_classes": thing_classes,
        "thing_dataset_id_to_contiguous_id": id_map,
        **keypoint_metadata(categories, json_file),
    }


def load_roboflow(
    dirname: str, split: str, dataset_name: str | None = None, *, empty_boxes: str = "error"
) -> list[dict]:
    """Load a split of Roboflow's COCO export as dicts in the standard format.

    Args:
        dirname: the folder with the folders of the splits.
        split: "train", "valid" or "test".
        dataset_name, empty_boxes: see `detlib.data.datasets.load_coco_json`.

    Returns:
        One dict for each image, sorted by image id.

    Raises:
        FileNotFoundError: The split does not exist.
        ValueError: The annotations have an error; the message names file, image and annotation.
    """
    folder = find_roboflow_split(dirname, split)
    json_file = os.path.join(folder, ANNOTATION_FILE)
    return load_coco_content(
        read_roboflow_json(folder), json_file, folder, dataset_name, empty_boxes=empty_boxes
    )
