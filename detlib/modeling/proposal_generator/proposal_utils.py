"""Selection of proposals from dense predictions, and ground truth as proposals.

Shape legend: N images, L feature levels, R boxes of a level, T boxes selected by score, T_l those of a level,
B numbers per box (4: XYXY in absolute pixels of the padded image).
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

# The objectness logit of ground truth among the proposals, for a probability close to 1.
_GT_LOGIT = math.log((1.0 - 1e-10) / (1 - (1.0 - 1e-10)))


def top_per_level(scores: list[torch.Tensor], topk: int):
    """Select the best predictions of each level and image.

    Args:
        scores: L tensors (N, R).
        topk: maximum number per level and image.

    Returns:
        top_scores: (N, T) float32, in descending order in each level.
        indices: L tensors (N, T_l) int64, the rows of the level.
        level_ids: (T,) int64, the level of each prediction.
    """
    chosen = [s.topk(min(s.shape[1], topk), dim=1) for s in scores]
    top_scores = torch.cat([c.values.float() for c in chosen], dim=1)
    level_ids = torch.cat(
        [torch.full((c.indices.shape[1],), i, device=top_scores.device) for i, c in enumerate(chosen)]
    )
    return top_scores, [c.indices for c in chosen], level_ids


def decode_top_predictions(anchors, scores, deltas, box2box_transform, topk: int):
    """Select the best predictions of each level and decode only these.

    Args:
        anchors: L sets of R boxes, the same for all images.
        scores: L tensors (N, R).
        deltas: L tensors (N, R, B).
        box2box_transform: encoding of the boxes.
        topk: maximum number per level and image.

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
    """Turn decoded boxes into proposals: keep the best of each level, clip them and apply NMS.

    Args:
        proposals: L tensors (N, R, B) of boxes.
        pred_objectness_logits: L tensors (N, R).
        image_sizes: N pairs (height, width) of the images before padding.
        nms_thresh: IoU above which the lower scoring of two boxes of a level is dropped.
        pre_nms_topk: number of boxes to keep per level and image before NMS.
        post_nms_topk: number of boxes to keep per image after NMS, over all levels.
        min_box_size: boxes must be wider and higher than this, in pixels.
        training: whether values that are not finite are an error; otherwise their boxes are dropped.
        box_type: the class of the boxes, with `clip`, `nonempty` and `batched_nms`.

    Returns:
        list[Instances]: for each image at most `post_nms_topk` `proposal_boxes` with
        `objectness_logits`, in descending score order.

    Raises:
        FloatingPointError: boxes or scores are not finite in training.
    """
    scores, indices, level_ids = top_per_level(pred_objectness_logits, pre_nms_topk)
    boxes = torch.cat([p.take_along_dim(i[:, :, None], dim=1) for p, i in zip(proposals, indices)], dim=1)
    return filter_and_nms(
        boxes, scores, level_ids, image_sizes, nms_thresh, post_nms_topk, min_box_size, training, box_type
    )


def _check_finite(finite: torch.Tensor) -> None:
    """Raise FloatingPointError unless all of the (N, T) bool `finite` are true."""
    num_bad = finite.numel() - int(finite.sum())
    if num_bad:
        images = (~finite).any(dim=1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{num_bad} of {finite.numel()} predicted boxes or scores are not finite (Inf or NaN), in the "
            f"images {images} of the batch: the training run has diverged. A lower SOLVER.BASE_LR, a longer "
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
    """Clip boxes selected by score, apply NMS and keep the best: the second half of `find_top_rpn_proposals`.

    Args:
        boxes: (N, T, B) boxes.
        scores: (N, T) logits.
        level_ids: (T,) int64; boxes of different levels do not suppress each other.
        image_sizes, nms_thresh, post_nms_topk, min_box_size, training, box_type: see
            `find_top_rpn_proposals`.

    Returns:
        list[Instances]: see `find_top_rpn_proposals`.
    """
    finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
    if training:
        _check_finite(finite)
    boxes = boxes.masked_fill(~finite[:, :, None], 0.0)  # boxes without area are dropped below
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
    # One call for all images, which are separated afterwards, synchronizes a GPU once instead of once per
    # image.
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
    """Append each image's ground truth to its proposals.

    So the heads see ground-truth boxes from the first step on.

    Args:
        gt: for each image an `Instances` with `gt_boxes`, or the boxes themselves.
        proposals: for each image an `Instances` with `proposal_boxes` and `objectness_logits`.

    Returns:
        list[Instances]: new `Instances`, with the ground truth after the proposals.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(gt) != len(proposals):
        raise ValueError(f"ground truth of {len(gt)} images for proposals of {len(proposals)}")
    return [add_ground_truth_to_proposals_single_image(g, p) for g, p in zip(gt, proposals)]


def add_ground_truth_to_proposals_single_image(gt, proposals: Instances) -> Instances:
    """Append the ground truth of one image to its proposals.

    Args:
        gt: an `Instances` with `gt_boxes`, or the boxes themselves.
        proposals: an `Instances` with `proposal_boxes` and `objectness_logits`. `gt` must have its other
            fields too.

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
            # Without objects the type of the boxes may be unknown.
            added[name] = gt_fields["gt_boxes"].to(value.device) if num_gt else value[:0]
        elif name == "objectness_logits":
            added[name] = value.new_full((num_gt,), _GT_LOGIT)
        elif name in gt_fields:
            added[name] = gt_fields[name]
        else:
            raise ValueError(f"proposals have the field {name!r}, which the ground truth lacks")
    return Instances.cat([proposals, Instances(proposals.image_size, **added)])
