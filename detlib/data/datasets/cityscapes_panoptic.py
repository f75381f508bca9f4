"""Cityscapes in COCO's panoptic format, as cityscapesscripts' csCreatePanopticImgs writes it."""

from __future__ import annotations

import logging
import os
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.builtin_meta import _get_builtin_metadata
from detlib.data.datasets.cityscapes import find_cityscapes_files
from detlib.data.datasets.coco import read_coco_json
from detlib.utils.file_io import PathManager

__all__ = [
    "get_cityscapes_panoptic_files",
    "load_cityscapes_panoptic",
    "register_all_cityscapes_panoptic",
]

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val")
_PREPARE = (
    "Create the panoptic annotations with `python -m detlib.data.prepare cityscapes` (or cityscapesscripts' "
    "csCreatePanopticImgs)."
)


def get_cityscapes_panoptic_files(
    image_dir: str, gt_dir: str, json_info: dict[str, Any]
) -> list[tuple[str, str, list[dict]]]:
    """Find the annotations of all images of a split.

    Args:
        image_dir: folder of the images.
        gt_dir: folder of the PNGs of segment ids.
        json_info: content of the annotation file.

    Returns:
        For each image its path, the path of its PNG, and its segments as in the file.

    Raises:
        FileNotFoundError: A folder does not exist, or has no images.
        ValueError: An image has no annotation.
    """
    annotations = {annotation["image_id"]: annotation for annotation in json_info["annotations"]}
    files = []
    for image_file, _ in find_cityscapes_files(image_dir, gt_dir):
        image_id = _image_id(image_file)
        if image_id not in annotations:
            raise ValueError(
                f"Cityscapes: {image_file!r} (id {image_id!r}) has no panoptic annotation. {_PREPARE}"
            )
        annotation = annotations[image_id]
        files.append((image_file, os.path.join(gt_dir, annotation["file_name"]), annotation["segments_info"]))
    return files


def load_cityscapes_panoptic(
    image_dir: str, gt_dir: str, gt_json: str, meta: dict[str, Any]
) -> list[dict[str, Any]]:
    """Load the panoptic annotations of a Cityscapes split as dicts in the standard format.

    Args:
        image_dir: folder of the images, for example `cityscapes/leftImg8bit/train`.
        gt_dir: folder of the PNGs of segment ids, for example `cityscapes/gtFine/cityscapes_panoptic_train`.
        gt_json: path of the annotation file.
        meta: has `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.

    Returns:
        Dicts with "file_name", "image_id", "sem_seg_file_name" (the map of training ids),
        "pan_seg_file_name" and "segments_info", with training ids as "category_id".

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: An image has no annotation, or a segment has a category that `meta` does not have.
    """
    if not PathManager.isfile(gt_json):
        raise FileNotFoundError(f"Annotation file {gt_json!r} does not exist. {_PREPARE}")
    maps = [meta[f"{kind}_dataset_id_to_contiguous_id"] for kind in ("thing", "stuff")]
    contiguous = {**maps[0], **maps[1]}
    records = []
    for image_file, label_file, segments in get_cityscapes_panoptic_files(
        image_dir, gt_dir, read_coco_json(gt_json)
    ):
        unknown = [x["category_id"] for x in segments if x["category_id"] not in contiguous]
        if unknown:
            raise ValueError(
                f"{gt_json}: segments of {label_file!r} have the category ids {unknown}, which the "
                "metadata do not have. They must be ids of labelIds (created without --use-train-id)."
            )
        labels = image_file.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        records.append(
            {
                "file_name": image_file,
                "image_id": _image_id(image_file),
                "sem_seg_file_name": labels.replace("leftImg8bit", "gtFine"),
                "pan_seg_file_name": label_file,
                "segments_info": [
                    {**x, "category_id": contiguous[x["category_id"]], "isthing": x["category_id"] in maps[0]}
                    for x in segments
                ],
            }
        )
    logger.info("Loaded %d images in panoptic format of Cityscapes from %s", len(records), image_dir)
    return records


def register_all_cityscapes_panoptic(root: str) -> None:
    """Register Cityscapes' panoptic annotations below `root`/cityscapes."""
    metadata = _get_builtin_metadata("cityscapes_panoptic")
    for split in _SPLITS:
        name = f"cityscapes_fine_panoptic_{split}"
        image_dir = os.path.join(root, "cityscapes", "leftImg8bit", split)
        panoptic = os.path.join(root, "cityscapes", "gtFine", f"cityscapes_panoptic_{split}")
        gt_json = panoptic + ".json"
        _register(name, image_dir, panoptic, gt_json, metadata)
        MetadataCatalog.get(name).set(
            panoptic_root=panoptic,
            image_root=image_dir,
            panoptic_json=gt_json,
            gt_dir=os.path.join(root, "cityscapes", "gtFine", split),
            evaluator_type="cityscapes_panoptic_seg",
            ignore_label=255,
            label_divisor=1000,
            **metadata,
        )


def _register(name: str, image_dir: str, gt_dir: str, gt_json: str, metadata: dict[str, Any]) -> None:
    def load() -> list[dict]:
        return load_cityscapes_panoptic(image_dir, gt_dir, gt_json, metadata)

    DatasetCatalog.register(name, load)


def _image_id(image_file: str) -> str:
    """Return city, sequence and frame, joined as in the file names."""
    return os.path.basename(image_file).removesuffix("_leftImg8bit.png")
