"""detectron2's import path of the functions that register COCO datasets."""

from detlib.data.datasets.coco import register_coco_instances
from detlib.data.datasets.coco_panoptic import register_coco_panoptic_separated

__all__ = ["register_coco_instances", "register_coco_panoptic_separated"]
