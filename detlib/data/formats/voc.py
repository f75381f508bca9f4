"""Pascal VOC's XML, one file for each image, in VOC's folders or in those of labeling tools."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any, cast
from xml.sax.saxutils import escape

from detlib.data.datasets.pascal_voc import load_voc_instances
from detlib.data.datasets.voc_layout import (
    IMAGE_SUFFIXES,
    find_voc_class_names,
    find_voc_split,
    list_voc_splits,
    parse_xml,
    read_lines,
)
from detlib.data.formats.base import (
    EMPTY_BOXES,
    Candidate,
    Format,
    ParsedURI,
    URIOption,
    register_format,
)
from detlib.data.formats.findings import RawSet
from detlib.data.formats.writing import ConversionSource, format_number, write_text
from detlib.utils.file_io import PathManager

__all__ = ["VocURI", "read_raw_voc", "write_voc"]


class VocURI(ParsedURI):
    """`voc:DIR@SPLIT` or `voc:DIR`.

    A split is a list in DIR/ImageSets/Main, or a folder in DIR; without either, all XML files are one split.
    The classes are the lines of DIR/labels.txt. Without that file they are the sorted names of all objects of
    all splits, so that these agree on them.
    """

    form = "voc:DIR@SPLIT"
    options = (
        URIOption(
            "one_based",
            "`1` for XML that counts pixels from 1, as VOC's own does; by default boxes are read as written",
            ("0", "1"),
        ),
        EMPTY_BOXES,
    )

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.one_based = self.values["one_based"] == "1"
        self.dirname, self.split = self.split_body_with_optional_split()
        self._class_names: list[str] | None = None

    def check(self) -> None:
        """Raise FileNotFoundError if the folder, the split or its XML files do not exist."""
        self.require_folder(self.dirname)
        find_voc_split(self.dirname, self.split)

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format."""
        self.check()
        classes = self._class_names or self._read_class_names()
        return load_voc_instances(
            self.dirname,
            self.split,
            classes,
            one_based=self.one_based,
            empty_boxes=self.values["empty_boxes"],
        )

    def metadata(self) -> dict[str, Any]:
        """Return the classes; without labels.txt this reads all annotations."""
        self.check()
        return {
            "evaluator_type": "coco",
            "dirname": self.dirname,
            "split": self.split,
            "thing_classes": self._read_class_names(),
        }

    def _read_class_names(self) -> list[str]:
        self._class_names = find_voc_class_names(self.dirname)
        return list(self._class_names)

    def read_raw(self) -> RawSet:
        """Read the split for the checker."""
        self.check()
        return read_raw_voc(self.dirname, self.split, one_based=self.one_based)


def find_voc(path: str) -> list[Candidate]:
    """Find the splits in a folder."""
    found = []
    for split in list_voc_splits(path):
        files = find_voc_split(path, split)
        reason = f"found {os.path.relpath(files.source, path)} and XML of VOC"
        found.append(Candidate(f"voc:{path}@{split}", split, reason))
    return found


def read_raw_voc(dirname: str, split: str, *, one_based: bool = False) -> RawSet:
    """Read a split for the checker.

    The categories are the lines of labels.txt, or without that file the sorted names of the split's objects.
    """
    files = find_voc_split(dirname, split)
    raw = RawSet(dirname, files.image_folders[0])
    for name, count in Counter(files.names).items():
        if count > 1:
            raw.report("duplicate-file-name", f"{files.source} lists it {count} times", image=name)
    listed = _listed_classes(raw, dirname)
    images, objects = [], []
    for name in dict.fromkeys(files.names):
        image: dict[str, Any] = {"id": name}
        xml_file = files.xml_file(name)
        path = files.image_file(name)
        root = _parse(raw, xml_file, os.path.basename(path or f"{name}.jpg"))
        path = path or files.image_file(name, root) or os.path.join(raw.image_root, f"{name}.jpg")
        image["file_name"] = os.path.relpath(path, raw.image_root)
        images.append(image)
        if root is not None:
            _read_size(raw, root, xml_file, image)
            objects += _read_objects(raw, root, xml_file, image, one_based)
    # With labels.txt, a name that it lacks is an error, not another class.
    found = [] if listed else sorted({name for name, _, _ in objects if name})
    ids = {name: i for i, name in enumerate([*listed, *found])}
    annotations = []
    for number, (name, annotation, location) in enumerate(objects):
        annotations.append({"id": number + 1, "category_id": ids.get(name, name), **annotation})
        raw.locations[number] = location
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
            raw.report("duplicate-category-name", f"{name!r} is listed {count} times", file=path)
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
    where = {"file": xml_file, "image": image["file_name"]}
    if not any(texts) or texts == ["0", "0"]:
        raw.report("image-without-size", "the image's own size is used", **where)
        return
    try:
        width, height = (int(float(text or 0)) for text in texts)
    except (ValueError, OverflowError):  # the latter for infinity
        raw.report("image-wrong-type", f"the size is {texts}", **where)
        return
    image["width"], image["height"] = width, height


