"""Pasting of masks that are predicted in boxes into images (He et al., Mask R-CNN, 2017).

Shape legend: R masks of Hm x Wm cells, images of H x W pixels.

A mask is stretched over its box. The value of a pixel is the mask, interpolated bilinearly at the center of
the pixel. The mask's values are at the centers of its cells, and outside the mask they fade to zero over the
width of a cell, as in `torch.nn.functional.grid_sample(align_corners=False)`. All kernels interpolate along x
first, then along y, with the same order of operations, so that they agree on which pixels reach a threshold.
"""

from collections.abc import Iterator

import torch

from detlib.ops._library import check_same_length, check_tensor, define
from detlib.ops.rle import fake_rles, reference_encode_rle, split_rles


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Stretch each mask over its box and paste it into an empty image.

    Computed in float64 if masks or boxes are, else in float32. A box that has no area or is not finite gives
    an empty image. Not differentiable.

    Args:
        masks: (R, Hm, Wm) floating point probabilities.
        boxes: (R, 4) floating point, absolute `x1, y1, x2, y2` in pixels of the image; they may extend beyond
            the image. The dtype may differ from `masks`.
        image_size: (H, W).
        threshold: a pixel that the mask covers is set if its value is at least this. If negative, the result
            is soft.

    Returns:
        (R, H, W) bool; for a negative threshold (R, H, W) uint8: values clipped to [0, 1], times 255, rounded
        down.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    height, width = _check_arguments(masks, boxes, image_size)
    return _paste_masks(masks, boxes, height, width, threshold)


def paste_masks_in_image(
    masks: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[int, int], threshold: float = 0.5
):
    """Resize each mask to its box and paste it into an empty image.

    The value of a pixel is the mask, sampled bilinearly at the center of the pixel. Outside its outermost
    cells the mask fades to zero. `paste_masks_to_rle` returns COCO's run lengths instead, without
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
    # On a GPU, this check would synchronize; a traced graph has no values.
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(boxes.isfinite().all()):
            raise ValueError("boxes must be finite, got infinite or NaN coordinates")
    return paste_masks(masks, boxes, (int(image_shape[0]), int(image_shape[1])), threshold)


def paste_masks_to_rle(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict]:
    """Paste masks and encode them as COCO's compressed run lengths, without creating the images.

    Args:
        masks: (R, Hm, Wm) floating point probabilities, as for `paste_masks`.
        boxes: (R, 4) floating point, absolute `x1, y1, x2, y2` in pixels of the image.
        image_size: (H, W).
        threshold: a pixel that the mask covers is set if its value is at least this; not negative.

    Returns:
        One `{"size": [H, W], "counts": bytes}` for each mask, equal to `encode_rle(paste_masks(...))`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    height, width = _check_arguments(masks, boxes, image_size)
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    strings = _paste_masks_to_rle(masks, boxes, height, width, threshold)
    return split_rles(strings[0], strings[1], height, width)


def _check_arguments(masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int]) -> tuple:
    check_tensor("masks", masks, "(R, Hm, Wm)")
    check_tensor("boxes", boxes, "(R, 4)")
    check_same_length("boxes", boxes, "masks", masks)
    if len(image_size) != 2 or any(isinstance(size, int) and size < 0 for size in image_size):
        raise ValueError(f"image_size must be (height, width), not negative, got {tuple(image_size)}")
    return tuple(image_size)


def _positions(low: torch.Tensor, high: torch.Tensor, cells: int, pixels: int) -> torch.Tensor:
    """Return the positions of pixel centers along one axis of the masks, (R, pixels); cell i is at i."""
    centers = torch.arange(pixels, dtype=low.dtype, device=low.device) + 0.5
    # Normalize to [-1, 1] first, for the same rounding as detectron2.
    normalized = (centers - low[:, None]) / (high - low)[:, None] * 2 - 1
    return ((normalized + 1) * cells - 1) / 2


