"""Reading a split in YOLO's format as COCO-like content, whatever is wrong with it."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detlib.data.datasets.yolo import SLACK, read_label_rows, row_to_annotation
from detlib.data.datasets.yolo_layout import (
    YoloConfig,
    find_yolo_pictures,
    label_file_of,
    read_yolo_config,
)
from detlib.data.readers import read_image_size
from detlib.utils.file_io import PathManager

from .raw import RawSet, split_root

__all__ = ["read_yolo"]


def read_yolo(yaml_file: str, split: str) -> RawSet:
    """Reads a split.

    Raises:
        FileNotFoundError: the data.yaml, or what it leads to, does not exist.
    """
    raw = RawSet(yaml_file, "")
    try:
        config = read_yolo_config(yaml_file)
        pictures = find_yolo_pictures(config, split)
    except ValueError as error:
        raw.report("bad-file", str(error))
        return raw
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, pictures))
    raw.image_root, names = split_root(pictures)
    images, annotations = [], []
    for picture, name, size in zip(pictures, names, sizes):
        image: dict[str, Any] = {"id": len(images) + 1, "file_name": name}
        if size is not None:
            image["width"], image["height"] = size
        images.append(image)
        label_file = label_file_of(picture)
        for number, words in _rows(raw, label_file, name):
            where = {"image": name, "annotation": f"{label_file}, line {number}"}
            annotation = _read_line(raw, words, size or (1, 1), config, where)
            if annotation is not None:
                raw.places[len(annotations)] = where["annotation"]
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
    _find_orphans(raw, pictures)
    categories: list[dict] = [{"id": i, "name": name} for i, name in enumerate(config.names)]
    if config.kpt_names:
        for category in categories:
            category["keypoints"] = list(config.kpt_names)
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def _size(picture: str) -> tuple[int, int] | None:
    """Width and height; None where the picture cannot be read, which is looked into later."""
    try:
        return read_image_size(picture)
    except (OSError, ValueError):
        return None


def _rows(raw: RawSet, label_file: str, image: str) -> list[tuple[int, list[str]]]:
    try:
        return list(read_label_rows(label_file))
    except ValueError as error:
        raw.report("bad-file", str(error), file=label_file, image=image)
        return []


def _read_line(
    raw: RawSet, words: list[str], size: tuple[int, int], config: YoloConfig, where: dict[str, str]
) -> dict | None:
    """Returns an annotation as COCO has it, or None with a finding."""
    kind, detail = _fault(words, config)
    if kind:
        raw.report(kind, detail, action="line dropped", **where)
        return None
    annotation = row_to_annotation(words, size, config, where["annotation"])
    x0, y0, x1, y1 = annotation["bbox"]
    result = {"category_id": annotation["category_id"], "bbox": [x0, y0, x1 - x0, y1 - y0]}
    if "segmentation" in annotation:
        result["segmentation"] = annotation["segmentation"]
    if "keypoints" in annotation:
        keypoints = annotation["keypoints"]
        result["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(keypoints)]
    return result


def _fault(words: list[str], config: YoloConfig) -> tuple[str, str]:
    """Returns the kind of a line's fault and what it is; empty where there is none."""
    line = " ".join(words[:8])
    try:
        values = [float(word) for word in words]
    except ValueError:
        return "bad-label-line", f"not all of {line!r} are numbers"
    if values[0] not in range(len(config.names)):
        return "unknown-category", f"class {words[0]} is not in 0..{len(config.names) - 1}"
    num = len(values) - 1
    if config.kpt_shape is not None:
        wanted = 4 + config.kpt_shape[0] * config.kpt_shape[1]
        if num != wanted:
            return "keypoint-length", f"{num + 1} values, but kpt_shape {config.kpt_shape} needs {wanted + 1}"
    elif num != 4 and (num < 6 or num % 2):
        return "bad-label-line", f"{num + 1} values; there must be 5, or a class and 3 corners at least"
    if not all(map(math.isfinite, values)):
        bad = "polygon-not-finite" if num != 4 and config.kpt_shape is None else "box-not-finite"
        return bad, f"{line!r} has a value that is not finite"
    shares = values[1:5] if config.kpt_shape is not None else values[1:]
    if not all(-SLACK <= share <= 1 + SLACK for share in shares):
        return "not-shares", f"{line!r} is not all within 0..1; are these pixels?"
    return "", ""


def _find_orphans(raw: RawSet, pictures: list[str]) -> None:
    """Reports label files that no picture has, in the folders where labels were looked for."""
    expected = {label_file_of(picture) for picture in pictures}
    folders = {os.path.dirname(path) for path in expected}
    folders &= {folder for folder in folders if "labels" in folder.split("/") and PathManager.isdir(folder)}
    for folder in sorted(folders):
        for name in sorted(PathManager.ls(folder)):
            path = os.path.join(folder, name)
            if name.endswith(".txt") and path not in expected:
                raw.report("label-without-picture", "no picture of the split has this name", file=path)
