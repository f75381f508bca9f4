"""Non-maximum suppression, handed on from `detlib.ops`."""

from detlib.ops import batched_nms, nms

__all__ = ["batched_nms", "nms"]