def _read_objects(
    raw: RawSet, root: ElementTree.Element, xml_file: str, image: dict, one_based: bool
) -> list[tuple[str, dict, str]]:
    """Return class name, annotation without category, and location of each object."""
    objects = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        location = f"{os.path.basename(xml_file)}, object {number} ({name or 'no name'})"
        where = {"image": image["file_name"], "annotation": location, "action": "object dropped"}
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in texts:
            missing = "no name" if not name else "no bndbox, or only part of it"
            raw.report("annotation-broken", f"there is {missing}", **where)
            continue
        try:
            x0, y0, x1, y1 = (float(cast(str, text)) for text in texts)
        except ValueError:
            raw.report("bad-box", f"the box is {texts}", **where)
            continue
        x0, y0 = x0 - one_based, y0 - one_based
        annotation: dict[str, Any] = {"image_id": image["id"], "bbox": [x0, y0, x1 - x0, y1 - y0]}
        if (element.findtext("iscrowd") or "0").strip() == "1":
            annotation["iscrowd"] = 1
        objects.append((name, annotation, location))
    return objects


def write_voc(source: ConversionSource, out: str, masks: str) -> tuple[str, list[str]]:
    """Write OUT/Annotations, ImageSets/Main/SPLIT.txt and labels.txt; the images go to OUT/JPEGImages."""
    _check_names(source)
    classes = source.write_class_list(os.path.join(out, "labels.txt"))
    paths = []
    for i, record in enumerate(source.dicts):
        objects = [_object_xml(source, annotation, classes) for annotation in record.get("annotations", ())]
        size = f"<width>{record['width']}</width><height>{record['height']}</height><depth>3</depth>"
        lines = [
            "<annotation>",
            f"  <filename>{escape(source.file_name(i))}</filename>",
            f"  <size>{size}</size>",
            *objects,
            "</annotation>\n",
        ]
        write_text(os.path.join(out, "Annotations", source.stems[i] + ".xml"), "\n".join(lines))
        paths.append(os.path.join(out, "JPEGImages", source.file_name(i)))
    write_text(os.path.join(out, "ImageSets", "Main", source.split + ".txt"), "\n".join(source.stems) + "\n")
    return f"voc:{out}@{source.split}", paths


def _check_names(source: ConversionSource) -> None:
    """Raise ValueError for image names that the layout cannot hold."""
    if any(len(stem.split()) != 1 for stem in source.stems):
        raise ValueError(
            f"Dataset {source.name!r} has images with spaces in their names; VOC's lists of splits cannot "
            "hold these."
        )
    suffixes = {os.path.splitext(record["file_name"])[1] for record in source.dicts}
    unknown = sorted(suffix for suffix in suffixes if suffix.lower() not in IMAGE_SUFFIXES)
    if unknown:
        raise ValueError(
            f"Dataset {source.name!r} has images that end in {unknown}; in VOC's layout they must end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )


def _object_xml(source: ConversionSource, annotation: dict, classes: list[str]) -> str:
    box = source.box(annotation)
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{key}>{format_number(value)}</{key}>" for key, value in zip(keys, box))
    marks = ""
    if annotation.get("iscrowd") or annotation.get("difficult"):
        marks = "<difficult>1</difficult>" + "<iscrowd>1</iscrowd>" * bool(annotation.get("iscrowd"))
    for key in ("segmentation", "keypoints"):
        source.count_lost(f"objects lose their {key}", annotation.get(key) is not None)
    name = escape(classes[annotation["category_id"]])
    return f"  <object><name>{name}</name>{marks}<bndbox>{corners}</bndbox></object>"


register_format(
    Format(
        name="voc",
        summary="XML of Pascal VOC, in VOC's folders or next to the images; `SPLIT` is a list in "
        "`ImageSets/Main` or a folder, `voc:DIR` reads all files where there is neither",
        uri_class=VocURI,
        write=write_voc,
        find=find_voc,
        layout="Annotations/*.xml with JPEGImages/ or images/, XML files next to the images, or folders of "
        "these",
        findings={"missing-annotation-file": ("error", "an image has no annotation file")},
    )
)
