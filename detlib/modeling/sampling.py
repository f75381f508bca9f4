"""Sampling of the anchors and proposals that enter a loss: match, label, and draw a balanced sample.

Shape legend: R boxes (anchors or proposals) of one image, M ground-truth boxes.
"""

from typing import NamedTuple

import torch

from detlib.modeling.matcher import match_boxes

__all__ = ["Sample", "label_and_sample", "label_boxes", "subsample_labels"]


class Sample(NamedTuple):
    """The result of `label_and_sample` for the R boxes of one image."""

    matched_idxs: torch.Tensor
    """(R,) int64: each box's best ground truth, in [0, M); 0 if M is 0."""
    labels: torch.Tensor
    """(R,) int64: each box's class, the background label, or -1 for ignored boxes."""
    fg_idxs: torch.Tensor
    """Indices in [0, R) of the sampled foreground boxes, in random order."""
    bg_idxs: torch.Tensor
    """Indices in [0, R) of the sampled background boxes, in random order."""


def subsample_labels(labels: torch.Tensor, num_samples: int, positive_fraction: float, bg_label: int):
    """Sample foreground and background at random, without replacement.

    At most `int(num_samples * positive_fraction)` are foreground; background fills up to `num_samples`.
    Fewer are returned if there are not enough.

    Args:
        labels: (R,) integer tensor: -1 is ignored, `bg_label` is background, all else is foreground.
        num_samples: number of samples.
        positive_fraction: largest fraction of foreground, in [0, 1].
        bg_label: the background's label.

    Returns:
        pos_idx, neg_idx: two int64 tensors of indices into `labels`, in random order.
    """
    background = labels == bg_label
    positive = ((labels != -1) & ~background).nonzero().flatten()
    negative = background.nonzero().flatten()
    num_pos = min(int(num_samples * positive_fraction), positive.numel())
    num_neg = min(num_samples - num_pos, negative.numel())
    pos_order = torch.randperm(positive.numel(), device=positive.device)[:num_pos]
    neg_order = torch.randperm(negative.numel(), device=negative.device)[:num_neg]
    return positive[pos_order], negative[neg_order]


def label_boxes(boxes, gt_boxes, matcher, *, gt_classes: torch.Tensor | None = None, bg_label: int = 0):
    """Match boxes to ground truth and label them.

    Args:
        boxes: R boxes of any box type.
        gt_boxes: M boxes of the same type.
        matcher: a `Matcher` with labels -1, 0, 1.
        gt_classes: (M,) int64 classes; if None, foreground has the label 1.
        bg_label: the background's label.

    Returns:
        matched_idxs: (R,) int64, see `Sample`.
        labels: (R,) int64: the matched ground truth's class (or 1), `bg_label`, or -1.

    Raises:
        ValueError: boxes and ground truth are of different types.
    """
    num_gt = gt_boxes.tensor.shape[0]
    if num_gt == 0:
        gt_boxes = type(boxes)(boxes.tensor[:0])  # without objects the type may be unknown
    if boxes.box_dim != gt_boxes.box_dim:
        raise ValueError(
            f"the model works on {type(boxes).__name__} ({boxes.box_dim} numbers per box), but its "
            f"ground-truth 'gt_boxes' are {type(gt_boxes).__name__} ({gt_boxes.box_dim}). Rotated boxes need "
            "MODEL.PROPOSAL_GENERATOR.NAME 'RRPN', MODEL.ANCHOR_GENERATOR.NAME 'RotatedAnchorGenerator' and "
            "MODEL.ROI_HEADS.NAME 'RROIHeads'; for axis-aligned boxes from rotated annotations use "
            "DatasetMapper(..., rotated_boxes=False)"
        )
    matched_idxs, match_labels = match_boxes(matcher, gt_boxes, boxes)
    match_labels = match_labels.to(torch.int64)
    if gt_classes is None:
        labels = match_labels.clone()
    elif num_gt:
        labels = gt_classes[matched_idxs]
        labels = torch.where(match_labels == -1, match_labels, labels)
    else:
        labels = match_labels.clone()
    labels.masked_fill_(match_labels == 0, bg_label)
    return matched_idxs, labels


@torch.no_grad()
def label_and_sample(
    boxes,
    gt_boxes,
    matcher,
    *,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    gt_classes: torch.Tensor | None = None,
    ignore: torch.Tensor | None = None,
) -> Sample:
    """Match the boxes of one image to its ground truth, label them and draw a balanced sample.

    RPN calls it with anchors, `bg_label=0` and no classes; box heads call it with proposals, `gt_classes` and
    `bg_label=num_classes`. It samples with this module's `subsample_labels`, so replacing that function
    changes the sampling everywhere.

    Args:
        boxes: R boxes of any type with `pairwise_iou`.
        gt_boxes: M boxes of the same type; if M is 0, all boxes are background.
        matcher: a `Matcher` with labels -1, 0, 1.
        num_samples: number of boxes to sample.
        positive_fraction: largest fraction of foreground, in [0, 1].
        bg_label: the background's label.
        gt_classes: (M,) int64 classes; if None, foreground has the label 1.
        ignore: (R,) bool, boxes that are ignored whatever their match.

    Returns:
        Sample: matches and labels of all boxes, and the indices of the sampled ones.
    """
    matched_idxs, labels = label_boxes(boxes, gt_boxes, matcher, gt_classes=gt_classes, bg_label=bg_label)
    if ignore is not None:
        labels.masked_fill_(ignore, -1)
    fg_idxs, bg_idxs = subsample_labels(labels, num_samples, positive_fraction, bg_label)
    return Sample(matched_idxs, labels, fg_idxs, bg_idxs)
