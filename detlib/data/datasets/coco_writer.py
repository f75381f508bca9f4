"""From any registered data set to COCO's annotation format, which is what the COCO metric is computed on."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = ["convert_to_coco_dict", "convert_to_coco_json"]

logger = logging.getLogger(__name__)


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Writes a data set into `output_file` in COCO's annotation format.

    Args:
        dataset_name: a registered name or an address; its dicts must be in the standard format.
        output_file: path of the file. Its folder is made if need be.
        allow_cached: leave a file alone that has exactly this content. What is there already is never taken
            for up to date without comparing.
    """
    text = json.dumps(convert_to_coco_dict(dataset_name))
    if allow_cached and PathManager.isfile(output_file):
        with PathManager.open(output_file) as file:
            if file.read() == text:
                logger.info("%s holds dataset %r already.", output_file, dataset_name)
                return
    folder = os.path.dirname(output_file)
    if folder:
        PathManager.mkdirs(folder)
    with PathManager.open(output_file, "w") as file:
        file.write(text)
    logger.info("Wrote dataset %r in COCO format into %s", dataset_name, output_file)


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Converts a data set from the standard dicts to the content of a COCO annotation file.

    Boxes become (x, y, width, height), rotated ones stay (center x, center y, width, height, angle).
    Keypoints become pixel indices (moved back by half a pixel). Class indices become the category ids of the
    original data set if its metadata has `thing_dataset_id_to_contiguous_id`. Areas are those of the masks,
    or of the boxes where there is no mask.

    Args:
        dataset_name: a registered name or an address.

    Returns:
        A dict with `info`, `licenses`, `images`, `categories` and, unless no image dict has any,
        `annotations`, numbered from 1.

    Raises:
        ValueError: a dict lacks its size or an annotation its box; the message names the image.
    """
    dicts = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    category_ids = _category_ids(metadata)
    images, annotations = [], []
    for index, record in enumerate(dicts):
        file_name = str(record.get("file_name", ""))
        if record.get("height") is None or record.get("width") is None:
            raise ValueError(f"Dataset {dataset_name!r}: image {file_name!r} has no height or no width.")
        image_id = record.get("image_id", index)
        images.append(
            {"id": image_id, "width": record["width"], "height": record["height"], "file_name": file_name}
        )
        for annotation in record.get("annotations", ()):
            where = f"Dataset {dataset_name!r}, image {file_name!r}"
            converted = _convert_annotation(
                annotation, (record["height"], record["width"]), category_ids, where
            )
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **converted})

    names = metadata.get("thing_classes", ())
    coco = {
        "info": {"description": f"dataset {dataset_name}, converted by detlib"},
        "licenses": [],
        "images": images,
        "categories": [{"id": category_ids.get(i, i), "name": name} for i, name in enumerate(names)],
    }
    if any("annotations" in record for record in dicts):
        coco["annotations"] = annotations
    return coco


def _category_ids(metadata: Metadata) -> dict[int, int]:
    """Returns the map from class index to category id; empty where they are the same."""
    id_map = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {index: category_id for category_id, index in id_map.items()}


def _convert_annotation(
    annotation: dict, size: tuple[int, int], category_ids: dict[int, int], where: str
) -> dict[str, Any]:
    """Converts one annotation. `size` is the picture's (height, width), `where` begins the error messages."""
    for key in ("bbox", "bbox_mode", "category_id"):
        if annotation.get(key) is None:
            raise ValueError(f"{where}: annotation {_shorten(annotation)} has no {key!r}.")
    is_rotated = annotation["bbox_mode"] == BoxMode.XYWHA_ABS
    mode = BoxMode.XYWHA_ABS if is_rotated else BoxMode.XYWH_ABS
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], mode)
    box = [float(value) for value in box]
    category = annotation["category_id"]
    converted: dict[str, Any] = {
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "category_id": category_ids.get(category, category),
    }
    if annotation.get("segmentation") is not None and len(annotation["segmentation"]):
        segmentation, area = _convert_segmentation(annotation["segmentation"], size)
        converted.update(segmentation=segmentation, area=area)
    if "keypoints" in annotation:
        keypoints = np.asarray(annotation["keypoints"], dtype=np.float64).reshape(-1, 3).copy()
        keypoints[:, :2] -= 0.5
        converted["keypoints"] = keypoints.ravel().tolist()
        converted["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    return converted


def _convert_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Any, float]:
    """Returns polygons, or an RLE mask as JSON can hold it, and the area in pixels."""
    if isinstance(segmentation, dict):
        from pycocotools import mask as mask_utils

        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = mask_utils.frPyObjects(rle, *size)
        counts = rle["counts"]
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        return {"size": [int(n) for n in rle["size"]], "counts": text}, float(mask_utils.area(rle))
    polygons = [np.asarray(polygon, dtype=np.float64).ravel() for polygon in segmentation]
    return [polygon.tolist() for polygon in polygons], sum(map(_polygon_area, polygons))


def _polygon_area(polygon: np.ndarray) -> float:
    """Returns the area inside a flat (x0, y0, x1, y1, ...) polygon, by the shoelace formula."""
    x, y = polygon[0::2], polygon[1::2]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _shorten(annotation: dict) -> str:
    return repr({key: value for key, value in annotation.items() if key != "segmentation"})[:200]
