"""A generated dataset for first steps and tests: circles, squares and triangles on textured backgrounds.

It has boxes, polygons, keypoints, stuff labels and panoptic segments, and is generated on first use in a few
seconds. The same parameters give the same images on any machine; a larger number adds images and keeps the
first ones. A variant has rectangles with rotated boxes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from detlib.data.datasets.shapes_scene import (
    KEYPOINTS,
    RECTANGLES,
    SHAPES,
    STUFF,
    UNIT,
    Scene,
    draw_scene,
    sample_scene,
)
from detlib.structures import BoxMode
from detlib.structures.panoptic import id_to_rgb

__all__ = ["SHAPES_METADATA", "ShapesParameters", "load_shapes", "shapes_metadata"]

logger = logging.getLogger(__name__)

# Part of the name of the cache folder. Increase it with any change of the drawn images or written files.
_VERSION = 2
_SPLITS = {"train": 0, "val": 1}

SHAPES_METADATA: dict[str, Any] = {
    "thing_classes": list(SHAPES),
    "thing_colors": [(230, 60, 60), (60, 90, 230), (240, 190, 40)],
    "stuff_classes": ["things", *STUFF],
    "stuff_colors": [(120, 40, 120), (60, 130, 55), (196, 170, 112), (50, 105, 165)],
    "ignore_label": 255,
    "keypoint_names": list(KEYPOINTS),
    "keypoint_flip_map": [("left", "right")],
    "keypoint_connection_rules": [
        ("center", "top", (255, 255, 255)),
        ("center", "left", (255, 120, 0)),
        ("center", "right", (0, 160, 255)),
        ("center", "bottom", (160, 160, 160)),
    ],
    "keypoint_oks_sigmas": [0.05] * len(KEYPOINTS),
}


@dataclass(frozen=True)
class ShapesParameters:
    """The parameters of a generated dataset.

    Attributes:
        split: "train" or "val"; they share no image.
        num: number of images, 1000 for train and 200 for val by default.
        size: height and width of the images in pixels, 32 to 1024.
        seed: another seed gives other images.
        rotated: if 1, the objects are rectangles of any direction, with rotated boxes and without keypoints.
    """

    split: str
    num: int = 0
    size: int = 128
    seed: int = 0
    rotated: int = 0

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise ValueError(f"the generated shapes have no split {self.split!r}, only 'train' and 'val'")
        if not self.num:
            object.__setattr__(self, "num", {"train": 1000, "val": 200}[self.split])
        ranges = (("num", 1, 10**6), ("size", 32, 1024), ("seed", 0, 2**31 - 1), ("rotated", 0, 1))
        for name, low, high in ranges:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: {low} to {high}")


def shapes_metadata(parameters: ShapesParameters) -> dict[str, Any]:
    """Return the metadata of a generated dataset."""
    if not parameters.rotated:
        return dict(SHAPES_METADATA)
    common = {k: v for k, v in SHAPES_METADATA.items() if not k.startswith("keypoint")}
    return {**common, "thing_classes": list(RECTANGLES), "thing_colors": [(230, 60, 60), (60, 90, 230)]}


def load_shapes(parameters: ShapesParameters) -> list[dict]:
    """Return a generated dataset as dicts in the standard format, and draw its images on first use.

    The images are stored as PNG below `$DETLIB_CACHE`, by default below `~/.cache/detlib`.

    Each dict also has `sem_seg_file_name`, a PNG of indices into `stuff_classes` with 0 for shapes, and
    `pan_seg_file_name` with `segments_info`, in COCO's panoptic format with contiguous category ids. Polygons
    include hidden parts. Keypoints hidden by another shape have visibility 1.
    """
    folder = _cache_folder(parameters)
    if not _is_complete(folder, parameters.num):
        _generate(parameters, folder)
    with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
        dicts = json.load(file)
    for record in dicts:
        record["file_name"] = os.path.join(folder, record["file_name"])
        for key in ("sem_seg_file_name", "pan_seg_file_name"):
            record[key] = os.path.join(folder, record[key])
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode.XYWHA_ABS if parameters.rotated else BoxMode.XYXY_ABS
    return dicts


def _cache_folder(parameters: ShapesParameters) -> str:
    root = os.environ.get("DETLIB_CACHE") or os.path.join("~", ".cache", "detlib")
    shown = {key: value for key, value in asdict(parameters).items() if key != "rotated" or value}
    name = "-".join(f"{key}_{value}" for key, value in shown.items())
    return os.path.join(os.path.expanduser(root), "shapes", f"v{_VERSION}-{name}")


def _is_complete(folder: str, num: int) -> bool:
    return os.path.isdir(folder) and len(os.listdir(folder)) == 3 * num + 1


def _generate(parameters: ShapesParameters, folder: str) -> None:
    """Draw the dataset into a temporary folder, then rename the folder.

    Several processes may do so at the same time: the folder of the first is kept.
    """
    logger.info("Drawing %d images of shapes into %s", parameters.num, folder)
    root = os.path.dirname(folder)
    try:
        os.makedirs(root, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix="drawing-", dir=root)
    except OSError as error:
        raise OSError(
            f"Cannot write the generated shapes into {root!r} ({error}). Set the environment variable "
            "DETLIB_CACHE to a writable folder."
        ) from error
    try:
        dicts = [_generate_image(parameters, i, temporary) for i in range(parameters.num)]
        with open(os.path.join(temporary, "dataset.json"), "w", encoding="utf-8") as file:
            json.dump(dicts, file)
        if os.path.isdir(folder) and not _is_complete(folder, parameters.num):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _is_complete(folder, parameters.num):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generate_image(parameters: ShapesParameters, index: int, folder: str) -> dict:
    """Draw and write image `index` and its labels; return its dict, with names relative to the folder."""
    random = np.random.RandomState([parameters.seed, _SPLITS[parameters.split], index])
    scene = sample_scene(random, parameters.size, bool(parameters.rotated))
    image, labels, owners = draw_scene(random, scene)
    names = {
        "file_name": f"{index:06d}.png",
        "sem_seg_file_name": f"{index:06d}_stuff.png",
        "pan_seg_file_name": f"{index:06d}_panoptic.png",
    }
    ids, segments = _segments(scene, labels, owners)
    for name, array in zip(names.values(), (image, labels, id_to_rgb(ids))):
        Image.fromarray(array).save(os.path.join(folder, name), compress_level=1)
    return {
        **names,
        "image_id": index + 1,
        "height": parameters.size,
        "width": parameters.size,
        "annotations": [_annotation(scene, i, owners) for i in range(len(scene.shapes))],
        "segments_info": segments,
    }


def _segments(scene: Scene, labels: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """Return the segment id of each pixel, (H, W) int64, and the segments: shapes first, then stuff."""
    num_shapes = len(scene.shapes)
    ids = np.where(owners >= 0, 1 + owners, num_shapes + labels)
    segments = []
    for i in np.unique(ids).tolist():
        isthing = i <= num_shapes
        category = scene.shapes[i - 1].category if isthing else i - num_shapes
        segments.append({"id": i, "category_id": category, "isthing": isthing, "iscrowd": 0})
    return ids, segments


def _annotation(scene: Scene, index: int, owners: np.ndarray) -> dict:
    shape = scene.shapes[index]
    polygon = (shape.outline / UNIT).ravel().tolist()
    if shape.rotated_box is not None:
        *sizes, angle = shape.rotated_box
        box = [*(value / UNIT for value in sizes), float(angle)]
        return {"category_id": shape.category, "bbox": box, "segmentation": [polygon], "iscrowd": 0}
    keypoints: list[float] = []
    for x, y in shape.keypoints.tolist():
        seen = owners[min(y // UNIT, scene.size - 1), min(x // UNIT, scene.size - 1)]
        keypoints += [x / UNIT, y / UNIT, 1 if seen > index else 2]
    return {
        "category_id": shape.category,
        "bbox": (shape.box / UNIT).tolist(),
        "segmentation": [polygon],
        "keypoints": keypoints,
        "iscrowd": 0,
    }
