"""Writing standard dicts in COCO's, Pascal VOC's and YOLO's format.

Each writer puts the annotations of a `detlib.data.convert.Source` into a folder, and returns the address of
the result and where each picture belongs.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np
import yaml

from detlib.data.datasets.coco_writer import convert_to_coco_dict
from detlib.data.datasets.keypoint_names import left_right_pairs
from detlib.data.datasets.pascal_voc import IMAGE_SUFFIXES as VOC_SUFFIXES
from detlib.data.readers import check_image_size, read_image_size
from detlib.utils.file_io import PathManager

if TYPE_CHECKING:
    from .convert import Source

__all__ = ["write_coco", "write_voc", "write_yolo"]

logger = logging.getLogger(__name__)

# A polygon stands for a box in YOLO's format; this far, in pixels, it may be off.
_SAME_BOX = 0.011


def _write(path: str, text: str) -> None:
    PathManager.mkdirs(os.path.dirname(path))
    with PathManager.open(path, "wb") as file:
        file.write(text.encode("utf-8"))


def write_coco(source: Source, out: str, masks: str) -> tuple[str, list[str]]:
    """Writes OUT/annotations/SPLIT.json; pictures go to OUT/images/SPLIT."""
    content = convert_to_coco_dict(source.name)
    _count_difficult(source)
    folder = os.path.join(out, "images", source.split)
    for i, image in enumerate(content["images"]):
        image["file_name"] = source.file_name(i)
    if not all(isinstance(image["id"], int) for image in content["images"]):
        # Tools of COCO's format expect whole numbers; in this order, since readers sort by them.
        ids = {image["id"]: i for i, image in enumerate(content["images"], start=1)}
        for image in content["images"]:
            image["id"] = ids[image["id"]]
        for annotation in content.get("annotations", ()):
            annotation["image_id"] = ids[annotation["image_id"]]
    names = source.metadata.get("keypoint_names")
    _check_keypoints(source, names)
    if names:
        rules = source.metadata.get("keypoint_connection_rules") or []
        told = {frozenset(pair) for pair in left_right_pairs(list(names))}
        swapped = {frozenset(pair) for pair in source.metadata.get("keypoint_flip_map") or ()}
        source.lost[
            "pairs of keypoints are no longer known to be swapped in the mirror, as their names do "
            "not differ in left and right only"
        ] += len(swapped - told)
        source.lost = +source.lost
        skeleton = [[names.index(a) + 1, names.index(b) + 1] for a, b, _ in rules]
        for category in content["categories"]:
            category.update(keypoints=list(names), skeleton=skeleton)
    file = os.path.join(out, "annotations", f"{source.split}.json")
    _write(file, json.dumps(content))
    return f"coco:{file}@{folder}", [os.path.join(folder, image["file_name"]) for image in content["images"]]


def _count_difficult(source: Source) -> None:
    """VOC's mark, which its metric alone knows, has no place in other formats; crowds are marked as such."""
    annotations = [a for record in source.dicts for a in record.get("annotations", ())]
    source.lost["objects are no longer marked as difficult"] += sum(
        bool(a.get("difficult")) and not a.get("iscrowd") for a in annotations
    )
    source.lost = +source.lost


def _check_keypoints(source: Source, names: list[str] | None) -> None:
    """Raises ValueError where an object has not as many keypoints as the data set names for all classes."""
    for record in source.dicts:
        for annotation in record.get("annotations", ()):
            points = annotation.get("keypoints")
            if names and points is not None and np.size(points) not in (0, 3 * len(names)):
                raise ValueError(
                    f"Dataset {source.name!r}: an object of {record['file_name']} has {np.size(points) // 3} "
                    f"keypoints, but the metadata names {len(names)}; they cannot be written."
                )


