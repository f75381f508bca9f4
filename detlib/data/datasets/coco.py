"""Data sets in COCO's instance format (https://cocodataset.org/#format-data)."""

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
    """Registers a data set in COCO's instance format for detection, instance segmentation or keypoints.

    Args:
        name: the name, as it will stand in `cfg.DATASETS`.
        metadata: more attributes for the data set's metadata; may be empty.
        json_file: path of the annotations.
        image_root: folder that the file names in the annotations are relative to.
        empty_boxes: see `load_coco_json`.
        overwrite: replace what `name` stands for already.
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
    """Reads an annotation file and checks that it has the parts of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or lacks images or categories.
    """
    path = PathManager.get_local_path(json_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Annotation file {json_file!r} does not exist.")
    with open(path, "rb") as file:
        try:
            coco = json.loads(file.read())  # of bytes it takes UTF-16 and marks of byte order, too
        except ValueError as error:
            raise ValueError(f"Annotation file {json_file!r} is not valid JSON: {error}") from error
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
    """Loads annotations in COCO's instance format as dicts in the standard format.

    With `dataset_name`, the categories become `thing_classes` in the order of their ids and the annotations'
    `category_id` is the index into them; the mapping stands in the metadata, as
    `thing_dataset_id_to_contiguous_id`, and in the log. Without, ids stay as they are in the file.

    Boxes stay (x, y, width, height) in pixels; those of five numbers are rotated ones, (center x, center y,
    width, height, angle) with the angle in degrees counter-clockwise, and have the mode XYWHA_ABS. Keypoints
    are moved by half a pixel: COCO counts whole pixels from 0, detlib measures from the picture's corner.
    Polygons of fewer than three points or of no extent are left out, and with a warning the annotations that
    have no other.

    Args:
        json_file: path of the annotations. `annotations` itself may be missing (test sets), and so may
            `iscrowd`, `area`, `id` and `info`.
        image_root: folder that the file names in the annotations are relative to.
        dataset_name: the data set whose metadata is filled.
        extra_annotation_keys: keys of the annotations that are to be kept beside the standard ones.
        empty_boxes: what to do about a box without an area: "error", or "drop" for leaving out the annotation
            with a warning. COCO's own training set has two of them.

    Returns:
        One dict for each image, sorted by image id.

    Raises:
        FileNotFoundError: there is no such annotation file.
        ValueError: the file is no annotation file or has an error; the message names file, image and
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
    """`load_coco_json` for content that was read before; `json_file` is for the messages."""
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
    """Returns the category names in the order of their ids, and the map from id to index in that list."""
    for category in categories:
        if "id" not in category or "name" not in category:
            raise ValueError(f"{json_file}: category {category!r} has no 'id' or no 'name'.")
        if type(category["id"]) is not int or not isinstance(category["name"], str):
            raise ValueError(
                f"{json_file}: category {category!r} must have a whole number as 'id' and a string as 'name'."
            )
    categories = sorted(categories, key=lambda category: category["id"])
    id_map = {category["id"]: i for i, category in enumerate(categories)}
    if len(id_map) < len(categories):
        twice = next(i for i, n in Counter(category["id"] for category in categories).items() if n > 1)
        names = [category["name"] for category in categories if category["id"] == twice]
        raise ValueError(f"{json_file}: category id {twice} is given to {len(names)} categories: {names}.")
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        logger.warning("%s: several categories have one name: %s; they stay apart", json_file, twice)
    return names, id_map


def _log_mapping(json_file: str, thing_classes: list[str], id_map: dict[int, int]) -> None:
    if all(category_id == index for category_id, index in id_map.items()):
        logger.info("%s: %d classes, with ids from 0.", json_file, len(thing_classes))
        return
    pairs = [f"{i} -> {index} {thing_classes[index]}" for i, index in id_map.items()]
    shown = ", ".join(pairs[:20]) + (", ..." if len(pairs) > 20 else "")
    logger.info("%s: category ids become class indices: %s", json_file, shown)


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


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Writes a data set into `output_file` in COCO's annotation format.

    Args:
        dataset_name: a registered name or a dataset URI; its dicts must be in the standard format.
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
        dataset_name: a registered name or a dataset URI.

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
