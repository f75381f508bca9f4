"""Datasets in COCO's instance format (https://cocodataset.org/#format-data), and label maps of images."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detlib.data.datasets.coco_reader import CocoReader
from detlib.data.datasets.file_values import is_id, read_json
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_content",
    "load_coco_json",
    "load_sem_seg",
    "read_categories",
    "read_coco_json",
    "register_coco_instances",
]

logger = logging.getLogger(__name__)


def register_coco_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    *,
    empty_boxes: str = "error",
    overwrite: bool = False,
) -> None:
    """Register a dataset in COCO's instance format for detection, instance segmentation or keypoints.

    Args:
        name: the name to use in `cfg.DATASETS`.
        metadata: additional attributes for the metadata of the dataset; may be empty.
        json_file: path of the annotations.
        image_root: folder that the file names in the annotations are relative to.
        empty_boxes: see `load_coco_json`.
        overwrite: replace a dataset that is already registered under `name`.
    """
    for argument, value in (("name", name), ("json_file", json_file), ("image_root", image_root)):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"register_coco_instances: {argument} must be a string or a path, not {value!r}.")
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)

    def load() -> list[dict]:
        return load_coco_json(json_file, image_root, name, empty_boxes=empty_boxes)

    DatasetCatalog.register(name, load, overwrite=overwrite)
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def read_coco_json(json_file: str) -> dict:
    """Read an annotation file and check that it has images and categories.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not JSON, or has no images or no categories.
    """
    path = PathManager.get_local_path(json_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Annotation file {json_file!r} does not exist.")
    coco = read_json(json_file, local=path)
    if not isinstance(coco, dict):
        raise ValueError(
            f"Annotation file {json_file!r} must hold a JSON object with 'images', 'annotations' and "
            f"'categories', not a {type(coco).__name__}."
        )
    for part in ("images", "categories"):
        if not coco.get(part):
            raise ValueError(
                f"Annotation file {json_file!r} has no {part}: the list {part!r} is empty or missing."
            )
    for part in ("images", "categories", "annotations"):
        entries = coco.get(part) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"Annotation file {json_file!r}: {part!r} must be a list of JSON objects.")
    return coco


def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    empty_boxes: str = "error",
) -> list[dict]:
    """Load annotations in COCO's instance format as dicts in the standard format.

    With `dataset_name`, the categories become `thing_classes`, sorted by id, and the `category_id` of an
    annotation is the index into them. The mapping is stored in the metadata, as
    `thing_dataset_id_to_contiguous_id`, and logged. Without `dataset_name`, the ids of the file are kept.

    Boxes stay (x, y, width, height) in pixels. A box of five numbers is rotated: (center x, center y, width,
    height, angle) with the angle in degrees counter-clockwise; its mode is XYWHA_ABS. Keypoints are moved by
    half a pixel: COCO stores pixel indices, detlib measures from the corner of the image. Polygons with fewer
    than three points or without extent are left out. Annotations with no other polygon are left out with a
    warning.

    Args:
        json_file: path of the annotations. `annotations` itself may be missing (test sets), and so may
            `iscrowd`, `area`, `id` and `info`.
        image_root: folder that the file names in the annotations are relative to.
        dataset_name: the dataset whose metadata are filled.
        extra_annotation_keys: keys of the annotations to keep in addition to the standard keys.
        empty_boxes: how to treat a box without area: "error", or "drop" to leave out the annotation with a
            warning. COCO's own training set has two such boxes.

    Returns:
        One dict for each image, sorted by image id.

    Raises:
        FileNotFoundError: The annotation file does not exist.
        ValueError: The file is not an annotation file, or has an error; the message names file, image and
            annotation.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    return load_coco_content(
        read_coco_json(json_file),
        json_file,
        image_root,
        dataset_name,
        extra_annotation_keys,
        empty_boxes=empty_boxes,
    )


def load_coco_content(
    coco: dict,
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    empty_boxes: str = "error",
) -> list[dict]:
    """Load annotations as `load_coco_json` does, from content already read; `json_file` is for messages."""
    id_map = None
    if dataset_name is not None:
        thing_classes, id_map = read_categories(coco["categories"], json_file)
        MetadataCatalog.get(dataset_name).set(
            thing_classes=thing_classes, thing_dataset_id_to_contiguous_id=id_map
        )
        _log_mapping(json_file, thing_classes, id_map)
    reader = CocoReader(json_file, image_root, coco, id_map, tuple(extra_annotation_keys or ()), empty_boxes)
    return reader.read()


