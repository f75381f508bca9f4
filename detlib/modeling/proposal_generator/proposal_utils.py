"""From a dense detector's boxes to proposals, and ground truth as proposals.

Shape legend: N images, L feature levels, R boxes of a level, T boxes left after the choice by score, B
numbers for one box (4: XYXY in absolute pixels of the padded picture).
"""

import math

import torch

from detlib.structures import Boxes, Instances

__all__ = [
    "add_ground_truth_to_proposals",
    "add_ground_truth_to_proposals_single_image",
    "decode_top_predictions",
    "filter_and_nms",
    "find_top_rpn_proposals",
    "top_per_level",
]

# The objectness of ground truth among proposals: the logit of a probability next to 1.
_GT_LOGIT = math.log((1.0 - 1e-10) / (1 - (1.0 - 1e-10)))


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
    top_deltas = torch.cat([d.take_along_dim(i[:, :, None], dim=1) for d, i in zip(deltas, indices)], dim=1)
    top_anchors = torch.cat([a.tensor[i] for a, i in zip(anchors, indices)], dim=1)
    boxes = box2box_transform.apply_deltas(top_deltas.flatten(0, 1), top_anchors.flatten(0, 1))
    return boxes.view_as(top_anchors), top_scores, level_ids


def find_top_rpn_proposals(
    proposals: list[torch.Tensor],
    pred_objectness_logits: list[torch.Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    box_type: type = Boxes,
) -> list[Instances]:
    """Turn decoded boxes into proposals: the best of each level, clipped, without duplicates.

    Args:
        proposals: L tensors (N, R, B) of boxes.
        pred_objectness_logits: L tensors (N, R).
        image_sizes: N pairs (height, width) of the pictures before padding.
        nms_thresh: IoU above which the worse of two boxes of one level is dropped.
        pre_nms_topk: boxes to keep on each level before NMS, for each image.
        post_nms_topk: boxes to keep of all levels after NMS, for each image.
        min_box_size: boxes whose width or height is not above this are dropped, in pixels.
        training: whether numbers that are not finite are an error; otherwise their boxes are dropped.
        box_type: the class of the boxes, with `clip`, `nonempty` and `batched_nms`.

    Returns:
        list[Instances]: for each image at most `post_nms_topk` `proposal_boxes` with
        `objectness_logits`, by falling score.

    Raises:
        FloatingPointError: in training, boxes or scores that are not finite.
    """
    scores, indices, level_ids = top_per_level(pred_objectness_logits, pre_nms_topk)
    boxes = torch.cat([p.take_along_dim(i[:, :, None], dim=1) for p, i in zip(proposals, indices)], dim=1)
    return filter_and_nms(
        boxes, scores, level_ids, image_sizes, nms_thresh, post_nms_topk, min_box_size, training, box_type
    )


def _check_finite(finite: torch.Tensor) -> None:
    """Raise unless all of the (N, T) bool `finite` are set."""
    num_bad = finite.numel() - int(finite.sum())
    if num_bad:
        images = (~finite).any(dim=1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{num_bad} of {finite.numel()} predicted boxes or scores are not finite (Inf or NaN), in the "
            f"images {images} of the batch: the training has diverged. A lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help"
        )


def filter_and_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    level_ids: torch.Tensor,
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    box_type: type = Boxes,
) -> list[Instances]:
    """The second half of `find_top_rpn_proposals`, from the boxes chosen by score on.

    Args:
        boxes: (N, T, B) boxes.
        scores: (N, T) logits.
        level_ids: (T,) int64; boxes of different levels do not suppress each other.
        image_sizes: and the others: see `find_top_rpn_proposals`.

    Returns:
        list[Instances]: see `find_top_rpn_proposals`.
    """
    finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
    if training:
        _check_finite(finite)
    boxes = boxes.masked_fill(~finite[:, :, None], 0.0)  # boxes without area, which are dropped
    clipped, nonempty = [], []
    for image_boxes, size in zip(boxes, image_sizes):
        typed = box_type(image_boxes)
        typed.clip(size)
        nonempty.append(typed.nonempty(threshold=min_box_size))
        clipped.append(typed.tensor)
    keep = torch.stack(nonempty) & finite
    boxes = torch.stack(clipped)
    image_idxs, box_idxs = keep.nonzero(as_tuple=True)
    candidates = box_type(boxes[image_idxs, box_idxs])
    scores = scores[image_idxs, box_idxs]
    # The images in one call, and sorted apart afterwards: a GPU is waited for once and not once an image.
    groups = image_idxs + len(image_sizes) * level_ids[box_idxs]
    best = candidates.batched_nms(scores, groups, nms_thresh)
    images_of_best = image_idxs[best]
    order = images_of_best.argsort(stable=True)
    counts = torch.bincount(images_of_best, minlength=len(image_sizes)).tolist()
    results = []
    for image_best, size in zip(best[order].split(counts), image_sizes):
        image_best = image_best[:post_nms_topk]
        kept_boxes, kept_scores = candidates[image_best], scores[image_best]
        results.append(Instances(size, proposal_boxes=kept_boxes, objectness_logits=kept_scores))
    return results


def add_ground_truth_to_proposals(gt, proposals: list[Instances]) -> list[Instances]:
    """Append each image's ground truth to its proposals, so that heads see true boxes from the first step on.

    Args:
        gt: for each image an `Instances` with `gt_boxes`, or the boxes themselves.
        proposals: for each image an `Instances` with `proposal_boxes` and `objectness_logits`.

    Returns:
        list[Instances]: new ones, the ground truth behind the proposals.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(gt) != len(proposals):
        raise ValueError(f"ground truth of {len(gt)} images for proposals of {len(proposals)}")
    return [add_ground_truth_to_proposals_single_image(g, p) for g, p in zip(gt, proposals)]


def add_ground_truth_to_proposals_single_image(gt, proposals: Instances) -> Instances:
    """As `add_ground_truth_to_proposals`, for one image.

    Args:
        gt: an `Instances` with `gt_boxes`, or the boxes themselves.
        proposals: an `Instances` with `proposal_boxes` and `objectness_logits`; `gt` must have its
            other fields too.

    Returns:
        Instances: the fields of `proposals`, with one more row for each ground truth.

    Raises:
        ValueError: `proposals` has a field that `gt` lacks.
    """
    if not isinstance(gt, Instances):
        gt = Instances(proposals.image_size, gt_boxes=gt)
    gt_fields, added, num_gt = gt.get_fields(), {}, len(gt)
    for name, value in proposals.get_fields().items():
        if name == "proposal_boxes":
            # An image without objects may not know which type they had.
            added[name] = gt_fields["gt_boxes"].to(value.device) if num_gt else value[:0]
        elif name == "objectness_logits":
            added[name] = value.new_full((num_gt,), _GT_LOGIT)
        elif name in gt_fields:
            added[name] = gt_fields[name]
        else:
            raise ValueError(f"proposals have the field {name!r}, which the ground truth lacks")
    return Instances.cat([proposals, Instances(proposals.image_size, **added)])
