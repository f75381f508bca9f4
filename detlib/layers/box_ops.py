"""Box functions on plain tensors, for DETR-like models, which predict centers and sizes.

Coordinates may be fractions of the image or pixels. `detlib.structures.Boxes` holds corners in pixels.
"""

import torch

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "inverse_sigmoid",
    "masks_to_boxes",
]

# Lower bound of divisors: boxes without area get an IoU of 0 instead of nan.
_SMALLEST_AREA = 1e-9


def box_cxcywh_to_xyxy(bbox: torch.Tensor) -> torch.Tensor:
    """Convert (..., 4) center x, center y, width, height to (..., 4) x0, y0, x1, y1."""
    center, half = bbox[..., :2], bbox[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def box_xyxy_to_cxcywh(bbox: torch.Tensor) -> torch.Tensor:
    """Convert (..., 4) x0, y0, x1, y1 to (..., 4) center x, center y, width, height."""
    low, high = bbox[..., :2], bbox[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _iou_and_union(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    inter = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (boxes1, boxes2)]
    union = (areas[0] + areas[1] - inter).clamp(min=_SMALLEST_AREA)
    return inter / union, union


def broadcast_giou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the generalized IoU of boxes (..., 4), x0, y0, x1, y1, whose leading shapes broadcast."""
    iou, union = _iou_and_union(boxes1, boxes2)
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (high - low).prod(dim=-1).clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the IoU of every pair of (R, 4) and (M, 4) boxes x0, y0, x1, y1.

    Returns:
        (R, M) IoU, and (R, M) areas of the unions.
    """
    return _iou_and_union(boxes1[:, None], boxes2[None])


def generalized_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the generalized IoU (arXiv:1902.09630) of every pair of boxes.

    It is the IoU minus the fraction of the enclosing box that neither box covers.

    Args:
        boxes1: (R, 4), x0, y0, x1, y1 with x1 >= x0 and y1 >= y0.
        boxes2: (M, 4), as `boxes1`.

    Returns:
        (R, M) in [-1, 1].
    """
    return broadcast_giou(boxes1[:, None], boxes2[None])


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the boxes around masks.

    Args:
        masks: (R, H, W); nonzero pixels belong to the object.

    Returns:
        (R, 4) float32: x0, y0, x1, y1, the first and the last column and row of the object in pixels; zeros
        for empty masks.
    """
    if masks.numel() == 0:
        return torch.zeros((len(masks), 4), device=masks.device)
    masks = masks.bool()
    bounds = []
    for present in (masks.any(dim=1), masks.any(dim=2)):
        index = torch.arange(present.shape[1], device=masks.device)
        first = torch.where(present, index, present.shape[1]).amin(dim=1)
        bounds.append((first, torch.where(present, index, 0).amax(dim=1)))
    (x0, x1), (y0, y1) = bounds
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes * masks.flatten(1).any(dim=1)[:, None]


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Return the logit of a probability. `x` and `1 - x` are clamped to at least `eps`, so it is finite."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
