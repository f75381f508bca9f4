"""Operators of detection, `torch.ops.detlib.*`: compiled kernels, or torchvision's, or PyTorch formulas."""

from detlib.ops.nms import batched_nms, nms
from detlib.ops.roi_align import roi_align

__all__ = ["batched_nms", "nms", "roi_align"]
