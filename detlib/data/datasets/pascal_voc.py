"""Datasets with the XML files of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/), see `voc_layout`."""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import cast

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.file_values import MAX_COORDINATE, MAX_SIDE, are_coordinates
from detlib.data.datasets.voc_layout import IMAGE_SUFFIXES, find_voc_split, parse_xml
from detlib.data.image_io import read_image_size
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["CLASS_NAMES", "load_voc_instances", "register_pascal_voc"]

logger = logging.getLogger(__name__)

CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def register_pascal_voc(
    name: str,
    dirname: str,
    split: str,
    year: int,
    class_names: Sequence[str] = CLASS_NAMES,
    *,
    one_based: bool = True,
    empty_boxes: str = "error",
    overwrite: bool = False,
) -> None:
    """Register a dataset in Pascal VOC's layout.

    Args:
        name: the name to use in `cfg.DATASETS`.
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`, or another layout that
            `detlib.data.datasets.voc_layout` describes.
        split: name of a list in `ImageSets/Main`, without `.txt`; or of a folder; "all" without lists.
        year: 2007 or 2012; VOC's metric differs between them.
        class_names: all classes, in the order of their indices.
        one_based, empty_boxes: see `load_voc_instances`.
        overwrite: replace a dataset that is already registered under `name`.
    """

    def load() -> list[dict]:
        return load_voc_instances(dirname, split, class_names, one_based=one_based, empty_boxes=empty_boxes)

    DatasetCatalog.register(name, load, overwrite=overwrite)
    if overwrite:
        MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        thing_classes=list(class_names),
        dirname=dirname,
        year=year,
        split=split,
        evaluator_type="pascal_voc",
    )


def load_voc_instances(
    dirname: str,
    split: str,
    class_names: Sequence[str],
    *,
    one_based: bool = True,
    empty_boxes: str = "error",
) -> list[dict]:
    """Load a Pascal VOC split as dicts in the standard format.

    Args:
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`, or another layout that
            `detlib.data.datasets.voc_layout` describes.
        split: name of a list in `ImageSets/Main`, without `.txt`; or of a folder; "all" without lists.
        class_names: all classes, in the order of their indices.
        one_based: whether the XML counts pixels from 1 and includes the maximum, as VOC's own does. If True,
            1 is subtracted from xmin and ymin. If False, boxes are read as written; a box with equal minimum
            and maximum has no area then, and is left out with a warning.
        empty_boxes: how to treat a box with its maximum below its minimum: "error", or "drop" to leave it out
            with a warning.

    Returns:
        One dict for each image, in the order of the list and without repetitions. Boxes are XYXY_ABS, float.
        The size is read from the XML, or from the image if the XML has none. Objects marked as "difficult"
        have that key: training uses them, VOC's metric ignores them.

    Raises:
        FileNotFoundError: The list, an annotation or an image does not exist.
        ValueError: An annotation is malformed, names an unknown class, or has a box with its maximum below
            its minimum; the message names file and object.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    files = find_voc_split(dirname, split)
    names = [*dict.fromkeys(files.names)]
    if len(names) < len(files.names):
        # With the same id twice, the detections on an image would count twice in an evaluation.
        logger.warning("%s lists %d images again: left out", files.source, len(files.names) - len(names))
    class_index = {name: i for i, name in enumerate(class_names)}
    dicts = []
    for name in names:
        xml_file = files.xml_file(name)
        image_file = files.image_file(name)
        if image_file is None and not PathManager.isfile(xml_file):
            raise FileNotFoundError(
                f"There is no image {name!r} and no {xml_file}, but {files.source} lists it."
            )
        root = parse_xml(xml_file)
        image_file = image_file or files.image_file(name, root)
        if image_file is None:
            raise FileNotFoundError(
                f"{files.image_folders[0]} has no image {name!r} ({', '.join(IMAGE_SUFFIXES)}), which "
                f"{files.source} names."
            )
        width, height = _image_size(root, xml_file, image_file)
        objects = (
            _read_object(element, xml_file, class_index, one_based, empty_boxes)
            for element in root.iter("object")
        )
        dicts.append(
            {
                "file_name": image_file,
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": [annotation for annotation in objects if annotation is not None],
            }
        )
    logger.info("Loaded %d images of split %r in VOC layout from %s", len(dicts), split, dirname)
    return dicts


def _image_size(root: ElementTree.Element, xml_file: str, image_file: str) -> tuple[int, int]:
    """Return width and height from the XML, or from the image if the XML has none or zeros."""
    texts = [root.findtext("size/width"), root.findtext("size/height")]
    try:
        width, height = (int(float(text)) if text else 0 for text in texts)
    except (ValueError, OverflowError) as error:  # the latter for infinity
        raise ValueError(f"{xml_file}: the size is {texts}, not two numbers.") from error
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{xml_file}: the size is {texts}; width and height must be at most {MAX_SIDE}.")
    if width > 0 and height > 0:
        return width, height
    return read_image_size(image_file)


def _read_object(
    element: ElementTree.Element,
    xml_file: str,
    class_index: dict[str, int],
    one_based: bool,
    empty_boxes: str,
) -> dict | None:
    """Return one annotation in the standard format, or None if it is left out."""
    name = (element.findtext("name") or "").strip()
    if name not in class_index:
        raise ValueError(
            f"{xml_file}: the class {name!r} of an object is not one of the {len(class_index)} classes: "
            f"{', '.join(class_index)}.{suggest(name, class_index)}"
        )
    texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        box = [float(cast(str, text)) for text in texts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{xml_file}: object {name!r} has the box {texts}, not four numbers.") from error
    if not are_coordinates(box):
        raise ValueError(
            f"{xml_file}: object {name!r} has a box that is not finite or beyond {MAX_COORDINATE}: {texts}."
        )
    is_inverted = box[2] < box[0] or box[3] < box[1]
    if is_inverted and empty_boxes == "error":
        raise ValueError(
            f"{xml_file}: object {name!r} has a box without area: [xmin, ymin, xmax, ymax] = {texts}. "
            "Correct it, or leave such objects out with empty_boxes='drop' (in a dataset URI: "
            "?empty_boxes=drop)."
        )
    if is_inverted or (not one_based and (box[2] == box[0] or box[3] == box[1])):
        logger.warning("%s: left out an object %r whose box has no area: %s", xml_file, name, texts)
        return None
    if one_based:
        box[0] -= 1.0
        box[1] -= 1.0
    annotation = {"category_id": class_index[name], "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
    if (element.findtext("iscrowd") or "0").strip() == "1":  # not part of VOC: written by the converter
        annotation["iscrowd"] = 1
    if (element.findtext("difficult") or "0").strip() not in ("0", ""):
        annotation["difficult"] = 1
    return annotation