def read_categories(categories: list[dict], json_file: str) -> tuple[list[str], dict[int, int]]:
    """Return the category names sorted by id, and the map from id to index in that list."""
    for category in categories:
        if "id" not in category or "name" not in category:
            raise ValueError(f"{json_file}: category {category!r} has no 'id' or no 'name'.")
        if not is_id(category["id"], (int,)) or not isinstance(category["name"], str):
            raise ValueError(
                f"{json_file}: category {category!r} must have an integer as 'id' and a string as 'name'."
            )
    categories = sorted(categories, key=lambda category: category["id"])
    id_map = {category["id"]: i for i, category in enumerate(categories)}
    if len(id_map) < len(categories):
        twice = next(i for i, n in Counter(category["id"] for category in categories).items() if n > 1)
        names = [category["name"] for category in categories if category["id"] == twice]
        raise ValueError(f"{json_file}: {len(names)} categories have the same id {twice}: {names}.")
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        logger.warning(
            "%s: several categories have the same name, %s; they are kept as separate classes",
            json_file,
            twice,
        )
    return names, id_map


def _log_mapping(json_file: str, thing_classes: list[str], id_map: dict[int, int]) -> None:
    if all(category_id == index for category_id, index in id_map.items()):
        logger.info("%s: %d classes, with ids from 0.", json_file, len(thing_classes))
        return
    pairs = [f"{i} -> {index} {thing_classes[index]}" for i, index in id_map.items()]
    shown = ", ".join(pairs[:20]) + (", ..." if len(pairs) > 20 else "")
    logger.info("%s: category ids become class indices: %s", json_file, shown)


def load_sem_seg(gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg") -> list[dict]:
    """Pair the images of a folder with the label maps of another folder that have the same name.

    Args:
        gt_root: folder of the label maps: images whose pixel values are class indices.
        image_root: folder of the images.
        gt_ext: extension of the label maps.
        image_ext: extension of the images.

    Returns:
        Dicts in the standard format, sorted by name, with "file_name" and "sem_seg_file_name". Images without
        a label map and label maps without an image are left out with a warning.

    Raises:
        FileNotFoundError: A folder does not exist, or has no file with its extension.
        ValueError: No name is in both folders.
    """
    images = _files_by_name(image_root, image_ext, "image_root")
    labels = _files_by_name(gt_root, gt_ext, "gt_root")
    names = sorted(images.keys() & labels.keys())
    if not names:
        raise ValueError(
            f"load_sem_seg: no label map in {gt_root!r} has the name of an image in {image_root!r}; the "
            f"first names are {min(labels)!r} and {min(images)!r}."
        )
    unpaired = len(images) + len(labels) - 2 * len(names)
    if unpaired:
        logger.warning(
            "%d files in %s or %s have no counterpart with the same name; %d pairs are used.",
            unpaired,
            image_root,
            gt_root,
            len(names),
        )
    logger.info("Loaded %d images with semantic segmentation from %s", len(names), image_root)
    return [{"file_name": images[name], "sem_seg_file_name": labels[name]} for name in names]


def _files_by_name(folder: str, extension: str, argument: str) -> dict[str, str]:
    """Return the paths of all files with an extension, by name without extension."""
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


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a dataset into `output_file` in COCO's annotation format.

    Args:
        dataset_name: a registered name or a dataset URI; its dicts must be in the standard format.
        output_file: path of the file. Its folder is created if needed.
        allow_cached: do not write the file again if it already has exactly this content. An existing file is
            always compared.
    """
    text = json.dumps(convert_to_coco_dict(dataset_name))
    if allow_cached and PathManager.isfile(output_file):
        with PathManager.open(output_file) as file:
            if file.read() == text:
                logger.info("%s already has the content of dataset %r.", output_file, dataset_name)
                return
    folder = os.path.dirname(output_file)
    if folder:
        PathManager.mkdirs(folder)
    with PathManager.open(output_file, "w") as file:
        file.write(text)
    logger.info("Wrote dataset %r in COCO format into %s", dataset_name, output_file)


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Convert a dataset from the standard dicts to the content of a COCO annotation file.

    Boxes become (x, y, width, height); rotated boxes stay (center x, center y, width, height, angle).
    Keypoints become pixel indices (moved back by half a pixel). Class indices become the category ids of the
    original dataset if its metadata have `thing_dataset_id_to_contiguous_id`. Areas are those of the masks,
    or of the boxes of objects without a mask.

    Args:
        dataset_name: a registered name or a dataset URI.

    Returns:
        A dict with `info`, `licenses`, `images`, `categories` and, if any image dict has annotations,
        `annotations`, numbered from 1.

    Raises:
        ValueError: A dict has no size, or an annotation no box; the message names the image.
    """
    dicts = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    category_ids = _category_ids(metadata)
    images: list[dict] = []
    annotations: list[dict] = []
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
    """Return the map from class index to category id; empty if they are equal."""
    id_map = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {index: category_id for category_id, index in id_map.items()}


def _convert_annotation(
    annotation: dict, size: tuple[int, int], category_ids: dict[int, int], where: str
) -> dict[str, Any]:
    """Convert one annotation. `size` is the image's (height, width), `where` the start of error messages."""
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
    """Return polygons, or an RLE mask that JSON can hold, and the area in pixels."""
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
    """Return the area of a flat polygon (x0, y0, x1, y1, ...), by the shoelace formula."""
    x, y = polygon[0::2], polygon[1::2]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _shorten(annotation: dict) -> str:
    return repr({key: value for key, value in annotation.items() if key != "segmentation"})[:200]
