"""Pasting of fixed-size masks, predicted within boxes, into pictures.

Shapes: N masks of M x M pixels, picture of H x W pixels.
"""

import math

import torch
from torch.nn import functional as F

__all__ = ["paste_masks_in_image"]

# Bound on the float32 pictures alive at a time when many masks are pasted at once.
_MEMORY_LIMIT_BYTES = 2**30


def paste_masks_in_image(
    masks: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[int, int], threshold: float = 0.5
):
    """Resizes each mask to its box and sets it into an otherwise empty picture.

    The value of a pixel is the mask sampled bilinearly at the pixel's centre; beyond its outermost cells the
    mask counts as zero.

    Args:
        masks: (N, M, M) probabilities in [0, 1].
        boxes: (N, 4) boxes, absolute xyxy pixels of the picture; `Boxes` or tensor.
        image_shape: (H, W).
        threshold: pixels at or above it are set. If negative, the result is soft.

    Returns:
        (N, H, W) bool tensor, or, for a negative threshold, (N, H, W) uint8 tensor of values times 255.

    Raises:
        ValueError: if masks are not square or not as many as boxes.
    """
    if masks.dim() != 3 or masks.shape[-1] != masks.shape[-2]:
        raise ValueError(f"masks must have shape (N, M, M), got {tuple(masks.shape)}")
    if not isinstance(boxes, torch.Tensor):
        boxes = boxes.tensor
    num_masks = len(masks)
    if tuple(boxes.shape) != (num_masks, 4):
        raise ValueError(f"{num_masks} masks need boxes of shape ({num_masks}, 4), got {tuple(boxes.shape)}")
    height, width = (int(size) for size in image_shape)

    dtype = torch.bool if threshold >= 0 else torch.uint8
    pasted = torch.zeros(num_masks, height, width, dtype=dtype, device=masks.device)
    if num_masks == 0:
        return pasted
    if masks.device.type == "cpu":
        # One mask at a time, and only the pixels near its box.
        chunk_size, crop = 1, True
    else:
        # Few large kernels without a synchronisation for the extent of each box.
        chunk_size, crop = max(1, _MEMORY_LIMIT_BYTES // (height * width * 4)), False
    for start in range(0, num_masks, chunk_size):
        chunk = slice(start, start + chunk_size)
        region = (slice(0, height), slice(0, width))
        if crop:
            region = _pixels_near(boxes[chunk], masks.shape[-1], height, width)
        if region[0].start == region[0].stop or region[1].start == region[1].stop:
            continue
        values = _sample(masks[chunk], boxes[chunk], *region)
        values = values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)
        pasted[(chunk, *region)] = values
    return pasted


def _pixels_near(boxes: torch.Tensor, mask_size: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the picture where masks in these boxes may be above zero."""
    x0, y0 = boxes[:, :2].amin(dim=0).tolist()
    x1, y1 = boxes[:, 2:].amax(dim=0).tolist()
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError("boxes to paste masks into must be finite")
    # Bilinear sampling fades out over half a cell of the mask outside the box.
    margin_y, margin_x = (y1 - y0) / (2 * mask_size), (x1 - x0) / (2 * mask_size)
    return _pixel_range(y0 - margin_y, y1 + margin_y, height), _pixel_range(
        x0 - margin_x, x1 + margin_x, width
    )


def _pixel_range(low: float, high: float, size: int) -> slice:
    start = min(max(math.floor(low) - 1, 0), size)
    return slice(start, max(min(math.ceil(high) + 1, size), start))


def _sample(masks: torch.Tensor, boxes: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """Mask values at the centres of a region's pixels, (N, rows, columns) float."""
    dtype = boxes.dtype if boxes.dtype.is_floating_point else torch.float32
    x0, y0, x1, y1 = boxes.to(dtype)[:, :, None].unbind(dim=1)
    y = torch.arange(rows.start, rows.stop, device=boxes.device, dtype=dtype) + 0.5
    x = torch.arange(columns.start, columns.stop, device=boxes.device, dtype=dtype) + 0.5
    # grid_sample's coordinates: -1 and 1 are the borders of the mask, i.e. of the box.
    y = (y - y0) / (y1 - y0) * 2 - 1
    x = (x - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=3
    )
    return F.grid_sample(masks[:, None].to(dtype), grid, align_corners=False)[:, 0]
