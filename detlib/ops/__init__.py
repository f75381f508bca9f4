"""Operators of detection, `torch.ops.detlib.*`: compiled kernels, or torchvision's, or PyTorch formulas."""

from detlib.ops.deform_conv import deform_conv2d
from detlib.ops.ms_deform_attn import ms_deform_attn
from detlib.ops.nms import batched_nms, nms
from detlib.ops.paste_masks import paste_masks, paste_masks_to_rle
from detlib.ops.rle import encode_rle
from detlib.ops.roi_align import roi_align

__all__ = [
    "batched_nms",
    "deform_conv2d",
    "encode_rle",
    "ms_deform_attn",
    "nms",
    "paste_masks",
    "paste_masks_to_rle",
    "roi_align",
]
