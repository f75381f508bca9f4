"""Detection operators, `torch.ops.detlib.*`: compiled kernels, torchvision's kernels or plain PyTorch."""

from detlib.ops.deform_conv import deform_conv2d
from detlib.ops.frozen_batch_norm import frozen_batch_norm
from detlib.ops.ms_deform_attn import ms_deform_attn
from detlib.ops.nms import batched_nms, nms
from detlib.ops.paste_masks import paste_masks, paste_masks_in_image, paste_masks_to_rle
from detlib.ops.resize import resize_image
from detlib.ops.rle import encode_rle
from detlib.ops.roi_align import roi_align
from detlib.ops.roi_align_rotated import roi_align_rotated
from detlib.ops.rotated import batched_nms_rotated, box_iou_rotated, nms_rotated

__all__ = [
    "batched_nms",
    "batched_nms_rotated",
    "box_iou_rotated",
    "deform_conv2d",
    "encode_rle",
    "frozen_batch_norm",
    "ms_deform_attn",
    "nms",
    "nms_rotated",
    "paste_masks",
    "paste_masks_in_image",
    "paste_masks_to_rle",
    "resize_image",
    "roi_align",
    "roi_align_rotated",
]
