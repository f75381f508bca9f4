"""The path under which the functions that register COCO's formats are imported too."""

from detlib.data.datasets.coco import register_coco_instances
from detlib.data.datasets.coco_panoptic import register_coco_panoptic_separated

__all__ = ["register_coco_instances", "register_coco_panoptic_separated"]
