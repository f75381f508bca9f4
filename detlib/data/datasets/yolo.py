"""Datasets in Ultralytics' YOLO format: boxes, polygons or poses (https://docs.ultralytics.com/datasets/).

A line of a label file is `class cx cy w h` for a box, `class x1 y1 x2 y2 ...` for a polygon, or with
`kpt_shape` in the data.yaml `class cx cy w h x1 y1 [v1] ...` for a pose. If all lines of a split have four
points, they are oriented boxes. Coordinates are normalized by the size of the image.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.file_values import MAX_COORDINATE, are_coordinates
from detlib.data.datasets.keypoint_names import left_right_pairs, warn_of_no_pairs
from detlib.data.datasets.rotated_corners import fit_rotated_box
from detlib.data.datasets.yolo_labels import LabelFinder, find_labels, label_file_of
from detlib.data.datasets.yolo_layout import YoloConfig, find_yolo_images, read_yolo_config
from detlib.data.image_io import read_image_size
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

__all__ = [
    "SLACK",
    "has_oriented_boxes",
    "load_yolo",
    "read_label_rows",
    "register_yolo",
    "row_to_annotation",
    "to_rotated",
    "yolo_metadata",
]

logger = logging.getLogger(__name__)

# Tools write coordinates with few digits. Rounding may move them out of the image.
SLACK = 0.01
# Pixels that were integers have a far smaller rounding error than this many digits.
_DIGITS = 6


def register_yolo(
    name: str, yaml_file: str, split: str, *, empty_boxes: str = "error", overwrite: bool = False
) -> None:
    """Register a dataset in YOLO's format.

    Args:
        name: the name to use in `cfg.DATASETS`.
        yaml_file: path of the data.yaml, or another description that `read_yolo_config` reads.
        split: "train", "val" or "test".
        empty_boxes: see `load_yolo`.
        overwrite: replace a dataset that is already registered under `name`.

    Raises:
        FileNotFoundError, ValueError: The data.yaml does not exist or is malformed.
    """
    metadata = yolo_metadata(read_yolo_config(yaml_file), split)
    DatasetCatalog.register(
        name, lambda: load_yolo(yaml_file, split, empty_boxes=empty_boxes), overwrite=overwrite
    )
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(**metadata)


def yolo_metadata(config: YoloConfig, split: str, *, rotated: bool = True) -> dict[str, Any]:
    """Return the metadata of a split: classes, keypoints if there are any, and the evaluator.

    Args:
        config: the dataset.
        split: name of the split.
        rotated: whether oriented boxes are read as rotated boxes, see `load_yolo`.
    """
    finder = LabelFinder()
    files = filter(None, map(finder.find, find_yolo_images(config, split)))
    # Usually the first file decides.
    is_oriented = rotated and has_oriented_boxes(config, (list(read_label_rows(file)) for file in files))
    metadata: dict[str, Any] = {
        "evaluator_type": "rotated_coco" if is_oriented else "coco",
        "yaml_file": config.file,
        "split": split,
        "thing_classes": list(config.names),
    }
    if config.kpt_shape is None:
        return metadata
    names = list(config.kpt_names)
    if config.flip_idx is not None:
        pairs = [(names[i], names[j]) for i, j in enumerate(config.flip_idx) if i < j]
    else:
        pairs = left_right_pairs(names)
        warn_of_no_pairs(names, pairs, f"{config.file} has no flip_idx")
    return {
        **metadata,
        "keypoint_names": names,
        "keypoint_flip_map": pairs,
        "keypoint_connection_rules": [],
    }


def has_oriented_boxes(config: YoloConfig, rows: Iterable[list[tuple[int, list[str]]]]) -> bool:
    """Return whether all lines are four points: oriented boxes, as CVAT, Roboflow and Ultralytics write them.

    Args:
        config: has the keypoints; poses are not oriented boxes.
        rows: the lines of each label file.
    """
    if config.kpt_shape is not None:
        return False
    found = False
    for lines in rows:
        if any(len(words) != 9 for _, words in lines):
            return False
        found = found or bool(lines)
    return found


def _warn_of_mixed_lines(rows: list[list[tuple[int, list[str]]]], yaml_file: str) -> None:
    lengths = Counter(
        min(len(words), 10) if len(words) in (5, 9) else 0 for lines in rows for _, words in lines
    )
    boxes, four, other = lengths[5], lengths[9], lengths[0]
    if boxes and (four or other):
        logger.warning(
            "%s: %d lines are boxes and %d are polygons. An object without a polygon has no mask; to train a "
            "mask head, all need one.",
            yaml_file,
            boxes,
            four + other,
        )
    if four and boxes and not other:
        logger.warning(
            "%s: the %d lines with four points are read as polygons; oriented boxes are recognized only if "
            "all lines have four points",
            yaml_file,
            four,
        )


def load_yolo(yaml_file: str, split: str, *, empty_boxes: str = "error", rotated: bool = True) -> list[dict]:
    """Load a split of a dataset in YOLO's format as dicts in the standard format.

    The sizes of the images are read from their headers, after the EXIF rotation. Boxes become XYXY_ABS; the
    box of a polygon is its extent. Coordinates are rounded to 1e-6 pixel, so that integer pixels stay
    integers. Keypoints of two values are visible (2), except that those at (0, 0) or with a negative value
    are not labeled (0). Images without label files have no objects, and are counted in the log. Duplicate
    lines of a file are read once, with a warning.

    Args:
        yaml_file: path of the data.yaml, or another description that `read_yolo_config` reads.
        split: "train", "val" or "test".
        empty_boxes: how to treat a box without area: "error", or "drop" to leave it out with a warning.
        rotated: whether oriented boxes become rotated boxes, (center x, center y, width, height, angle) in
            XYWHA_ABS; else they are polygons with their extents.

    Returns:
        One dict for each image, in the order of a list file, or sorted for a folder. `image_id` is the file
        name without suffix, or the path if two files have the same name.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: A file is malformed, and the message names file and line; or no image has a label file.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    config = read_yolo_config(yaml_file)
    paths = find_yolo_images(config, split)
    files = find_labels(paths, f"{yaml_file}, split {split!r}")
    with ThreadPoolExecutor(8) as pool:  # most of the time is waiting for disks and object stores
        sizes = list(pool.map(read_image_size, paths))
        rows = list(pool.map(lambda file: list(read_label_rows(file)) if file else [], files))
    as_rotated = rotated and has_oriented_boxes(config, rows)
    if not as_rotated and config.kpt_shape is None:
        _warn_of_mixed_lines(rows, yaml_file)
    dropped: Counter[str] = Counter()
    dicts = []
    for path, image_id, size, file, lines in zip(paths, _image_ids(paths), sizes, files, rows):
        file = file or label_file_of(path)
        annotations = _annotations(lines, file, size, config, empty_boxes, dropped, as_rotated)
        dicts.append(
            {
                "file_name": path,
                "image_id": image_id,
                "height": size[1],
                "width": size[0],
                "annotations": annotations,
            }
        )
    for what, count in dropped.items():
        logger.warning("%s: left out %d %s.", yaml_file, count, what)
    logger.info("Loaded %d images of split %r in YOLO format from %s", len(dicts), split, yaml_file)
    return dicts


