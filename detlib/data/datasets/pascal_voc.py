"""Data sets in the folder layout of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/).

DIR/ImageSets/Main/SPLIT.txt    one picture name a line
DIR/Annotations/NAME.xml
DIR/labels.txt                  the classes in their order, one a line; not VOC's own, and may be missing
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
    """Registers a data set in Pascal VOC's layout.

    Args:
        name: the name, as it will stand in `cfg.DATASETS`.
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`.
        split: name of a list in `ImageSets/Main`, without `.txt`.
        year: 2007 or 2012; VOC's own metric differs between them.
        class_names: all classes, in the order of their indices.
        one_based, empty_boxes: see `load_voc_instances`.
        overwrite: replace what `name` stands for already.
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
    """Loads a Pascal VOC split as dicts in the standard format.

    Args:
        dirname: the folder with `Annotations`, `ImageSets` and `JPEGImages`.
        split: name of a list in `ImageSets/Main`, without `.txt`.
        class_names: all classes, in the order of their indices.
        one_based: the XML counts pixels from 1, with the maximum included, as VOC's own does; so 1 is taken
            off xmin and ymin. If False, the boxes are taken as they are written. Those that span one pixel
            (minimum and maximum are equal) have no area then, and are left out with a warning.
        empty_boxes: what to do about a box whose maximum is below its minimum: "error", or "drop" for leaving
            it out with a warning.

    Returns:
        One dict for each picture, in the order of the list, each once; boxes are XYXY_ABS, floats. The size
        is the XML's, or the picture's own where the XML has none. Objects that are marked "difficult" have
        that key: they are trained on, and VOC's metric leaves them out.

    Raises:
        FileNotFoundError: the list, an annotation or a picture does not exist.
        ValueError: an annotation is malformed, names an unknown class or has a box whose maximum is below its
            minimum; the message names file and object.
    """
    if empty_boxes not in ("error", "drop"):
        raise ValueError(f"empty_boxes must be 'error' or 'drop', not {empty_boxes!r}.")
    listed = read_voc_split(dirname, split)
    names = [*dict.fromkeys(listed)]
    if len(names) < len(listed):
        # Twice under one id, a picture's detections would count twice in an evaluation.
        again = len(listed) - len(names)
        logger.warning("ImageSets/Main/%s.txt of %s lists %d pictures again: left out", split, dirname, again)
    images = find_voc_images(dirname)
    class_index = {name: i for i, name in enumerate(class_names)}
    dicts = []
    for name in names:
        if name not in images:
            raise FileNotFoundError(
                f"{os.path.join(dirname, 'JPEGImages')} has no picture {name!r} "
                f"({', '.join(IMAGE_SUFFIXES)}), which ImageSets/Main/{split}.txt lists."
            )
        xml_file = os.path.join(dirname, "Annotations", name + ".xml")
        root = parse_xml(xml_file)
        width, height = _picture_size(root, xml_file, images[name])
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
    """Returns the picture names of a split.

    Raises:
        FileNotFoundError: there is no such list; the message names those that there are.
        ValueError: the list is empty.
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
        raise ValueError(f"{path!r} lists no pictures.")
    return names


def find_voc_class_names(dirname: str) -> list[str]:
    """Returns the lines of `DIR/labels.txt`; without that file, the sorted names of all objects in
    `DIR/Annotations`, whatever split they belong to."""
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
    with ThreadPoolExecutor(8) as pool:  # in an object store, most of it is waiting
        for root in pool.map(parse_xml, files):
            names.update((element.findtext("name") or "").strip() for element in root.iter("object"))
    names.discard("")
    if not names:
        raise ValueError(f"No annotation in {folder!r} has a named object.")
    return sorted(names)


def find_voc_images(dirname: str) -> dict[str, str]:
    """Returns the paths of the pictures by their names without suffix."""
    folder = os.path.join(dirname, "JPEGImages")
    if not PathManager.isdir(folder):
        raise FileNotFoundError(f"Folder {folder!r} does not exist.")
    files: dict[str, str] = {}
    for entry in PathManager.ls(folder):
        stem, suffix = os.path.splitext(entry)
        if suffix.lower() == ".jpg" or (suffix.lower() in IMAGE_SUFFIXES and stem not in files):
            files[stem] = os.path.join(folder, entry)
    return files


def _picture_size(root: ElementTree.Element, xml_file: str, image_file: str) -> tuple[int, int]:
    """Returns width and height from the XML, or from the picture's header where the XML has none or zeros."""
    texts = [root.findtext("size/width"), root.findtext("size/height")]
    try:
        width, height = (int(float(text)) if text else 0 for text in texts)
    except ValueError as error:
        raise ValueError(f"{xml_file}: the size is {texts}, which are not two numbers.") from error
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
    """Returns one annotation in the standard format, or None if it is left out."""
    name = (element.findtext("name") or "").strip()
    if name not in class_index:
        raise ValueError(
            f"{xml_file}: an object is a {name!r}, which is none of the {len(class_index)} classes: "
            f"{', '.join(class_index)}.{suggest(name, class_index)}"
        )
    texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        box = [float(text) for text in texts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{xml_file}: object {name!r} has the box {texts}, not four numbers.") from error
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{xml_file}: object {name!r} has a box that is not finite: {texts}.")
    is_turned = box[2] < box[0] or box[3] < box[1]
    if is_turned and empty_boxes == "error":
        raise ValueError(
            f"{xml_file}: object {name!r} has a box of no area: [xmin, ymin, xmax, ymax] = {texts}. Mend it, "
            "or let such objects be left out with empty_boxes='drop' (in a dataset URI: ?empty_boxes=drop)."
        )
    if is_turned or (not one_based and (box[2] == box[0] or box[3] == box[1])):
        logger.warning("%s: left out an object %r whose box has no area: %s", xml_file, name, texts)
        return None
    if one_based:
        box[0] -= 1.0
        box[1] -= 1.0
    annotation = {"category_id": class_index[name], "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
    if (element.findtext("iscrowd") or "0").strip() == "1":  # not VOC's own: detlib's converter writes it
        annotation["iscrowd"] = 1
    if (element.findtext("difficult") or "0").strip() not in ("0", ""):
        annotation["difficult"] = 1
    return annotation


def read_lines(path: str) -> list[str]:
    """Returns the lines of a text file without what surrounds them, and without empty ones.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    with PathManager.open(path, "rb") as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not text in UTF-8: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_names(path: str, annotations: str) -> list[str]:
    """Returns the picture names of a list in `ImageSets/Main`.

    A line is a name, or a name and a flag. Names may have spaces in them, so where the flag could be the end
    of the name, the folder `annotations` decides.
    """
    lines = read_lines(path)
    there: set[str] = set()
    if any(len(line.split()) > 1 for line in lines) and PathManager.isdir(annotations):
        there = {name.removesuffix(".xml") for name in PathManager.ls(annotations)}
    words = [line.split() for line in lines]
    return [
        first if rest in _FLAGS and line not in there else line for line, (first, *rest) in zip(lines, words)
    ]


def parse_xml(path: str) -> ElementTree.Element:
    """Returns the root of an annotation file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not XML, or in an encoding that is not known.
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
        # The parser knows no encodings of several bytes a letter but Unicode's; given text, it asks for none.
        declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode("ascii")))
