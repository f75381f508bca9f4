"""Matching of anchors and proposals to ground truth.

Shape legend: M ground-truth boxes, N predictions (anchors or proposals).
"""

import math
from typing import Any

import torch

__all__ = ["Matcher", "match_boxes"]

# With more (ground truth, prediction) pairs than this, `match_boxes` works on chunks of the ground truth. On
# a GPU this bounds the memory: a chunk's float32 matrix takes 128 MiB, its intermediate tensors a few times
# that. On a CPU the chunks fit into the cache, which made matching of 100 boxes twice as fast.
_MAX_PAIRS = 2**25
_MAX_PAIRS_CPU = 2**21


class Matcher:
    """Assigns each prediction its best ground truth, and a label by the quality of the match.

    The quality of a pair is usually its IoU. Thresholds divide the range of qualities into intervals, and
    each interval has a label, usually 1 for foreground, 0 for background and -1 for ignored predictions. With
    thresholds [0.3, 0.5] and labels [0, -1, 1], a best quality q gives 0 for q < 0.3, -1 for 0.3 <= q < 0.5,
    and 1 for q >= 0.5.
    """

    def __init__(self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool = False):
        """
        Args:
            thresholds: boundaries between the labels, above 0 and in ascending order.
            labels: one label more than there are thresholds, each -1, 0 or 1.
            allow_low_quality_matches: whether the best predictions of each ground truth (all that tie) get
                the label 1 whatever their quality, so that every ground truth has a match. See
                `set_low_quality_matches_`.

        Raises:
            ValueError: thresholds are not above 0 and ascending, or the labels do not fit them.
        """
        thresholds, labels = list(thresholds), list(labels)
        if any(not t > 0 for t in thresholds) or any(a > b for a, b in zip(thresholds, thresholds[1:])):
            raise ValueError(f"thresholds must be above 0 and in ascending order, got {thresholds}")
        if len(labels) != len(thresholds) + 1:
            raise ValueError(f"{len(thresholds)} thresholds need {len(thresholds) + 1} labels, got {labels}")
        if any(label not in (-1, 0, 1) for label in labels):
            raise ValueError(f"labels must be -1 (ignore), 0 (background) or 1 (foreground), got {labels}")
        self.thresholds = [-math.inf, *thresholds, math.inf]
        self.labels = labels
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Match predictions to ground truth.

        Args:
            match_quality_matrix: (M, N) float tensor of qualities, at least 0. M and N may be 0.

        Returns:
            matches: (N,) int64, the row of each prediction's best ground truth, in [0, M); 0 if M is 0.
            match_labels: (N,) int8 labels; the first of `labels` if M is 0.

        Raises:
            ValueError: `match_quality_matrix` is not a matrix.
        """
        if match_quality_matrix.dim() != 2:
            raise ValueError(f"the quality must be an (M, N) matrix, got {tuple(match_quality_matrix.shape)}")
        num_gt, num_pred = match_quality_matrix.shape
        if num_gt == 0 or num_pred == 0:
            return self._without_pairs(num_pred, match_quality_matrix.device)
        quality, matches = match_quality_matrix.max(dim=0)
        match_labels = self._labels_of(quality)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(match_labels, match_quality_matrix)
        return matches, match_labels

    def _without_pairs(self, num_pred: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        matches = torch.zeros(num_pred, dtype=torch.int64, device=device)
        return matches, torch.full((num_pred,), self.labels[0], dtype=torch.int8, device=device)

    def _labels_of(self, quality: torch.Tensor) -> torch.Tensor:
        labels = torch.full_like(quality, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds[1:-1], self.labels[1:]):
            labels.masked_fill_(quality >= threshold, label)
        return labels

    def set_low_quality_matches_(
        self, match_labels: torch.Tensor, match_quality_matrix: torch.Tensor
    ) -> None:
        """Set the label of every ground truth's best predictions (all that tie) to 1.

        See section 3.1.2 of Faster R-CNN (arXiv:1506.01497). The match of such a prediction stays its own
        best ground truth, even if another ground truth set the label. A ground truth that overlaps no
        prediction sets no label.

        Args:
            match_labels: (N,) int8, changed in place.
            match_quality_matrix: (M, N), M and N above 0.
        """
        best_of_gt = match_quality_matrix.amax(dim=1, keepdim=True)
        best = (match_quality_matrix == best_of_gt) & (best_of_gt > 0)
        match_labels.masked_fill_(best.any(dim=0), 1)


def match_boxes(matcher, gt_boxes, boxes, max_pairs: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `matcher(gt_boxes.pairwise_iou(boxes))` in bounded memory.

    For a thousand objects and a quarter of a million anchors the matrix takes 1 GB. So it is computed in
    chunks of rows, keeping each prediction's best match so far.

    Args:
        matcher: a `Matcher`. A matcher of another class gets the full matrix.
        gt_boxes: M boxes of any type with `pairwise_iou`.
        boxes: N boxes of the same type.
        max_pairs: number of pairs per chunk (but at least one ground truth with all predictions); the default
            depends on the device.

    Returns:
        matches, match_labels: see `Matcher.__call__`.
    """
    num_gt, num_pred = len(gt_boxes), len(boxes)
    if max_pairs is None:
        max_pairs = _MAX_PAIRS_CPU if boxes.device.type == "cpu" else _MAX_PAIRS
    if type(matcher) is not Matcher or num_gt * num_pred <= max_pairs:
        return matcher(gt_boxes.pairwise_iou(boxes))
    rows = max(1, max_pairs // num_pred)
    quality: Any = None
    matches: Any = None
    low_quality = torch.zeros(num_pred, dtype=torch.int8, device=boxes.device)
    for start in range(0, num_gt, rows):
        part = gt_boxes[start : start + rows].pairwise_iou(boxes)
        part_quality, part_matches = part.max(dim=0)
        part_matches += start
        if quality is None:
            quality, matches = part_quality, part_matches
        else:
            better = part_quality > quality
            quality = torch.where(better, part_quality, quality)
            matches = torch.where(better, part_matches, matches)
        if matcher.allow_low_quality_matches:
            matcher.set_low_quality_matches_(low_quality, part)
    match_labels = matcher._labels_of(quality)
    return matches, match_labels.masked_fill_(low_quality.bool(), 1)