def _span(positions: torch.Tensor, cells: int, valid: torch.Tensor) -> list[tuple[int, int]]:
    """Return the first and one-past-last pixel that each mask covers."""
    reached = (positions > -1) & (positions < cells) & valid[:, None]
    if reached.shape[1] == 0:
        return [(0, 0)] * len(reached)
    first = reached.byte().argmax(dim=1)
    return list(zip(first.tolist(), (first + reached.sum(dim=1)).tolist()))


def _pasted_regions(
    masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int
) -> Iterator[tuple[int, slice, slice, torch.Tensor]]:
    """Yield index, rows, columns, and pixel values of each mask that covers a pixel."""
    is_double = torch.float64 in (masks.dtype, boxes.dtype)
    dtype = torch.float64 if is_double else torch.float32
    (_, mask_height, mask_width), boxes = masks.shape, boxes.to(dtype)
    valid = boxes.isfinite().all(dim=1) & (boxes[:, 2:] - boxes[:, :2] > 0).all(dim=1)
    valid &= min(mask_height, mask_width) > 0
    x0, y0, x1, y1 = boxes.where(valid[:, None], 0).unbind(dim=1)
    y, x = _positions(y0, y1, mask_height, height), _positions(x0, x1, mask_width, width)
    spans = zip(_span(y, mask_height, valid), _span(x, mask_width, valid))
    for index, ((top, bottom), (left, right)) in enumerate(spans):
        if top < bottom and left < right:
            rows, columns = slice(top, bottom), slice(left, right)
            # A border of one zero cell.
            cells = torch.nn.functional.pad(masks[index].to(dtype), (1, 1, 1, 1))
            values = _blend(cells.T, x[index, columns]).T
            yield index, rows, columns, _blend(values, y[index, rows])


def _blend(cells: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Interpolate between the rows of `cells`; the first row is at position -1."""
    before = positions.floor()
    fraction, before = (positions - before)[:, None], before.long() + 1
    first, second = cells[before], cells[before + 1]
    return first + fraction * (second - first)


def reference_paste_masks(masks, boxes, height, width, threshold):
    """Compute `paste_masks` in plain PyTorch, one mask at a time, only for the pixels that it covers."""
    dtype = torch.bool if threshold >= 0 else torch.uint8
    images = torch.zeros(len(masks), height, width, dtype=dtype, device=masks.device)
    for index, rows, columns, values in _pasted_regions(masks, boxes, height, width):
        if threshold >= 0:
            images[index, rows, columns] = values >= threshold
        else:
            images[index, rows, columns] = (values * 255).nan_to_num(0).clamp(0, 255).byte()
    return images


def reference_paste_masks_to_rle(masks, boxes, height, width, threshold):
    """Compute `paste_masks_to_rle` in plain PyTorch, one image at a time."""
    parts = [
        reference_encode_rle(reference_paste_masks(mask[None], box[None], height, width, max(threshold, 0.0)))
        for mask, box in zip(masks, boxes)
    ]
    text = torch.cat([torch.empty(0, dtype=torch.uint8), *(text for text, _ in parts)])
    return text, torch.cat([torch.empty(0, dtype=torch.int64), *(length for _, length in parts)])


def _fallback_paste_masks_to_rle(masks, boxes, height, width, threshold):
    if masks.device.type != "cpu":
        # Masks in boxes are small, and run lengths are needed on the CPU.
        return _paste_masks_to_rle(masks.cpu(), boxes.cpu(), height, width, threshold)
    return reference_paste_masks_to_rle(masks, boxes, height, width, threshold)


def _fake_paste_masks(masks, boxes, height, width, threshold):
    dtype = torch.bool if threshold >= 0 else torch.uint8
    return masks.new_empty((masks.shape[0], height, width), dtype=dtype)


_paste_masks = define(
    "paste_masks",
    "(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor",
    fallback=reference_paste_masks,
    fake=_fake_paste_masks,
)
_paste_masks_to_rle = define(
    "paste_masks_to_rle",
    "(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> (Tensor, Tensor)",
    fallback=_fallback_paste_masks_to_rle,
    fake=lambda masks, *_: fake_rles(masks),
)
