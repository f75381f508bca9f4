"""Intersection over union and non-maximum suppression of rotated boxes.

A box is `center x, center y, width, height, angle` with the angle in degrees. In image coordinates (y points
down) the width is measured along (cos, -sin) of the angle, so positive angles are counter-clockwise.

Shape legend: N and M boxes, K kept boxes, P pairs of boxes.

Let one box be `|x| <= W, |y| <= H` in its own frame. The area of its intersection with another convex shape
is the integral over x of the upper edge of the shape minus its lower edge, both clamped to [-H, H]. For a
rotated box this is a sum over four straight edges, each in closed form, so touching or coinciding edges need
no special case. The reference below and the compiled kernels compute it in double precision.
"""

import math

import torch

from detlib.ops._library import check_nms_arguments, check_same_device, check_tensor, define

_MAX_PAIRS = 1 << 18


def box_iou_rotated(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of every pair of N and M rotated boxes.

    Computed in double precision. A box that is not finite, or has no positive width and height, overlaps
    nothing. Not differentiable.

    Args:
        boxes1: (N, 5) floating point, `center x, center y, width, height` in absolute pixels and the angle in
            degrees, counter-clockwise.
        boxes2: (M, 5) floating point, as `boxes1`.

    Returns:
        (N, M) in [0, 1]; float64 if one of the inputs is, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_tensor("boxes1", boxes1, "(N, 5)")
    check_tensor("boxes2", boxes2, "(M, 5)")
    check_same_device("boxes2", boxes2, "boxes1", boxes1)
    return _box_iou_rotated(boxes1.detach(), boxes2.detach())


def nms_rotated(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Apply non-maximum suppression to rotated boxes: drop boxes that overlap a box of higher score.

    Works like `nms`, with the IoU of `box_iou_rotated`. Not differentiable.

    Args:
        boxes: (N, 5) floating point, as for `box_iou_rotated`.
        scores: (N,) floating point.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a kept box exceeds it.

    Returns:
        (K,) int64: indices of the kept boxes, in descending score order, and in input order for equal scores.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    check_nms_arguments(boxes, scores, iou_threshold, box_dim=5)
    return _nms_rotated(boxes.detach(), scores.detach(), iou_threshold)


def batched_nms_rotated(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Apply `nms_rotated` to each category: boxes of different `idxs` never suppress each other.

    Categories are compared directly, not by shifting the boxes apart.

    Args:
        boxes: (N, 5) floating point, as for `box_iou_rotated`.
        scores: (N,) floating point.
        idxs: (N,) category of each box: integers, booleans or integral floats, of any value.
        iou_threshold: in [0, 1].

    Returns:
        (K,) int64: indices of the kept boxes of all categories, in descending score order.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    check_nms_arguments(boxes, scores, iou_threshold, box_dim=5, idxs=idxs)
    return _batched_nms_rotated(boxes.detach(), scores.detach(), idxs, iou_threshold)


def _prepare(boxes: torch.Tensor) -> torch.Tensor:
    """Return center, half width and height, cosine, sine, and radius of the circumscribed circle, (N, 7).

    The radius is nan for a box that overlaps nothing.
    """
    # Apple GPUs do not support float64.
    boxes = boxes.to(torch.float32 if boxes.device.type == "mps" else torch.float64)
    radians = boxes[:, 4].fmod(360) * (math.pi / 180)
    half = boxes[:, 2:4] / 2
    area = boxes[:, 2] * boxes[:, 3]
    valid = (half > 0).all(dim=1) & (area > 0) & area.isfinite() & boxes.isfinite().all(dim=1)
    radius = half.square().sum(dim=1).sqrt().where(valid, torch.nan)
    turn = torch.stack([radians.cos(), radians.sin()], dim=1)
    return torch.cat([boxes[:, :2], half, turn, radius[:, None]], dim=1)


def _circles_meet(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return whether the circles around prepared boxes meet; shapes (..., 7) broadcast."""
    shift = second[..., :2] - first[..., :2]
    return shift.square().sum(dim=-1) < (first[..., 6] + second[..., 6]).square()


def _area_under_edge(x0, y0, x1, slope, run, half, top):
    """Return the integral of clamp(y, 0, top) dx along the part of an edge in |x| <= half; all (P,).

    The edge starts at (x0, y0) and ends at x1; `slope` is dy/dx and `run` dx/dy, 0 where not finite.
    """
    zero = torch.zeros_like(top)
    begin, end = x0.clamp(-half, half), x1.clamp(-half, half)
    left, right = torch.minimum(begin, end), torch.maximum(begin, end)
    y_begin, y_end = y0 + (begin - x0) * slope, y0 + (end - x0) * slope
    at_zero = (begin - y_begin * run).clamp(left, right)
    at_top = (begin + (top - y_begin) * run).clamp(left, right)
    rising = y_end > y_begin
    stops = (begin, at_zero.where(rising, at_top), at_top.where(rising, at_zero), end)
    values = [(y0 + (stop - x0) * slope).clamp(zero, top) for stop in stops]
    return sum((stops[i + 1] - stops[i]) * (values[i] + values[i + 1]) for i in range(3)) * 0.5


def _iou_of_pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the IoU of P pairs of prepared boxes, (P,); radii must not be nan."""
    ax, ay, aw, ah, ac, asine, _ = first.unbind(dim=1)
    bx, by, bw, bh, bc, bsine, _ = second.unbind(dim=1)
    cosine, sine = ac * bc + asine * bsine, bsine * ac - bc * asine
    x = (bx - ax) * ac - (by - ay) * asine
    y = (bx - ax) * asine + (by - ay) * ac
    c, s = cosine.abs(), sine.abs()
    apart = (x.abs() >= aw + bw * c + bh * s) | (y.abs() >= ah + bw * s + bh * c)
    apart |= (x * cosine - y * sine).abs() >= bw + aw * c + ah * s
    apart |= (x * sine + y * cosine).abs() >= bh + aw * s + ah * c

    tangent = (sine / cosine).where(cosine != 0, 0)
    cotangent = (cosine / sine).where(sine != 0, 0)
    corners = [
        (x + i * bw * cosine + j * bh * sine, y - i * bw * sine + j * bh * cosine + ah)
        for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    total = torch.zeros_like(x)
    for i, (x0, y0) in enumerate(corners):
        slope, run = (cotangent, tangent) if i % 2 else (-tangent, -cotangent)
        total += _area_under_edge(x0, y0, corners[(i + 1) % 4][0], slope, run, aw, 2 * ah)
    area, other_area = 4 * aw * ah, 4 * bw * bh
    intersection = torch.minimum((-total).clamp(min=0), torch.minimum(area, other_area)).masked_fill(apart, 0)
    return intersection / (area + other_area - intersection)


def _iou_dtype(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32


def reference_box_iou_rotated(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Compute `box_iou_rotated` in plain PyTorch."""
    output = boxes1.new_zeros((len(boxes1), len(boxes2)), dtype=_iou_dtype(boxes1, boxes2))
    first, second = _prepare(boxes1), _prepare(boxes2)
    num_rows = max(1, _MAX_PAIRS // max(1, len(second)))
    for begin in range(0, len(first), num_rows):
        rows = slice(begin, begin + num_rows)
        i, j = _circles_meet(first[rows, None], second).nonzero(as_tuple=True)
        output[rows][i, j] = _iou_of_pairs(first[rows][i], second[j]).to(output.dtype)
    return output


def reference_nms_rotated(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor | None, iou_threshold: float
) -> torch.Tensor:
    """Compute NMS in plain PyTorch, one kept box at a time. `idxs` of None means one category."""
    boxes = _prepare(boxes)
    order = scores.sort(descending=True, stable=True).indices
    kept = []
    while order.numel():
        best, rest = order[:1], order[1:]
        kept.append(best)
        near = _circles_meet(boxes[best], boxes[rest])
        if idxs is not None:
            near &= idxs[rest] == idxs[best]
        near = near.nonzero().squeeze(1)
        overlaps = torch.zeros_like(rest, dtype=torch.bool)
        pairs = boxes[best].expand(len(near), -1), boxes[rest[near]]
        overlaps[near] = _iou_of_pairs(*pairs) > iou_threshold
        order = rest[~overlaps]
    return torch.cat(kept) if kept else order


def _fallback_nms(boxes, scores, iou_threshold):
    return reference_nms_rotated(boxes, scores, None, iou_threshold)


def _fake_box_iou(boxes1, boxes2):
    return boxes1.new_empty((boxes1.shape[0], boxes2.shape[0]), dtype=_iou_dtype(boxes1, boxes2))


def _fake_nms(boxes, *_):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_box_iou_rotated = define(
    "box_iou_rotated",
    "(Tensor boxes1, Tensor boxes2) -> Tensor",
    fallback=reference_box_iou_rotated,
    fake=_fake_box_iou,
)
_nms_rotated = define(
    "nms_rotated",
    "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    fallback=_fallback_nms,
    fake=_fake_nms,
)
_batched_nms_rotated = define(
    "batched_nms_rotated",
    "(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    fallback=reference_nms_rotated,
    fake=_fake_nms,
)
