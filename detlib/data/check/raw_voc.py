"""Reading a split in Pascal VOC's layout as COCO-like content, whatever is wrong with it."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

from detlib.data.datasets.pascal_voc import find_voc_pictures, read_voc_split
from detlib.data.datasets.voc_files import parse_xml, read_lines
from detlib.utils.file_io import PathManager

from .raw import RawSet

__all__ = ["read_voc"]


def read_voc(dirname: str, split: str, *, one_based: bool = False) -> RawSet:
    """Reads a split. All names of objects become categories, sorted; `labels.txt` comes first."""
    raw = RawSet(dirname, os.path.join(dirname, "JPEGImages"))
    names = read_voc_split(dirname, split)
    files = find_voc_pictures(dirname)
    for name, count in Counter(names).items():
        if count > 1:
            raw.report(
                "duplicate-file-name", f"ImageSets/Main/{split}.txt lists it {count} times", image=name
            )
    listed = _listed_classes(raw, dirname)
    images, objects = [], []
    for name in dict.fromkeys(names):
        path = files.get(name)
        image: dict[str, Any] = {"id": name, "file_name": os.path.basename(path) if path else f"{name}.jpg"}
        images.append(image)
        xml_file = os.path.join(dirname, "Annotations", f"{name}.xml")
        root = _parse(raw, xml_file, image["file_name"])
        if root is not None:
            _read_size(raw, root, xml_file, image)
            objects += _read_objects(raw, root, xml_file, image, one_based)
    found = sorted({name for name, _, _ in objects if name} - set(listed))
    if listed:  # a name that the list lacks is an error, not a class
        found = []
    ids = {name: i for i, name in enumerate([*listed, *found])}
    annotations = []
    for number, (name, annotation, place) in enumerate(objects):
        annotations.append({"id": number + 1, "category_id": ids.get(name, name), **annotation})
        raw.places[number] = place
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def _listed_classes(raw: RawSet, dirname: str) -> list[str]:
    path = os.path.join(dirname, "labels.txt")
    if not PathManager.isfile(path):
        return []
    try:
        lines = read_lines(path)
    except ValueError as error:
        raw.report("bad-file", str(error), file=path)
        return []
    for name, count in Counter(lines).items():
        if count > 1:
            raw.report("duplicate-category-name", f"{name!r} stands {count} times", file=path)
    return [*dict.fromkeys(lines)]


def _parse(raw: RawSet, xml_file: str, image: str) -> ElementTree.Element | None:
    try:
        return parse_xml(xml_file)
    except FileNotFoundError:
        raw.report("missing-annotation-file", f"{xml_file} does not exist", image=image)
    except ValueError as error:
        raw.report("bad-file", str(error), file=xml_file, image=image)
    return None


def _read_size(raw: RawSet, root: ElementTree.Element, xml_file: str, image: dict) -> None:
    texts = [root.findtext("size/width"), root.findtext("size/height")]
    if not any(texts) or texts == ["0", "0"]:
        raw.report("image-without-size", "the picture's is taken", file=xml_file, image=image["file_name"])
        return
    try:
        width, height = (float(text or 0) for text in texts)
    except ValueError:
        raw.report("image-wrong-type", f"the size is {texts}", file=xml_file, image=image["file_name"])
        return
    image["width"], image["height"] = int(width), int(height)


def _read_objects(
    raw: RawSet, root: ElementTree.Element, xml_file: str, image: dict, one_based: bool
) -> list[tuple[str, dict, str]]:
    """Returns class name, annotation without category, and place of each object."""
    objects = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        place = f"Annotations/{image['id']}.xml, object {number} ({name or 'no name'})"
        where = {"image": image["file_name"], "annotation": place}
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in texts:
            missing = "no name" if not name else "no bndbox, or not all of it"
            raw.report("annotation-broken", f"there is {missing}", action="object dropped", **where)
            continue
        try:
            x0, y0, x1, y1 = (float(text) for text in texts)
        except ValueError:
            raw.report("bad-box", f"the box is {texts}", action="object dropped", **where)
            continue
        x0, y0 = x0 - one_based, y0 - one_based
        annotation: dict[str, Any] = {"image_id": image["id"], "bbox": [x0, y0, x1 - x0, y1 - y0]}
        if (element.findtext("iscrowd") or "0").strip() == "1":
            annotation["iscrowd"] = 1
        objects.append((name, annotation, place))
    return objects