def _image_ids(paths: list[str]) -> list[str]:
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    return stems if len(set(stems)) == len(stems) else [os.path.splitext(path)[0] for path in paths]


def read_label_rows(label_file: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line, from 1, and its words; nothing if the file does not exist.

    Raises:
        ValueError: The file is not text.
    """
    try:
        with PathManager.open(label_file, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise ValueError(f"Label file {label_file!r} is not text: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.split()


def _annotations(
    lines: list[tuple[int, list[str]]],
    label_file: str,
    size: tuple[int, int],
    config: YoloConfig,
    empty_boxes: str,
    dropped: Counter[str],
    as_rotated: bool,
) -> list[dict]:
    annotations = []
    seen = set()
    for number, words in lines:
        where = f"{label_file}, line {number}"
        if tuple(words) in seen:
            dropped["duplicate lines"] += 1
            continue
        seen.add(tuple(words))
        annotation = row_to_annotation(words, size, config, where)
        _check_range(words, annotation, where)
        x0, y0, x1, y1 = annotation["bbox"]
        if as_rotated:
            annotation = to_rotated(annotation)
            x0, y0, x1, y1 = 0.0, 0.0, annotation["bbox"][2], annotation["bbox"][3]
        if x1 > x0 and y1 > y0:
            annotations.append(annotation)
        elif empty_boxes == "drop":
            dropped["objects whose box has no area"] += 1
        else:
            raise ValueError(
                f"{where}: the box has no area: {' '.join(words[:7])}. Correct it, or leave such objects "
                "out with empty_boxes='drop' (in a dataset URI: ?empty_boxes=drop)."
            )
    return annotations


def to_rotated(annotation: dict) -> dict:
    """Return an annotation with a polygon of four points as one with a rotated box."""
    (points,) = annotation["segmentation"]
    box = fit_rotated_box([*zip(points[0::2], points[1::2])])
    return {
        "category_id": annotation["category_id"],
        "bbox": [round(value, _DIGITS) for value in box],
        "bbox_mode": BoxMode.XYWHA_ABS,
    }


def _check_range(words: list[str], annotation: dict, where: str) -> None:
    """Raise ValueError if box or polygon are outside the image, as they are if given in pixels."""
    coordinates = words[1:] if "segmentation" in annotation else words[1:5]
    for coordinate in coordinates:
        if not -SLACK <= float(coordinate) <= 1 + SLACK:
            raise ValueError(
                f"{where}: {coordinate} is outside 0..1; YOLO's coordinates are normalized by the width and "
                "height of the image, not pixels."
            )


def row_to_annotation(words: list[str], size: tuple[int, int], config: YoloConfig, where: str) -> dict:
    """Convert the words of a line to an annotation in the standard format.

    Args:
        words: the line.
        size: width and height of the image in pixels.
        config: has the classes and the keypoints.
        where: file and line, for errors.

    Raises:
        ValueError: The number of values is wrong, a value is not a finite number, or the class is unknown.
    """
    class_index = _class_index(words[0], config, where)
    try:
        values = [float(word) for word in words[1:]]
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    if not are_coordinates(values):
        raise ValueError(f"{where}: a value is not finite, or beyond {MAX_COORDINATE}.")
    width, height = size
    annotation: dict[str, Any] = {"category_id": class_index, "bbox_mode": BoxMode.XYXY_ABS}
    if config.kpt_shape is not None:
        num, dim = config.kpt_shape
        if len(values) != 4 + num * dim:
            raise ValueError(
                f"{where}: {1 + len(values)} values; with kpt_shape [{num}, {dim}] there must be "
                f"{5 + num * dim}: class, box and keypoints."
            )
        annotation["keypoints"] = _keypoints(values[4:], dim, size)
    elif len(values) != 4:
        if len(values) < 6 or len(values) % 2:
            raise ValueError(
                f"{where}: {1 + len(values)} values; there must be 5 (class, cx, cy, w, h), or class and at "
                "least three points of a polygon."
            )
        polygon = [round(value * (height if i % 2 else width), _DIGITS) for i, value in enumerate(values)]
        annotation["segmentation"] = [polygon]
        x, y = polygon[0::2], polygon[1::2]
        annotation["bbox"] = [min(x), min(y), max(x), max(y)]
        return annotation
    cx, cy, w, h = values[:4]
    corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
    annotation["bbox"] = [round(value, _DIGITS) for value in corners]
    return annotation


def _class_index(word: str, config: YoloConfig, where: str) -> int:
    try:
        value = float(word)
    except ValueError as error:
        raise ValueError(f"{where}: the class {word!r} is not a number.") from error
    if value not in range(len(config.names)):
        raise ValueError(
            f"{where}: class {word} is not in 0..{len(config.names) - 1}, the {len(config.names)} classes of "
            f"{config.file}."
        )
    return int(value)


def _keypoints(values: list[float], dim: int, size: tuple[int, int]) -> list[float]:
    """Return x and y in pixels and visibility of all keypoints, flat."""
    keypoints = []
    for i in range(0, len(values), dim):
        x, y = values[i : i + 2]
        visibility = values[i + 2] if dim == 3 else 2.0 * (x >= 0 and y >= 0 and (x, y) != (0, 0))
        if not visibility:
            x = y = 0.0
        keypoints += [round(x * size[0], _DIGITS), round(y * size[1], _DIGITS), visibility]
    return keypoints
