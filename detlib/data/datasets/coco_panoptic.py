"""Datasets in COCO's panoptic format (https://cocodataset.org/#format-data).

The format has one PNG of segment ids for each image, and a JSON file that describes the segments.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.coco import load_coco_json, load_sem_seg, read_coco_json

__all__ = [
    "load_coco_panoptic_json",
    "merge_to_panoptic",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
]

logger = logging.getLogger(__name__)


def load_coco_panoptic_json(json_file: str, image_dir: str, gt_dir: str, meta: dict[str, Any]) -> list[dict]:
    """Load annotations in COCO's panoptic format as dicts in the standard format.

    Args:
        json_file: path of the annotations.
        image_dir: folder of the images.
        gt_dir: folder of the PNGs of segment ids.
        meta: has `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.

    Returns:
        One dict for each annotation, in the order of the file, with "file_name", "image_id",
        "pan_seg_file_name", "segments_info", and "height" and "width" if the file has them. The entries of
        "segments_info" have "category_id" as a contiguous id, and "isthing".

    Raises:
        FileNotFoundError: The annotation file does not exist.
        ValueError: The file is malformed, or a segment has a category that `meta` does not have.
    """
    coco = read_coco_json(json_file)
    images = {image["id"]: image for image in coco["images"]}
    dicts = []
    for number, annotation in enumerate(coco.get("annotations") or ()):
        missing = [key for key in ("image_id", "file_name", "segments_info") if annotation.get(key) is None]
        if missing:
            raise ValueError(f"{json_file}: annotation number {number} has no {' and no '.join(missing)}.")
        image = images.get(annotation["image_id"])
        if image is None:
            raise ValueError(
                f"{json_file}: the annotation of {annotation['file_name']!r} belongs to image id "
                f"{annotation['image_id']!r}, which is not listed."
            )
        name = image.get("file_name") or os.path.splitext(annotation["file_name"])[0] + ".jpg"
        where = f"{json_file}: segment of {annotation['file_name']!r}"
        dicts.append(
            {
                "file_name": os.path.join(image_dir, name),
                "image_id": annotation["image_id"],
                **{key: image[key] for key in ("height", "width") if key in image},
                "pan_seg_file_name": os.path.join(gt_dir, annotation["file_name"]),
                "segments_info": [_with_contiguous_id(x, meta, where) for x in annotation["segments_info"]],
            }
        )
    if not dicts:
        raise ValueError(f"Annotation file {json_file!r} has no annotations.")
    unannotated = len(images.keys() - {record["image_id"] for record in dicts})
    if unannotated:
        logger.warning(
            "%s: left out %d of %d images, which have no annotation.", json_file, unannotated, len(images)
        )
    logger.info("Loaded %d images in COCO's panoptic format from %s", len(dicts), json_file)
    return dicts


def _with_contiguous_id(segment: dict, meta: dict[str, Any], where: str) -> dict:
    for kind, isthing in (("thing", True), ("stuff", False)):
        contiguous = meta[f"{kind}_dataset_id_to_contiguous_id"].get(segment.get("category_id"))
        if contiguous is not None:
            return {**segment, "category_id": contiguous, "isthing": isthing}
    raise ValueError(
        f"{where} has the category id {segment.get('category_id')!r}, which is neither in "
        "thing_dataset_id_to_contiguous_id nor in stuff_dataset_id_to_contiguous_id."
    )


def merge_to_panoptic(detection_dicts: list[dict], sem_seg_dicts: list[dict]) -> list[dict]:
    """Merge dicts with instances and dicts with label maps of the same images.

    Args:
        detection_dicts: have "file_name" and "annotations"; all of them are returned.
        sem_seg_dicts: have "file_name" and "sem_seg_file_name".

    Returns:
        New dicts with the entries of both, in the order of `detection_dicts`.

    Raises:
        ValueError: There is nothing to merge, or an image has no label map.
    """
    if not sem_seg_dicts:
        raise ValueError("merge_to_panoptic: sem_seg_dicts is empty.")
    labels = {record["file_name"]: record for record in sem_seg_dicts}
    missing = [record["file_name"] for record in detection_dicts if record["file_name"] not in labels]
    if missing:
        raise ValueError(
            f"merge_to_panoptic: {len(missing)} of {len(detection_dicts)} images have no label map, for "
            f"example {missing[0]!r}."
        )
    return [{**record, **labels[record["file_name"]]} for record in detection_dicts]


def register_coco_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Register a dataset in COCO's panoptic format; `load_coco_panoptic_json` loads it.

    Args:
        name: the name to use in `cfg.DATASETS`.
        metadata: attributes for the metadata of the dataset, including `thing_dataset_id_to_contiguous_id`
            and `stuff_dataset_id_to_contiguous_id`.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs of segment ids.
        panoptic_json: path of the panoptic annotations.
        instances_json: path of the instance annotations of the same images, for the COCO metric.
        overwrite: replace a dataset that is already registered under `name`.
    """

    def load() -> list[dict]:
        return load_coco_panoptic_json(panoptic_json, image_root, panoptic_root, metadata)

    facts = {
        "panoptic_root": panoptic_root,
        "image_root": image_root,
        "panoptic_json": panoptic_json,
        "json_file": instances_json,
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": 255,
        "label_divisor": 1000,
    }
    _register(name, load, facts | metadata, overwrite)


def register_coco_panoptic_separated(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    instances_json: str,
    *,
    empty_boxes: str = "error",
    overwrite: bool = False,
) -> None:
    """Register a panoptic dataset with things as instances and stuff as label maps, for Panoptic FPN.

    It is registered under two names: `name`_separated has "annotations" and "sem_seg_file_name",
    `name`_stuffonly has only the latter. In the label maps, 0 means any thing and 255 no label.

    Args:
        name: prefix of the names.
        metadata: attributes for the metadata of both.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs of segment ids.
        panoptic_json: path of the panoptic annotations.
        sem_seg_root: folder of the label maps.
        instances_json: path of the instance annotations.
        empty_boxes: see `load_coco_json`.
        overwrite: replace datasets that are already registered under the names.
    """
    separated, stuff_only = name + "_separated", name + "_stuffonly"

    def load_separated() -> list[dict]:
        return merge_to_panoptic(
            load_coco_json(instances_json, image_root, separated, empty_boxes=empty_boxes), load_stuff()
        )

    def load_stuff() -> list[dict]:
        return load_sem_seg(sem_seg_root, image_root)

    facts = {"image_root": image_root, "sem_seg_root": sem_seg_root, "ignore_label": 255, **metadata}
    panoptic = {"panoptic_root": panoptic_root, "panoptic_json": panoptic_json, "json_file": instances_json}
    _register(
        separated, load_separated, facts | panoptic | {"evaluator_type": "coco_panoptic_seg"}, overwrite
    )
    _register(stuff_only, load_stuff, facts | {"evaluator_type": "sem_seg"}, overwrite)


def _register(name: str, load: Any, metadata: dict[str, Any], overwrite: bool) -> None:
    DatasetCatalog.register(name, load, overwrite=overwrite)
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(**metadata)
