"""Cityscapes (https://www.cityscapes-dataset.com) in its own layout, with the fine annotations.

IMAGE_DIR/CITY/NAME_leftImg8bit.png
GT_DIR/CITY/NAME_gtFine_polygons.json         objects from the farthest to the nearest
GT_DIR/CITY/NAME_gtFine_instanceIds.png       16 bits: label * 1000 + number; for stuff and groups label
GT_DIR/CITY/NAME_gtFine_labelIds.png
GT_DIR/CITY/NAME_gtFine_labelTrainIds.png     written by `write_train_ids`
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from detlib.data.datasets.cityscapes_labels import CITYSCAPES_LABELS, cityscapes_label
from detlib.ops import encode_rle
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = [
    "find_cityscapes_files",
    "load_cityscapes_instances",
    "load_cityscapes_semantic",
    "write_train_ids",
]

logger = logging.getLogger(__name__)

_IMAGE_SUFFIX = "_leftImg8bit.png"
_IGNORED_TRAIN_ID = 255
# Polygons connect the centers of the outermost pixels, which belong to the object.
_HALF_PIXEL = 0.5

# Contiguous ids of the classes with instances, by name and by id in the files.
_THINGS = [label for label in CITYSCAPES_LABELS if label.has_instances and not label.ignored]
_CLASS_BY_NAME = {label.name: i for i, label in enumerate(_THINGS)}
_CLASS_BY_ID = {label.id: i for i, label in enumerate(_THINGS)}


def find_cityscapes_files(image_dir: str, gt_dir: str) -> list[tuple[str, str]]:
    """List the images of a split.

    Returns:
        Pairs, sorted by city and name: the path of the image, and the prefix of the paths of its annotations,
        up to and including "_gtFine_".

    Raises:
        FileNotFoundError: The folder does not exist, or has no images.
    """
    if not PathManager.isdir(image_dir):
        raise FileNotFoundError(f"Cityscapes: the image folder {image_dir!r} does not exist.")
    found = []
    for city in sorted(PathManager.ls(image_dir)):
        folder = os.path.join(image_dir, city)
        if not PathManager.isdir(folder):
            continue
        for name in sorted(PathManager.ls(folder)):
            if name.endswith(_IMAGE_SUFFIX):
                stem = name.removesuffix(_IMAGE_SUFFIX) + "_gtFine_"
                found.append((os.path.join(folder, name), os.path.join(gt_dir, city, stem)))
    if not found:
        raise FileNotFoundError(f"Cityscapes: {image_dir!r} has no CITY/*{_IMAGE_SUFFIX}.")
    return found


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True, to_polygons: bool = True
) -> list[dict]:
    """Load the objects of a Cityscapes split as dicts in the standard format.

    The classes are the eight evaluated classes with instances, from 0. Groups of objects without single
    annotations are crowds. The mask of an object is its visible part, which may be disconnected.

    Args:
        image_dir: folder of the images, for example `cityscapes/leftImg8bit/train`.
        gt_dir: folder of the annotations, for example `cityscapes/gtFine/train`.
        from_json: read the polygons, which needs the package shapely (`pip install 'detlib[cityscapes]'`). If
            False, read the PNGs of instance ids, which needs no package.
        to_polygons: return masks as polygons, without the holes due to objects in front. If False, return
            RLE masks; `from_json` must be False.

    Raises:
        FileNotFoundError: A folder or file does not exist.
        ValueError: The arguments are incompatible, or a file is malformed.
        ModuleNotFoundError: shapely is not installed.
    """
    if from_json and not to_polygons:
        raise ValueError(
            "load_cityscapes_instances: from_json=True returns polygons; for to_polygons=False set "
            "from_json=False."
        )
    records = []
    for image_file, stem in find_cityscapes_files(image_dir, gt_dir):
        if from_json:
            record = _record_from_polygons(stem + "polygons.json")
        else:
            record = _record_from_instance_ids(stem + "instanceIds.png", to_polygons)
        records.append({"file_name": image_file, "image_id": os.path.basename(image_file), **record})
    logger.info("Loaded %d images with instances of Cityscapes from %s", len(records), image_dir)
    return records


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[dict]:
    """Load the label maps of a Cityscapes split as dicts in the standard format.

    Args:
        image_dir: folder of the images.
        gt_dir: folder of the annotations, with the PNGs of training ids (see `write_train_ids`).

    Raises:
        FileNotFoundError: A folder or file does not exist.
    """
    records = []
    for image_file, stem in find_cityscapes_files(image_dir, gt_dir):
        labels = stem + "labelTrainIds.png"
        if not PathManager.isfile(labels):
            raise FileNotFoundError(
                f"Cityscapes: {labels!r} does not exist. It is not part of the download; create it "
                f"by `python -m detlib.data.datasets.cityscapes {gt_dir}` (or all files for Cityscapes "
                "by `python -m detlib.data.prepare cityscapes`)."
            )
        with PathManager.open(labels, "rb") as file, Image.open(file) as image:
            width, height = image.size
        records.append(
            {"file_name": image_file, "sem_seg_file_name": labels, "height": height, "width": width}
        )
    logger.info("Loaded %d images with label maps of Cityscapes from %s", len(records), image_dir)
    return records


def to_train_ids(labels: np.ndarray) -> np.ndarray:
    """Convert an (H, W) array of label ids to uint8 training ids, with 255 for ignored labels."""
    train_ids = np.full(256, _IGNORED_TRAIN_ID, np.uint8)
    for label in CITYSCAPES_LABELS:
        if not label.ignored:
            train_ids[label.id] = cast(int, label.train_id)
    return train_ids[labels.astype(np.uint8)]


def write_train_ids(gt_dir: str) -> int:
    """Write a `labelTrainIds` PNG next to each `labelIds` PNG in the city folders of `gt_dir`.

    Returns:
        The number of files written.
    """
    written = 0
    for city in sorted(PathManager.ls(gt_dir)):
        folder = os.path.join(gt_dir, city)
        for name in sorted(PathManager.ls(folder)) if PathManager.isdir(folder) else ():
            if name.endswith("_gtFine_labelIds.png"):
                labels = read_png(os.path.join(folder, name))
                target = os.path.join(folder, name.replace("labelIds", "labelTrainIds"))
                with PathManager.open(target, "wb") as file:
                    Image.fromarray(to_train_ids(labels)).save(file, format="PNG")
                written += 1
    return written


def read_png(path: str) -> np.ndarray:
    """Read a PNG of ids, (H, W). Raise FileNotFoundError if it does not exist."""
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"Cityscapes: the annotation {path!r} does not exist.")
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        return np.asarray(image)


def _record_from_polygons(json_file: str) -> dict[str, Any]:
    """Return size and annotations of an image from its polygon file."""
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(f"Cityscapes: the annotation {json_file!r} does not exist.")
    with PathManager.open(json_file) as file:
        content = json.load(file)
    return {
        "height": content["imgHeight"],
        "width": content["imgWidth"],
        "annotations": _visible_parts(content["objects"], json_file),
    }


def _visible_parts(objects: list[dict], json_file: str) -> list[dict]:
    """Return the annotations of all objects that are not ignored, from the nearest to the farthest."""
    shapely = _import_shapely()
    drawn = []
    for entry in reversed(objects):  # the last object is in front of all others
        if entry.get("deleted"):
            continue
        try:
            label, is_group = cityscapes_label(entry["label"])
        except KeyError as error:
            raise ValueError(f"{json_file}: unknown label {entry['label']!r}.") from error
        if label.id < 0:
            continue
        if len(entry["polygon"]) < 3:
            raise ValueError(f"{json_file}: a polygon of {entry['label']!r} has fewer than three points.")
        drawn.append((label, is_group, entry["polygon"]))
    outlines = [shapely.Polygon(np.asarray(polygon, float) + _HALF_PIXEL) for _, _, polygon in drawn]
    shapes = shapely.buffer(np.array(outlines, dtype=object), _HALF_PIXEL, quad_segs=4)

    tree = shapely.STRtree(shapes)
    annotations = []
    for index, (label, is_group, _) in enumerate(drawn):
        if label.name not in _CLASS_BY_NAME:
            continue
        near = tree.query(shapes[index], predicate="intersects")
        in_front = shapely.union_all(shapes[near[near < index]])
        visible = shapely.get_parts(shapely.difference(shapes[index], in_front))
        visible = [part for part in visible if part.geom_type == "Polygon" and part.area > 0]
        if not visible:
            continue
        annotations.append(
            {
                "iscrowd": int(is_group),
                "category_id": _CLASS_BY_NAME[label.name],
                "bbox": [float(x) for x in shapely.total_bounds(visible)],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": [np.asarray(part.exterior.coords).ravel().tolist() for part in visible],
            }
        )
    return annotations


def _import_shapely() -> Any:
    try:
        import shapely
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading the polygons of Cityscapes needs the package shapely: pip install 'detlib[cityscapes]'. "
            "Without it, load_cityscapes_instances(..., from_json=False) reads the PNGs of instance ids.",
            name="shapely",
        ) from error
    return shapely


def _record_from_instance_ids(png_file: str, to_polygons: bool) -> dict[str, Any]:
    """Return size and annotations of an image from its PNG of instance ids."""
    ids = read_png(png_file)
    annotations = []
    for instance_id in np.unique(ids).tolist():
        is_group = instance_id < 1000
        category = _CLASS_BY_ID.get(instance_id if is_group else instance_id // 1000)
        if category is None:
            continue
        mask = ids == instance_id
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        segmentation = _outlines(mask) if to_polygons else encode_rle(torch.from_numpy(mask)[None])[0]
        if to_polygons and not segmentation:
            continue
        annotations.append(
            {
                "iscrowd": int(is_group),
                "category_id": category,
                "bbox": [float(x) for x in box],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": segmentation,
            }
        )
    return {"height": ids.shape[0], "width": ids.shape[1], "annotations": annotations}


def _outlines(mask: np.ndarray) -> list[list[float]]:
    """Return the outer contours of a mask (H, W) as polygons through the centers of the outermost pixels."""
    import cv2

    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
    return [(contour.ravel() + _HALF_PIXEL).tolist() for contour in contours if len(contour) >= 3]


def _main() -> None:
    """Write the maps of training ids in the folders given on the command line."""
    import sys

    for gt_dir in sys.argv[1:]:
        print(f"{gt_dir}: wrote {write_train_ids(gt_dir)} maps of training ids")


if __name__ == "__main__":
    _main()
