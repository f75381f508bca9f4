"""Ultralytics' YOLO layout: a data.yaml, and one text file of labels for each image."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import yaml

from detlib.data.catalog import Metadata
from detlib.data.datasets.file_values import MAX_COORDINATE, are_coordinates
from detlib.data.datasets.yolo import (
    SLACK,
    has_oriented_boxes,
    load_yolo,
    read_label_rows,
    row_to_annotation,
    to_rotated,
    yolo_metadata,
)
from detlib.data.datasets.yolo_labels import LabelFinder, label_file_of
from detlib.data.datasets.yolo_layout import (
    YoloConfig,
    find_yolo_images,
    read_yolo_config,
)
from detlib.data.formats.base import EMPTY_BOXES, Candidate, Format, ParsedURI, register_format
from detlib.data.formats.findings import RawSet, split_common_folder
from detlib.data.formats.objects import ROTATED_BOXES
from detlib.data.formats.writing import ConversionSource, format_number, write_text
from detlib.data.image_io import check_image_size, read_image_size
from detlib.utils.file_io import PathManager

__all__ = ["YoloURI", "read_raw_yolo", "write_yolo"]

logger = logging.getLogger(__name__)


class YoloURI(ParsedURI):
    """`yolo:DATA.yaml@SPLIT`, `yolo:obj.data@SPLIT`, `yolo:DIR@SPLIT` or `yolo:DIR`."""

    form = "yolo:DATA.yaml@SPLIT"
    options = (ROTATED_BOXES, EMPTY_BOXES)

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.yaml_file, self.split = self.split_body_with_optional_split()
        if not self.split and self.yaml_file.endswith((".yaml", ".yml", ".data")):
            raise self.error(f"it must be {self.form}; the split is missing.")
        self.split = self.split or "all"
        self.rotated = self.values["boxes"] == "rotated"

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError if the file, the split or its images do not exist."""
        find_yolo_images(read_yolo_config(self.yaml_file), self.split)

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format."""
        empty_boxes = self.values["empty_boxes"]
        return load_yolo(self.yaml_file, self.split, empty_boxes=empty_boxes, rotated=self.rotated)

    def metadata(self) -> dict[str, Any]:
        """Return classes and keypoints from the data.yaml."""
        config = read_yolo_config(self.yaml_file)
        config.split_name(self.split)
        return yolo_metadata(config, self.split, rotated=self.rotated)

    def read_raw(self) -> RawSet:
        """Read the split for the checker."""
        return read_raw_yolo(self.yaml_file, self.split, rotated=self.rotated)


def find_yolo(path: str) -> list[Candidate]:
    """Find the splits of all data.yaml files in a folder, whatever their name, or of another layout."""
    found = []
    for name in sorted(PathManager.ls(path)):
        if not name.endswith((".yaml", ".yml")):
            continue
        file = os.path.join(path, name)
        try:
            config = read_yolo_config(file)
        except ValueError as error:
            if name == "data.yaml":
                raise
            logger.debug("%s does not describe a dataset: %s", file, error)
            continue
        found += [Candidate(f"yolo:{file}@{split}", split, f"found {name}") for split in config.splits]
    if found:
        return found
    try:
        config = read_yolo_config(path)
        first = find_yolo_images(config, next(iter(config.splits)))[0]
    except (ValueError, OSError) as error:
        logger.debug("%s is not a folder of YOLO: %s", path, error)
        return []
    if LabelFinder().find(first) is None and config.file == path:
        return []  # a list of classes and images, but no labels: not this format
    return [Candidate(f"yolo:{config.file}@{split}", split, "found YOLO labels") for split in config.splits]


def _uri_of_file(path: str) -> str | None:
    """Return the URI of the only split that a file describes, or of "train"."""
    if not path.endswith((".yaml", ".yml", ".data")):
        return None
    splits = [*read_yolo_config(path).splits]
    return f"yolo:{path}@{splits[0] if len(splits) == 1 else 'train'}"


def read_registered_yolo(metadata: Metadata) -> RawSet | None:
    """Read a dataset registered by `register_yolo` for the checker."""
    if not metadata.get("yaml_file"):
        return None
    return read_raw_yolo(metadata.yaml_file, metadata.split)


def read_raw_yolo(yaml_file: str, split: str, *, rotated: bool = True) -> RawSet:
    """Read a split for the checker; `rotated` as for `load_yolo`.

    Raises:
        FileNotFoundError: The data.yaml, or a folder or list that it names, does not exist.
    """
    raw = RawSet(yaml_file, "", states_sizes=False)
    try:
        config = read_yolo_config(yaml_file)
        paths = find_yolo_images(config, split)
    except ValueError as error:
        raw.report("bad-file", str(error))
        return raw
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, paths))
    raw.image_root, names = split_common_folder(paths)
    finder = LabelFinder()
    files = [finder.find(path) for path in paths]
    if not any(files):
        detail = f"none of the {len(paths)} images has a label file. Looked for: {finder.searched(paths[0])}"
        raw.report("no-labels", detail)
    rows = [_rows(raw, file, name) if file else [] for file, name in zip(files, names)]
    as_rotated = rotated and has_oriented_boxes(config, rows)
    images: list[dict] = []
    annotations: list[dict] = []
    for name, size, file, lines in zip(names, sizes, files, rows):
        image: dict[str, Any] = {"id": len(images) + 1, "file_name": name}
        if size is not None:
            image["width"], image["height"] = size
        images.append(image)
        for number, words in lines:
            where = {"image": name, "annotation": f"{file}, line {number}"}
            annotation = _read_row(raw, words, size or (1, 1), config, where, as_rotated)
            if annotation is not None:
                raw.locations[len(annotations)] = where["annotation"]
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
    _report_orphans(raw, [file or label_file_of(path) for path, file in zip(paths, files)])
    categories: list[dict] = [{"id": i, "name": name} for i, name in enumerate(config.names)]
    if config.kpt_names:
        for category in categories:
            category["keypoints"] = list(config.kpt_names)
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def _size(path: str) -> tuple[int, int] | None:
    """Return width and height; None if the image cannot be read, which the checker reports itself."""
    try:
        return read_image_size(path)
    except (OSError, ValueError):
        return None


def _rows(raw: RawSet, label_file: str, image: str) -> list[tuple[int, list[str]]]:
    try:
        return list(read_label_rows(label_file))
    except ValueError as error:
        raw.report("bad-file", str(error), file=label_file, image=image)
        return []


def _read_row(
    raw: RawSet,
    words: list[str],
    size: tuple[int, int],
    config: YoloConfig,
    where: dict[str, str],
    as_rotated: bool,
) -> dict | None:
    """Return a line as a COCO annotation, or None and a finding."""
    kind, detail = _fault(words, config)
    if kind:
        raw.report(kind, detail, action="line dropped", **where)
        return None
    annotation = row_to_annotation(words, size, config, where["annotation"])
    if as_rotated:
        annotation = to_rotated(annotation)
        return {"category_id": annotation["category_id"], "bbox": annotation["bbox"]}
    x0, y0, x1, y1 = annotation["bbox"]
    result = {"category_id": annotation["category_id"], "bbox": [x0, y0, x1 - x0, y1 - y0]}
    if "segmentation" in annotation:
        result["segmentation"] = annotation["segmentation"]
    if "keypoints" in annotation:
        keypoints = annotation["keypoints"]
        result["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(keypoints)]
    return result


def _fault(words: list[str], config: YoloConfig) -> tuple[str, str]:
    """Return kind and detail of a line's fault; empty if there is none."""
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
        return "bad-label-line", f"{num + 1} values; there must be 5, or a class and at least 3 points"
    if not are_coordinates(values):
        bad = "polygon-not-finite" if num != 4 and config.kpt_shape is None else "box-not-finite"
        return bad, f"{line!r} has a value that is not finite, or beyond {MAX_COORDINATE}"
    coordinates = values[1:5] if config.kpt_shape is not None else values[1:]
    if not all(-SLACK <= value <= 1 + SLACK for value in coordinates):
        return "not-normalized", f"not all of {line!r} are in 0..1; are these pixels?"
    return "", ""


