"""The path under which `register_coco_instances` is imported too."""

from .coco import register_coco_instances

__all__ = ["register_coco_instances"]
