"""Datasets in the folder layout of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/).

DIR/ImageSets/Main/SPLIT.txt    one image name per line
DIR/Annotations/NAME.xml
DIR/labels.txt                  optional, not part of VOC: the classes in order, one per line
DIR/JPEGImages/NAME.jpg         or .jpeg, .png, ...
"""

from __future__ import annotations

import logging
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.image_io import read_image_size
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = [
    "CLASS_NAMES",
    "IMAGE_SUFFIXES",
    "find_voc_class_names",
    "find_voc_images",
    "load_voc_instances",
    "parse_xml",
    "read_lines",
    "read_voc_split",
    "register_pascal_voc",
]

logger = logging.getLogger(__name__)

CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif")

# The lists of one class that VOC has give each image a flag: whether it shows such an object.
_FLAGS = (["1"], ["-1"], ["0"])


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
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`.
        split: name of a list in `ImageSets/Main`, without `.txt`.
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
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`.
        split: name of a list in `ImageSets/Main`, without `.txt`.
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
    listed = read_voc_split(dirname, split)
    names = [*dict.fromkeys(listed)]
    if len(names) < len(listed):
        # With the same id twice, the detections on an image would count twice in an evaluation.
        repeated = len(listed) - len(names)
        logger.warning(
            "ImageSets/Main/%s.txt of %s lists %d images again: left out", split, dirname, repeated
        )
    images = find_voc_images(dirname)
    class_index = {name: i for i, name in enumerate(class_names)}
    dicts = []
    for name in names:
        if name not in images:
            raise FileNotFoundError(
                f"{os.path.join(dirname, 'JPEGImages')} has no image {name!r} "
                f"({', '.join(IMAGE_SUFFIXES)}), which ImageSets/Main/{split}.txt lists."
            )
        xml_file = os.path.join(dirname, "Annotations", name + ".xml")
        root = parse_xml(xml_file)
        width, height = _image_size(root, xml_file, images[name])
        objects = (
            _read_object(element, xml_file, class_index, one_based, empty_boxes)
            for element in root.iter("object")
        )
        dicts.append(
            {
                "file_name": images[name],
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": [annotation for annotation in objects if annotation is not None],
            }
        )
    logger.info("Loaded %d images of split %r in VOC layout from %s", len(dicts), split, dirname)
    return dicts


def read_voc_split(dirname: str, split: str) -> list[str]:
    """Return the image names of a split.

    Raises:
        FileNotFoundError: The list does not exist; the message names the existing lists.
        ValueError: The list is empty.
    """
    folder = os.path.join(dirname, "ImageSets", "Main")
    path = os.path.join(folder, split + ".txt")
    if not PathManager.isfile(path):
        if not PathManager.isdir(dirname):
            raise FileNotFoundError(f"Folder {dirname!r} does not exist.")
        there = PathManager.ls(folder) if PathManager.isdir(folder) else []
        splits = sorted(entry.removesuffix(".txt") for entry in there if entry.endswith(".txt"))
        raise FileNotFoundError(
            f"{path!r} does not exist. {folder!r} has the splits: {', '.join(splits) or 'none'}."
        )
    names = read_split_names(path, os.path.join(dirname, "Annotations"))
    if not names:
        raise ValueError(f"{path!r} lists no images.")
    return names


def find_voc_class_names(dirname: str) -> list[str]:
    """Return the class names of a dataset.

    They are the lines of `DIR/labels.txt`, or without that file the sorted names of all objects in
    `DIR/Annotations`, of any split.

    Raises:
        FileNotFoundError: Neither exists.
        ValueError: No object has a name.
    """
    listed = os.path.join(dirname, "labels.txt")
    if PathManager.isfile(listed):
        lines = read_lines(listed)
        if len({*lines}) < len(lines):
            twice = [name for name, count in Counter(lines).items() if count > 1]
            logger.warning("%s lists %s more than once; each is one class.", listed, twice)
        if lines:
            return [*dict.fromkeys(lines)]
    folder = os.path.join(dirname, "Annotations")
    if not PathManager.isdir(folder):
        raise FileNotFoundError(f"Folder {folder!r} does not exist.")
    names: set[str] = set()
    files = [os.path.join(folder, entry) for entry in PathManager.ls(folder) if entry.endswith(".xml")]
    with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
        for root in pool.map(parse_xml, files):
            names.update((element.findtext("name") or "").strip() for element in root.iter("object"))
    names.discard("")
    if not names:
        raise ValueError(f"No annotation in {folder!r} has a named object.")
    return sorted(names)


def find_voc_images(dirname: str) -> dict[str, str]:
    """Return the paths of all images by name without suffix."""
    folder = os.path.join(dirname, "JPEGImages")
    if not PathManager.isdir(folder):
        raise FileNotFoundError(f"Folder {folder!r} does not exist.")
    files: dict[str, str] = {}
    for entry in PathManager.ls(folder):
        stem, suffix = os.path.splitext(entry)
        if suffix.lower() == ".jpg" or (suffix.lower() in IMAGE_SUFFIXES and stem not in files):
            files[stem] = os.path.join(folder, entry)
    return files


def _image_size(root: ElementTree.Element, xml_file: str, image_file: str) -> tuple[int, int]:
    """Return width and height from the XML, or from the image if the XML has none or zeros."""
    texts = [root.findtext("size/width"), root.findtext("size/height")]
    try:
        width, height = (int(float(text)) if text else 0 for text in texts)
    except ValueError as error:
        raise ValueError(f"{xml_file}: the size is {texts}, not two numbers.") from error
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
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{xml_file}: object {name!r} has a box that is not finite: {texts}.")
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


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file, stripped, without empty lines.

    Raises:
        ValueError: The file is not UTF-8 text.
    """
    with PathManager.open(path, "rb") as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not UTF-8 text: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_names(path: str, annotations: str) -> list[str]:
    """Return the image names of a list in `ImageSets/Main`.

    A line is a name, or a name and a flag. Names may contain spaces. If the flag could be the end of the
    name, the files in the folder `annotations` decide.
    """
    lines = read_lines(path)
    existing: set[str] = set()
    if any(len(line.split()) > 1 for line in lines) and PathManager.isdir(annotations):
        existing = {name.removesuffix(".xml") for name in PathManager.ls(annotations)}
    words = [line.split() for line in lines]
    return [
        first if rest in _FLAGS and line not in existing else line
        for line, (first, *rest) in zip(lines, words)
    ]


def parse_xml(path: str) -> ElementTree.Element:
    """Return the root element of an annotation file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not XML, or has an unknown encoding.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"Annotation file {path!r} does not exist.")
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        return _parse(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"Annotation file {path!r} is not valid XML: {error}") from error


def _parse(content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)
    except (ValueError, LookupError):
        # The parser has no multi-byte encodings except Unicode. Given decoded text, it needs none.
        declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode("ascii")))
