"""Non-maximum suppression of axis-aligned boxes, over all boxes or per category.

Shape legend: N boxes, K kept boxes.
"""

import torch

from detlib.ops._library import check_nms_arguments, define, torchvision_ops


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Apply non-maximum suppression: drop boxes that overlap a box of higher score.

    Boxes are visited in descending score order, and in input order for equal scores. A box is dropped if its
    IoU with a kept box exceeds `iou_threshold`. A box without area overlaps nothing. Not differentiable.

    Args:
        boxes: (N, 4) floating point, absolute `x1, y1, x2, y2` with `x1 <= x2` and `y1 <= y2`. Reduced
            precision is compared in float32.
        scores: (N,) floating point.
        iou_threshold: in [0, 1].

    Returns:
        (K,) int64: indices of the kept boxes, in descending score order.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    check_nms_arguments(boxes, scores, iou_threshold, box_dim=4)
    return _nms(boxes, scores, iou_threshold)


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Apply non-maximum suppression to each category: boxes of different `idxs` never suppress each other.

    Categories are compared directly, not by shifting the boxes apart, so coordinates keep their precision for
    any number of categories.

    Args:
        boxes: (N, 4) floating point, absolute `x1, y1, x2, y2`, as for `nms`.
        scores: (N,) floating point.
        idxs: (N,) category of each box: integers, booleans or integral floats, of any value.
        iou_threshold: in [0, 1].

    Returns:
        (K,) int64: indices of the kept boxes of all categories, in descending score order.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    check_nms_arguments(boxes, scores, iou_threshold, box_dim=4, idxs=idxs)
    return _batched_nms(boxes, scores, idxs, iou_threshold)


def reference_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor | None, iou_threshold: float
) -> torch.Tensor:
    """Compute NMS in plain PyTorch, one kept box at a time. `idxs` of None means one category."""
    boxes = _at_least_float32(boxes)
    order = scores.sort(descending=True, stable=True).indices
    kept = []
    while order.numel():
        best, rest = order[:1], order[1:]
        kept.append(best)
        overlaps = _iou_with(boxes[best], boxes[rest]) > iou_threshold
        if idxs is not None:
            overlaps &= idxs[rest] == idxs[best]
        order = rest[~overlaps]
    return torch.cat(kept) if kept else order


def _iou_with(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the IoU of one box (1, 4) with N others (N, 4); nan if both have no area."""
    top_left = torch.maximum(box[:, :2], others[:, :2])
    bottom_right = torch.minimum(box[:, 2:], others[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    area = (box[:, 2:] - box[:, :2]).prod(dim=1)
    areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    return intersection / (area + areas - intersection)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _fallback_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    torchvision, _ = torchvision_ops()
    if torchvision is None:
        return reference_nms(boxes, scores, None, iou_threshold)
    boxes = _at_least_float32(boxes)
    # torchvision needs the same dtype for both. Ranks replace the scores, since rounding cannot make them
    # equal.
    order = scores.sort(descending=True, stable=True).indices
    rank = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    if len(order) >= 1 << 24:
        rank = scores.to(boxes.dtype)[order]
    return order[torchvision.nms(boxes[order], rank, iou_threshold)]


def _fallback_batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    if torchvision_ops()[0] is None:
        return reference_nms(boxes, scores, idxs, iou_threshold)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    counts = idxs.unique(return_counts=True)[1].tolist()
    for members in idxs.argsort(stable=True).split(counts):
        keep[members[_fallback_nms(boxes[members], scores[members], iou_threshold)]] = True
    order = scores.sort(descending=True, stable=True).indices
    return order[keep[order]]


def _fake_nms(boxes, *_):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_nms = define(
    "nms",
    "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    fallback=_fallback_nms,
    fake=_fake_nms,
    in_torchvision=True,
)
_batched_nms = define(
    "batched_nms",
    "(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    fallback=_fallback_batched_nms,
    fake=_fake_nms,
    in_torchvision=True,
)
