"""Pasting of fixed-size masks, predicted in boxes, into images.

Shapes: N masks of M x M pixels, image of H x W pixels.
"""

import torch

from detlib.ops import paste_masks

__all__ = ["paste_masks_in_image"]


def paste_masks_in_image(
    masks: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[int, int], threshold: float = 0.5
):
    """Resize each mask to its box and paste it into an empty image.

    The value of a pixel is the mask, sampled bilinearly at the center of the pixel. Outside its outermost
    cells the mask fades to zero. `detlib.ops.paste_masks_to_rle` returns COCO's run lengths instead, without
    creating the images.

    Args:
        masks: (N, M, M) probabilities in [0, 1].
        boxes: (N, 4) boxes, absolute xyxy pixels of the image; `Boxes` or tensor.
        image_shape: (H, W).
        threshold: pixels with at least this value are set. If negative, the result is soft.

    Returns:
        (N, H, W) bool tensor; for a negative threshold, (N, H, W) uint8 tensor of the values times 255.

    Raises:
        ValueError: if masks are not square, their number differs from that of the boxes, or boxes on the CPU
            are not finite.
    """
    if masks.dim() != 3 or masks.shape[-1] != masks.shape[-2]:
        raise ValueError(f"masks must have shape (N, M, M), got {tuple(masks.shape)}")
    if not isinstance(boxes, torch.Tensor):
        boxes = boxes.tensor
    if tuple(boxes.shape) != (len(masks), 4):
        raise ValueError(
            f"{len(masks)} masks need boxes of shape ({len(masks)}, 4), got {tuple(boxes.shape)}"
        )
    masks, boxes = (x if x.is_floating_point() else x.float() for x in (masks, boxes))
    # On a GPU this check would synchronize, and a traced graph has no values yet.
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(boxes.isfinite().all()):
            raise ValueError("boxes must be finite, got infinite or NaN coordinates")
    return paste_masks(masks, boxes, (int(image_shape[0]), int(image_shape[1])), threshold)
