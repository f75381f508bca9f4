"""Non-maximum suppression, re-exported from `detlib.ops` under detectron2's import path."""

from detlib.ops import batched_nms, batched_nms_rotated, nms, nms_rotated

__all__ = ["batched_nms", "batched_nms_rotated", "nms", "nms_rotated"]