def _number(value: float) -> str:
    """The shortest text that reads as the same number."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def write_voc(source: Source, out: str, masks: str) -> tuple[str, list[str]]:
    """Writes OUT/Annotations, ImageSets/Main/SPLIT.txt and labels.txt; pictures go to OUT/JPEGImages."""
    classes = list(source.metadata.thing_classes)
    _check_for_voc(source, classes)
    _same_classes(os.path.join(out, "labels.txt"), "\n".join(classes) + "\n")
    places = []
    for i, record in enumerate(source.dicts):
        objects = [_voc_object(source, annotation, classes) for annotation in record.get("annotations", ())]
        size = f"<width>{record['width']}</width><height>{record['height']}</height><depth>3</depth>"
        lines = [
            "<annotation>",
            f"  <filename>{escape(source.file_name(i))}</filename>",
            f"  <size>{size}</size>",
            *objects,
            "</annotation>\n",
        ]
        _write(os.path.join(out, "Annotations", source.stems[i] + ".xml"), "\n".join(lines))
        places.append(os.path.join(out, "JPEGImages", source.file_name(i)))
    _write(os.path.join(out, "ImageSets", "Main", source.split + ".txt"), "\n".join(source.stems) + "\n")
    return f"voc:{out}@{source.split}", places


def _check_for_voc(source: Source, classes: list[str]) -> None:
    """Raises ValueError for what VOC's files cannot hold, before any is written."""
    # A split's list has one word a line.
    if any(len(stem.split()) != 1 for stem in source.stems):
        raise ValueError(
            f"Dataset {source.name!r} has pictures with spaces in their names, VOC's lists cannot."
        )
    suffixes = {os.path.splitext(record["file_name"])[1] for record in source.dicts}
    unknown = sorted(suffix for suffix in suffixes if suffix.lower() not in VOC_SUFFIXES)
    if unknown:
        raise ValueError(
            f"Dataset {source.name!r} has pictures that end in {unknown}; those in VOC's folders must end in "
            f"{', '.join(VOC_SUFFIXES)}."
        )
    # Objects have the name of their class, and a list of classes has one a line.
    bad = [n for n in classes if not n.isprintable() or not n or n != n.strip() or classes.count(n) > 1]
    if bad:
        raise ValueError(
            f"Dataset {source.name!r} has classes that VOC's files cannot tell apart, as they have one name, "
            f"none, or one with line breaks or with spaces around it: {bad[:10]}."
        )