def _report_orphans(raw: RawSet, label_files: list[str]) -> None:
    """Report label files without an image, in the folders `labels` of the label files."""
    expected = {*label_files}
    folders = {os.path.dirname(path) for path in expected}
    folders &= {folder for folder in folders if "labels" in folder.split("/") and PathManager.isdir(folder)}
    for folder in sorted(folders):
        for name in sorted(PathManager.ls(folder)):
            path = os.path.join(folder, name)
            if name.lower().endswith(".txt") and not name.startswith("._") and path not in expected:
                raw.report("label-without-image", "no image of the split has this name", file=path)


def write_yolo(source: ConversionSource, out: str, masks: str) -> tuple[str, list[str]]:
    """Write OUT/data.yaml, OUT/labels/SPLIT and the list OUT/SPLIT.txt; the images go to OUT/images/SPLIT."""
    keypoints = source.check_keypoint_counts()
    with_polygons = not keypoints and _use_polygons(source, masks)
    source.count_lost_difficult()
    paths = []
    for i, record in enumerate(source.dicts):
        # Coordinates normalized by a wrong size would be wrong, and nothing could detect that later.
        width, height = read_image_size(record["file_name"])
        check_image_size(record, np.empty((height, width, 0)))
        lines = []
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd"):
                source.count_lost("crowd regions are left out")
                continue
            lines.append(_label_line(source, annotation, (width, height), with_polygons, keypoints))
        text = "".join(line + "\n" for line in lines)
        write_text(os.path.join(out, "labels", source.split, source.stems[i] + ".txt"), text)
        paths.append(os.path.join(out, "images", source.split, source.file_name(i)))
    # A folder is read in alphabetical order; the list keeps the order of the dataset.
    listed = "".join(f"./images/{source.split}/{os.path.basename(path)}\n" for path in paths)
    write_text(os.path.join(out, f"{source.split}.txt"), listed)
    file = os.path.join(out, "data.yaml")
    write_text(file, _data_yaml(source, file, keypoints))
    return f"yolo:{file}@{source.split}", paths


