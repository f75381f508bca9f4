"""Loaders and registration functions of dataset formats, and the built-in datasets."""

from detlib.data.datasets import builtin
from detlib.data.datasets.coco import (
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
)
from detlib.data.datasets.coco_panoptic import register_coco_panoptic, register_coco_panoptic_separated
from detlib.data.datasets.lvis import get_lvis_instances_meta, load_lvis_json, register_lvis_instances
from detlib.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc
from detlib.data.datasets.roboflow import load_roboflow, register_roboflow
from detlib.data.datasets.yolo import load_yolo, register_yolo

__all__ = [
    "builtin",
    "convert_to_coco_json",
    "get_lvis_instances_meta",
    "load_coco_json",
    "load_lvis_json",
    "load_roboflow",
    "load_sem_seg",
    "load_voc_instances",
    "load_yolo",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
    "register_lvis_instances",
    "register_pascal_voc",
    "register_roboflow",
    "register_yolo",
]