def _voc_object(source: Source, annotation: dict, classes: list[str]) -> str:
    box = source.box(annotation)
    corners = "".join(f"<{key}>{_number(v)}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    crowd = ""
    if annotation.get("iscrowd") or annotation.get("difficult"):
        crowd = "<difficult>1</difficult>" + "<iscrowd>1</iscrowd>" * bool(annotation.get("iscrowd"))
    for key in ("segmentation", "keypoints"):
        source.lost[f"objects lose their {key}"] += bool(annotation.get(key) is not None)
    source.lost = +source.lost
    name = escape(classes[annotation["category_id"]])
    return f"  <object><name>{name}</name>{crowd}<bndbox>{corners}</bndbox></object>"


def _same_classes(path: str, text: str) -> None:
    """Writes the classes, unless another split has brought other ones."""
    if PathManager.isfile(path):
        with PathManager.open(path, "rb") as file:
            there = file.read().decode("utf-8")
        if there != text:
            raise ValueError(
                f"{path} lists other classes ({', '.join(there.split())}) than this data set has "
                f"({', '.join(text.split())}); write into another folder."
            )
    _write(path, text)


def write_yolo(source: Source, out: str, masks: str) -> tuple[str, list[str]]:
    """Writes OUT/data.yaml, OUT/labels/SPLIT and the list OUT/SPLIT.txt; pictures go to OUT/images/SPLIT."""
    keypoints = source.metadata.get("keypoint_names")
    _check_keypoints(source, keypoints)
    with_polygons = not keypoints and _use_polygons(source, masks)
    _count_difficult(source)
    places = []
    for i, record in enumerate(source.dicts):
        # Shares of a size that is wrong would be somewhere else, and nothing would tell any more.
        width, height = read_image_size(record["file_name"])
        check_image_size(record, np.empty((height, width, 0)))
        lines = []
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd"):
                source.lost["crowd regions are left out"] += 1
                continue
            size = record["width"], record["height"]
            lines.append(_yolo_line(source, annotation, size, with_polygons, keypoints))
        text = "".join(line + "\n" for line in lines)
        _write(os.path.join(out, "labels", source.split, source.stems[i] + ".txt"), text)
        places.append(os.path.join(out, "images", source.split, source.file_name(i)))
    listed = "".join(f"./images/{source.split}/{os.path.basename(place)}\n" for place in places)
    _write(os.path.join(out, f"{source.split}.txt"), listed)  # keeps the order, as a folder does not
    file = os.path.join(out, "data.yaml")
    _write(file, _data_yaml(source, file, keypoints))
    return f"yolo:{file}@{source.split}", places


def _use_polygons(source: Source, masks: str) -> bool:
    objects = [a for record in source.dicts for a in record.get("annotations", ()) if not a.get("iscrowd")]
    having = [isinstance(a.get("segmentation"), list) and bool(a["segmentation"]) for a in objects]
    if masks == "boxes" or not any(having):
        return False
    if masks == "polygons":
        source.lost["objects have no polygon and are written as boxes"] += having.count(False)
        source.lost = +source.lost
        return True
    moved = sum(not same or not _box_is_extent(source, a) for a, same in zip(objects, having))
    if moved:
        logger.warning(
            "Boxes are written, not polygons: %d of %d objects would get another box or have no polygon. "
            "--masks polygons writes them all the same.",
            moved,
            len(objects),
        )
    return not moved


def _box_is_extent(source: Source, annotation: dict) -> bool:
    values = annotation["segmentation"]
    x, y = [v for p in values for v in p[0::2]], [v for p in values for v in p[1::2]]
    extent = (min(x), min(y), max(x), max(y))
    return max(abs(a - b) for a, b in zip(extent, source.box(annotation))) <= _SAME_BOX


def _yolo_line(
    source: Source, annotation: dict, size: tuple[int, int], with_polygons: bool, keypoints: list[str] | None
) -> str:
    x0, y0, x1, y1 = source.box(annotation)
    width, height = size
    box = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    segmentation = annotation.get("segmentation")
    if with_polygons and isinstance(segmentation, list) and segmentation:
        values = [float(v) / size[i % 2] for i, v in enumerate(_join_polygons(segmentation))]
    elif keypoints:
        points = annotation.get("keypoints")
        points = [0.0] * (3 * len(keypoints)) if points is None or not len(points) else list(points)
        values = box + [float(v) if i % 3 == 2 else float(v) / size[i % 3] for i, v in enumerate(points)]
    else:
        values = box
    if segmentation is not None and not with_polygons:
        source.lost["objects lose their segmentation"] += 1
    return " ".join([str(annotation["category_id"]), *map(_number, values)])


def _join_polygons(polygons: list) -> list[float]:
    """Makes one polygon of all parts of a mask.

    It runs round the first, and from its start to each of the others and back: those ways have no area.
    """
    first = [float(value) for value in polygons[0]]
    joined = list(first)
    for polygon in polygons[1:]:
        part = [float(value) for value in polygon]
        joined += [*first[:2], *part, *part[:2], *first[:2]]
    return joined


def _data_yaml(source: Source, file: str, keypoints: list[str] | None) -> str:
    """Returns the new content of a data.yaml, which may have other splits already."""
    data: dict = {}
    if PathManager.isfile(file):
        with PathManager.open(file, "rb") as opened:
            data = yaml.safe_load(opened.read()) or {}
    names = dict(enumerate(source.metadata.thing_classes))
    if data.get("names", names) != names:
        raise ValueError(
            f"{file} has other classes ({data['names']}) than this data set ({names}); write into another "
            "folder."
        )
    data.update({source.split: f"{source.split}.txt", "nc": len(names), "names": names})
    if keypoints:
        partner = {
            a: b for pair in source.metadata.get("keypoint_flip_map") or () for a, b in (pair, pair[::-1])
        }
        data["kpt_shape"] = [len(keypoints), 3]
        data["flip_idx"] = [keypoints.index(partner.get(name, name)) for name in keypoints]
        data["kpt_names"] = {i: list(keypoints) for i in names}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