def _use_polygons(source: ConversionSource, masks: str) -> bool:
    objects = [a for record in source.dicts for a in record.get("annotations", ()) if not a.get("iscrowd")]
    having = [isinstance(a.get("segmentation"), list) and bool(a["segmentation"]) for a in objects]
    if masks == "boxes" or not any(having):
        return False
    if masks == "polygons":
        source.count_lost("objects have no polygon and are written as boxes", having.count(False))
        return True
    moved = sum(
        not has_polygon or not source.is_extent(a, _extent(a)) for a, has_polygon in zip(objects, having)
    )
    if moved:
        logger.warning(
            "Boxes are written, not polygons: %d of %d objects would get another box or have no polygon. "
            "--masks polygons writes polygons nevertheless.",
            moved,
            len(objects),
        )
    return not moved


def _extent(annotation: dict) -> tuple[float, float, float, float]:
    """Return the extent (x0, y0, x1, y1) of an object's polygons."""
    values = annotation["segmentation"]
    x, y = [v for p in values for v in p[0::2]], [v for p in values for v in p[1::2]]
    return min(x), min(y), max(x), max(y)


def _label_line(
    source: ConversionSource,
    annotation: dict,
    size: tuple[int, int],
    with_polygons: bool,
    keypoints: list[str] | None,
) -> str:
    x0, y0, x1, y1 = source.box(annotation)
    width, height = size
    box = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    segmentation = annotation.get("segmentation")
    if with_polygons and isinstance(segmentation, list) and segmentation:
        source.count_moved_box(annotation, _extent(annotation))
        values = [float(v) / size[i % 2] for i, v in enumerate(_join_polygons(segmentation))]
    elif keypoints:
        points = annotation.get("keypoints")
        points = [0.0] * (3 * len(keypoints)) if points is None or not len(points) else list(points)
        values = box + [float(v) if i % 3 == 2 else float(v) / size[i % 3] for i, v in enumerate(points)]
    else:
        values = box
    if segmentation is not None and not with_polygons:
        source.count_lost("objects lose their segmentation")
    return " ".join([str(annotation["category_id"]), *map(format_number, values)])


def _join_polygons(polygons: list) -> list[float]:
    """Join all parts of a mask into one polygon.

    The polygon goes around the first part, and from its start to each other part and back. These connections
    have no area.
    """
    first = [float(value) for value in polygons[0]]
    joined = list(first)
    for polygon in polygons[1:]:
        part = [float(value) for value in polygon]
        joined += [*first[:2], *part, *part[:2], *first[:2]]
    return joined


def _data_yaml(source: ConversionSource, file: str, keypoints: list[str] | None) -> str:
    """Return the new content of a data.yaml, which may already have other splits."""
    data: dict = {}
    if PathManager.isfile(file):
        with PathManager.open(file, "rb") as opened:
            data = yaml.safe_load(opened.read()) or {}
    names = dict(enumerate(source.metadata.thing_classes))
    if data.get("names", names) != names:
        raise ValueError(
            f"{file} has other classes ({data['names']}) than this dataset ({names}); write into another "
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


register_format(
    Format(
        name="yolo",
        summary="YOLO: boxes, oriented boxes, polygons, or poses with `kpt_shape`. Also Darknet's "
        "`yolo:obj.data@SPLIT`, and `yolo:DIR` with classes.txt or _darknet.labels",
        uri_class=YoloURI,
        read_registered=read_registered_yolo,
        write=write_yolo,
        find=find_yolo,
        uri_of_file=_uri_of_file,
        layout="data.yaml (or another .yaml with 'names' and 'train', 'val' or 'test'), obj.data, or "
        "classes.txt or _darknet.labels with images and labels",
        findings={
            "no-labels": ("error", "no image of the split has a label file"),
            "label-without-image": ("warning", "a label file belongs to no image"),
        },
    )
)
