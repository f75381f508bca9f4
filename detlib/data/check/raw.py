"""Reading a data set of any format as COCO-like content, whatever is wrong with it.

The loaders refuse the first fault; this goes on, and keeps what cannot be told in COCO's terms as findings.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog, find_address
from detlib.data.datasets.lvis import with_lvis_path
from detlib.data.datasets.roboflow import ANNOTATION_FILE, find_roboflow_split, without_root_category
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager

from .kinds import Finding

__all__ = ["RawSet", "read_raw", "split_root"]


@dataclass
class RawSet:
    """A data set as it was found.

    Attributes:
        file: the annotation file or folder, for the messages.
        image_root: folder that file names are relative to.
        content: what a COCO annotation file holds; any of it may be malformed.
        findings: what was found while reading.
        places: for some annotations, by their number in the list, what names them better than their id.
    """

    file: str
    image_root: str
    content: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    places: dict[int, str] = field(default_factory=dict)

    def report(self, kind: str, detail: str, **where: str) -> None:
        """Adds a finding."""
        where.setdefault("file", self.file)
        self.findings.append(Finding(kind, detail=detail, **where))


def read_raw(name: str) -> RawSet:
    """Reads the data set of an address or a registered name.

    Raises:
        KeyError: the name is not known.
        FileNotFoundError, ValueError: the address is malformed, or leads nowhere.
    """
    from .raw_voc import read_voc  # these build on this file
    from .raw_yolo import read_yolo

    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file") and metadata.get("image_root") is not None:
            raw = _read_coco(metadata.json_file, metadata.image_root)
            if metadata.get("evaluator_type") == "lvis" and _is_list_of_dicts(raw.content.get("images")):
                raw.content["images"] = [with_lvis_path(image) for image in raw.content["images"]]
            return raw
        if metadata.get("yaml_file"):
            return read_yolo(metadata.yaml_file, metadata.split)
        return _read_records(name, metadata)
    address = find_address(name)
    address = address.resolve() if hasattr(address, "resolve") else address
    kind = type(address).__name__
    if kind == "CocoAddress":
        address.check()
        return _read_coco(address.json_file, address.image_root)
    if kind == "RoboflowAddress":
        folder = find_roboflow_split(address.dirname, address.split)
        return _read_coco(os.path.join(folder, ANNOTATION_FILE), folder, has_root=True)
    if kind == "VocAddress":
        address.check()
        return read_voc(address.dirname, address.split, one_based=address.one_based)
    if kind == "YoloAddress":
        return read_yolo(address.yaml_file, address.split)
    return _read_records(name, MetadataCatalog.get(name))


def _read_coco(json_file: str, image_root: str, has_root: bool = False) -> RawSet:
    raw = RawSet(json_file, image_root)
    try:
        with PathManager.open(json_file, "rb") as file:
            content = json.loads(file.read())
    except ValueError as error:
        raw.report("bad-file", f"it is not valid JSON: {error}")
        return raw
    if not isinstance(content, dict):
        raw.report("bad-file", f"it must hold a JSON object, not a {type(content).__name__}")
        return raw
    if has_root and all(_is_list_of_dicts(content.get(key)) for key in ("categories", "annotations")):
        content = without_root_category(content)
    raw.content = content
    return raw


def _is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def split_root(paths: list[str]) -> tuple[str, list[str]]:
    """Returns the folder that all paths have in common, and the paths from there."""
    folder = os.path.commonprefix([os.path.dirname(path) + "/" for path in paths]).rpartition("/")[0]
    return folder, [path[len(folder) + 1 :] if folder else path for path in paths]


def _read_records(name: str, metadata: Metadata) -> RawSet:
    """Reads by the registered function, and turns the standard dicts into COCO's content."""
    dicts = DatasetCatalog.get(name)
    root, file_names = split_root([str(record.get("file_name", "")) for record in dicts])
    raw = RawSet(name, root)
    images, annotations = [], []
    for index, (record, file_name) in enumerate(zip(dicts, file_names)):
        image = {key: record[key] for key in ("height", "width") if key in record}
        image["file_name"] = file_name
        image["id"] = record.get("image_id", index)
        images.append(image)
        for annotation in record.get("annotations", ()):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **_to_coco(annotation)})
    classes = metadata.get("thing_classes")
    if classes is None:
        used = {annotation.get("category_id") for annotation in annotations}
        classes = [str(i) for i in range(1 + max((i for i in used if isinstance(i, int)), default=-1))]
    categories: list[dict] = [{"id": i, "name": str(name)} for i, name in enumerate(classes)]
    if metadata.get("keypoint_names"):
        for category in categories:
            category["keypoints"] = list(metadata.keypoint_names)
    raw.content = {"images": images, "categories": categories, "annotations": annotations}
    return raw


def _to_coco(annotation: dict) -> dict:
    result = {key: value for key, value in annotation.items() if key != "bbox_mode"}
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if isinstance(box, np.ndarray):
        box = result["bbox"] = box.tolist()
    if isinstance(box, list | tuple) and mode is not None and len(box) in (4, 5):
        wanted = BoxMode.XYWHA_ABS if mode == BoxMode.XYWHA_ABS else BoxMode.XYWH_ABS
        result["bbox"] = list(BoxMode.convert(list(box), mode, wanted))
    if isinstance(annotation.get("segmentation"), list):
        result["segmentation"] = [
            np.asarray(polygon).ravel().tolist() for polygon in annotation["segmentation"]
        ]
    if annotation.get("keypoints") is not None:
        keypoints = np.array(annotation["keypoints"], dtype=np.float64).ravel()
        result["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(keypoints.tolist())]
    return result
