"""What all dense detectors do with their maps: flatten, choose the best, decode, and weigh against the truth.

RPN uses it, and every other detector that predicts on anchors or points can.

Shape legend: N images, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A anchors of
one level (or of all), K numbers per anchor (classes, where they are scores), B numbers per box, T boxes
chosen on every image, P boxes chosen on all images together.
"""

import math
from typing import NamedTuple

import torch

from detlib.modeling.box_regression import box_regression_loss
from detlib.structures import Instances

__all__ = [
    "Candidates",
    "best_candidates",
    "candidates_from_logits",
    "candidates_from_scores",
    "check_rows",
    "decode_candidates",
    "decode_top_predictions",
    "dense_box_regression_loss",
    "detections_per_image",
    "gather_rows",
    "permute_to_N_HWA_K",
    "same_on_all_levels",
    "sigmoid_float32",
    "top_per_level",
]


def same_on_all_levels(values: list, what: str):
    """The one value of a list: what a head that serves all levels needs to know of them.

    Raises:
        ValueError: the values differ; `what` names them.
    """
    if len(set(values)) != 1:
        raise ValueError(
            f"the head is shared by all levels, so {what} must be the same on each; got {list(values)}"
        )
    return values[0]


def permute_to_N_HWA_K(tensor: torch.Tensor, K: int) -> torch.Tensor:
    """Turn a convolution's output into one row for each anchor.

    Args:
        tensor: (N, A*K, H, W): K numbers for each of A anchors.
        K: numbers for one anchor.

    Returns:
        (N, H*W*A, K) tensor; rows in the order of a contiguous (H, W, A) tensor, as the anchors are.

    Raises:
        ValueError: not four dimensions, or channels that are no multiple of K.
    """
    if tensor.dim() != 4 or tensor.shape[1] % K:
        raise ValueError(f"expected (N, A*{K}, H, W), got the shape {tuple(tensor.shape)}")
    n, channels, height, width = tensor.shape
    tensor = tensor.view(n, channels // K, K, height, width).permute(0, 3, 4, 1, 2)
    return tensor.reshape(n, height * width * (channels // K), K)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows of each image: (N, R, B) by (N, T) int64 gives (N, T, B)."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))


def top_per_level(scores: list[torch.Tensor], topk: int):
    """The best predictions of each level and image.

    Args:
        scores: L tensors (N, R).
        topk: how many to choose on each level and image; all where there are fewer.

    Returns:
        top_scores: (N, T) float32, T the number chosen on all levels together; falling within a level.
        indices: L tensors (N, T_l) int64 of rows of the level.
        level_ids: (T,) int64, the level of each.
    """
    chosen = [s.topk(min(s.shape[1], topk), dim=1) for s in scores]
    top_scores = torch.cat([c.values.float() for c in chosen], dim=1)
    level_ids = torch.cat(
        [torch.full((c.indices.shape[1],), i, device=top_scores.device) for i, c in enumerate(chosen)]
    )
    return top_scores, [c.indices for c in chosen], level_ids


def decode_top_predictions(anchors, scores, deltas, box2box_transform, topk: int):
    """Choose the best predictions of each level, and decode these only.

    Args:
        anchors: L sets of R boxes, the same for all images.
        scores: L tensors (N, R).
        deltas: L tensors (N, R, B).
        box2box_transform: what relates deltas and boxes.
        topk: how many to choose on each level and image.

    Returns:
        boxes: (N, T, B) float32, in the anchors' frame.
        top_scores: (N, T) float32.
        level_ids: (T,) int64.
    """
    top_scores, indices, level_ids = top_per_level(scores, topk)
    top_deltas = torch.cat([gather_rows(d, i) for d, i in zip(deltas, indices)], dim=1)
    top_anchors = torch.cat([a.tensor[i] for a, i in zip(anchors, indices)], dim=1)
    boxes = box2box_transform.apply_deltas(top_deltas.flatten(0, 1), top_anchors.flatten(0, 1))
    return boxes.view_as(top_anchors), top_scores, level_ids


def dense_box_regression_loss(
    anchors,
    box2box_transform,
    pred_anchor_deltas: list[torch.Tensor],
    gt_boxes: list[torch.Tensor],
    fg_idxs: tuple[torch.Tensor, torch.Tensor],
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """The summed box loss of the foreground anchors of a batch.

    Args:
        anchors: the boxes of all levels, R together.
        box2box_transform: what relates deltas and boxes.
        pred_anchor_deltas: L tensors (N, R_l, B).
        gt_boxes: N tensors (R, B): each anchor's matched ground truth.
        fg_idxs: two int64 tensors of one length: image in [0, N) and anchor in [0, R) of each foreground.
        box_reg_loss_type: see `detlib.modeling.box_regression.box_regression_loss`.
        smooth_l1_beta: likewise.

    Returns:
        A scalar.
    """
    image_idxs, anchor_idxs = fg_idxs
    return box_regression_loss(
        box2box_transform,
        anchors.tensor[anchor_idxs],
        torch.cat(pred_anchor_deltas, dim=1)[image_idxs, anchor_idxs],
        torch.stack(gt_boxes)[image_idxs, anchor_idxs],
        box_reg_loss_type,
        smooth_l1_beta,
    )


def check_rows(anchors, predictions: list[torch.Tensor], remedy: str) -> None:
    """Refuse predictions that do not fit the anchors.

    Args:
        anchors: L sets of anchors.
        predictions: L tensors (N, R, K).
        remedy: what to set so that they fit, for the message.

    Raises:
        ValueError: numbers of levels, or of rows on a level, that differ.
    """
    have, want = [p.shape[1] for p in predictions], [len(a) for a in anchors]
    if have != want:
        raise ValueError(f"the head predicts for {have} anchors by level, there are {want}: {remedy}")


class Candidates(NamedTuple):
    """Predictions that score above a threshold: P of them, of all images of a batch, image by image."""

    images: torch.Tensor
    """(P,) int64 in [0, N), rising."""
    rows: torch.Tensor
    """(P,) int64 in [0, R): which anchor of the level."""
    classes: torch.Tensor
    """(P,) int64 in [0, K)."""
    scores: torch.Tensor
    """(P,) float32, or float64 where the predictions are."""


def candidates_from_scores(scores: torch.Tensor, threshold: float) -> Candidates:
    """The scores of one level, a (N, R, K) tensor, that are above `threshold`."""
    # Most anchors have no class that does: to look for these first takes a third of the time.
    images, rows = (scores.amax(dim=2) > threshold).nonzero(as_tuple=True)
    chosen = scores[images, rows]
    index, classes = (chosen > threshold).nonzero(as_tuple=True)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return Candidates(images[index], rows[index], classes, chosen[index, classes].to(dtype))


def candidates_from_logits(
    logits: torch.Tensor, threshold: float, quality_logits: torch.Tensor | None = None
) -> Candidates:
    """The predictions of one level that may score above a threshold, without the scores of the others.

    Args:
        logits: (N, R, K); the sigmoid of it is the score of a class.
        threshold: what a score must exceed. A few that fall short of it are among the candidates:
            `decode_candidates` drops them.
        quality_logits: (N, R, 1); if given, its sigmoid is how well the box lies, and the score is the
            geometric mean of both.

    Returns:
        Candidates: of this level, with their exact scores.
    """
    # A quality is at most 1, so that the class alone must score above the square.
    least = threshold if quality_logits is None else threshold * abs(threshold)
    if least <= 0:
        least_logit = -math.inf
    else:
        least_logit = math.log(least / (1 - least)) if least < 1 else math.inf
        least_logit -= 0.01 * (1 + abs(least_logit))  # how logits are rounded must not decide
    found = candidates_from_scores(logits, least_logit)
    scores = found.scores.sigmoid()
    if quality_logits is not None:
        quality = quality_logits[found.images, found.rows, 0].to(scores.dtype).sigmoid()
        scores = (scores * quality).sqrt()
    return found._replace(scores=scores)


def best_candidates(candidates: Candidates, topk: int) -> Candidates:
    """The `topk` best of each image; all where there are fewer."""
    if len(candidates.scores) <= topk:
        return candidates
    chosen, start = [], 0
    for count in torch.bincount(candidates.images).tolist():
        scores = candidates.scores[start : start + count]
        chosen.append(scores.topk(min(topk, count)).indices + start)
        start += count
    index = torch.cat(chosen)
    return Candidates(*(x[index] for x in candidates))


def decode_candidates(anchors, deltas, levels: list[Candidates], box2box_transform, threshold: float):
    """Turn the chosen predictions of all levels into boxes, at once.

    Args:
        anchors: L sets of R boxes, the same for all images.
        deltas: L tensors (N, R, B).
        levels: L sets of candidates, P on all levels together.
        box2box_transform: what relates deltas and boxes.
        threshold: scores must be above it.

    Returns:
        boxes: (P, B) float32, in the anchors' frame; only those that are finite.
        images: (P,) int64, the image of each.
        classes: (P,) int64, its class.
        scores: (P,) float32, its score.
    """
    chosen_anchors = torch.cat([a.tensor[c.rows] for a, c in zip(anchors, levels)])
    chosen_deltas = torch.cat([d[c.images, c.rows] for d, c in zip(deltas, levels)])
    boxes = box2box_transform.apply_deltas(chosen_deltas, chosen_anchors)
    images, _, classes, scores = (torch.cat(field) for field in zip(*levels))
    keep = (torch.isfinite(boxes).all(dim=1) & (scores > threshold)).nonzero().flatten()
    return boxes[keep], images[keep], classes[keep], scores[keep]


def detections_per_image(
    boxes: torch.Tensor,
    images: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    image_sizes: list[tuple[int, int]],
    box_type: type,
    nms_thresh: float,
    max_detections: int,
) -> list[Instances]:
    """Apply NMS within each class and image, and keep the best.

    Args:
        boxes: (P, B) boxes, in pixels of the pictures.
        images: (P,) int64 in [0, N).
        classes: (P,) int64.
        scores: (P,) float.
        image_sizes: N pairs (height, width) of the pictures before padding.
        box_type: the class of the boxes, with `batched_nms`.
        nms_thresh: IoU above which the worse of two boxes of a class is dropped.
        max_detections: at most so many for an image; negative for all.

    Returns:
        list[Instances]: N with `pred_boxes` (not clipped), `scores` and `pred_classes`, by falling score.
    """
    order = images.argsort(stable=True)
    counts = torch.bincount(images, minlength=len(image_sizes)).tolist()
    parts = (x[order].split(counts) for x in (boxes, classes, scores))
    results = []
    for image_boxes, image_classes, image_scores, size in zip(*parts, image_sizes):
        typed = box_type(image_boxes)
        keep = typed.batched_nms(image_scores, image_classes, nms_thresh)
        if max_detections >= 0:
            keep = keep[:max_detections]
        results.append(
            Instances(
                size, pred_boxes=typed[keep], scores=image_scores[keep], pred_classes=image_classes[keep]
            )
        )
    return results


def sigmoid_float32(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in float32, or in float64 for logits of that: half precision would make scores tie."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
