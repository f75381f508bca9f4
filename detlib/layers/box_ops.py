"""Boxes as plain tensors of centres and sizes, as DETR-like models predict them.

The frame is free: fractions of a picture, or pixels. `detlib.structures.Boxes` are for corners in pixels.
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

# Areas below it count as nothing: boxes without area overlap with none, and nothing is divided by zero.
_SMALLEST_AREA = 1e-9


def box_cxcywh_to_xyxy(bbox: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre x, centre y, width, height to (..., 4) x0, y0, x1, y1."""
    centre, half = bbox[..., :2], bbox[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(bbox: torch.Tensor) -> torch.Tensor:
    """(..., 4) x0, y0, x1, y1 to (..., 4) centre x, centre y, width, height."""
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
    """Generalised IoU (arXiv:1902.09630) of boxes x0, y0, x1, y1 whose shapes, without the 4, broadcast."""
    iou, union = _iou_and_union(boxes1, boxes2)
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (high - low).prod(dim=-1).clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union of each of (R, 4) with each of (M, 4) boxes x0, y0, x1, y1.

    Returns:
        (R, M) IoU, and (R, M) areas of the unions.
    """
    return _iou_and_union(boxes1[:, None], boxes2[None])


def generalized_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (arXiv:1902.09630), in [-1, 1]: IoU, less the share of their hull that neither covers.

    Args:
        boxes1: (R, 4), x0, y0, x1, y1 with x1 >= x0 and y1 >= y0.
        boxes2: (M, 4) likewise.

    Returns:
        (R, M).
    """
    return broadcast_giou(boxes1[:, None], boxes2[None])


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """The boxes around masks.

    Args:
        masks: (R, H, W), of which everything but zero belongs to the object.

    Returns:
        (R, 4) float32: x0, y0, x1, y1, the first and the last column and row of the object, in whole pixels;
        zeros for empty masks.
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
    """The logit of a probability; x and 1 - x count as at least `eps`, which keeps it finite."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
