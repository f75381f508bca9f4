"""Panoptic quality (arXiv:1801.00868): segment matching in an image, and sums over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PanopticStats", "Segments"]


@dataclass(frozen=True)
class Segments:
    """The segments of an image.

    Attributes:
        ids: (H, W) integers, the segment id of each pixel; 0 for no segment.
        segment_ids: S segment ids. Segments without pixels do not count.
        categories: S category indices.
        is_crowd: S flags of regions with multiple objects that are not annotated separately; all False by
            default.
        where: description of the source for error messages.
    """

    ids: np.ndarray
    segment_ids: Sequence[int]
    categories: Sequence[int]
    is_crowd: Sequence[bool] = ()
    where: str = "the prediction"

    def numbered(self) -> np.ndarray:
        """Return 1 + the index in `segment_ids` of each pixel's segment, (H, W) int64; 0 for no segment.

        Raises:
            ValueError: a segment id is not listed, listed twice, or outside of [1, 2^24).
        """
        listed = np.array(self.segment_ids, np.int64)
        lowest, highest = int(self.ids.min(initial=0)), int(self.ids.max(initial=0))
        highest = max(highest, int(listed.max(initial=0)))
        if lowest < 0 or highest >= 1 << 24 or (listed < 1).any():
            raise ValueError(
                f"{self.where}: segment ids must be in [1, 2^24), and pixels without a segment 0; got "
                f"pixels from {lowest}, ids up to {highest}, and the segments {listed.tolist()}."
            )
        if len(np.unique(listed)) < len(listed):
            raise ValueError(f"{self.where}: two segments have the same id: {sorted(listed.tolist())}.")
        # With 0 prepended, the index of an id in `known` is its number. Ids are too large for a lookup table.
        known = np.concatenate([np.zeros(1, np.int64), listed])
        order = np.argsort(known)
        numbers = order[np.searchsorted(known, self.ids, sorter=order).clip(max=len(listed))]
        unlisted = known[numbers] != self.ids
        if unlisted.any():
            raise ValueError(
                f"{self.where}: the image has segment ids {np.unique(self.ids[unlisted]).tolist()}, which "
                f"segments_info does not list; it lists {sorted(listed.tolist())}."
            )
        return numbers


@dataclass
class PanopticStats:
    """Sums over images for each category.

    Attributes:
        num_categories: K.
        iou: (K,) float64, sum of the IoU of matched pairs.
        matched: (K,) int64, number of matched pairs.
        missed: (K,) int64, number of unmatched ground truth segments.
        wrong: (K,) int64, number of unmatched predicted segments.
    """

    num_categories: int
    iou: np.ndarray = field(init=False)
    matched: np.ndarray = field(init=False)
    missed: np.ndarray = field(init=False)
    wrong: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.iou = np.zeros(self.num_categories)
        self.matched, self.missed, self.wrong = (np.zeros(self.num_categories, np.int64) for _ in range(3))

    def __add__(self, other: PanopticStats) -> PanopticStats:
        total = PanopticStats(self.num_categories)
        for name in ("iou", "matched", "missed", "wrong"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def add_image(self, gt: Segments, pred: Segments) -> None:
        """Match the segments of an image and count them.

        Two segments of the same category match if their IoU, without unlabeled pixels, is above 0.5. So a
        segment has at most one match. Crowd regions need not be matched. An unmatched prediction is not wrong
        if more than half of it lies on unlabeled pixels or crowd regions of its category.

        Args:
            gt: the ground truth segments.
            pred: the predicted segments.

        Raises:
            ValueError: the arrays of ids differ in size, or do not match their lists of segments.
        """
        if gt.ids.shape != pred.ids.shape:
            raise ValueError(f"{pred.where} has the size {pred.ids.shape}, {gt.where} has {gt.ids.shape}.")
        num_gt, num_pred = len(gt.segment_ids), len(pred.segment_ids)
        pairs = gt.numbered() * (num_pred + 1) + pred.numbered()
        overlap = np.bincount(pairs.ravel(), minlength=(num_gt + 1) * (num_pred + 1))
        overlap = overlap.reshape(num_gt + 1, num_pred + 1)
        gt_areas, pred_areas = overlap.sum(axis=1)[1:], overlap.sum(axis=0)[1:]
        unlabeled, overlap = overlap[0, 1:], overlap[1:, 1:]

        gt_categories, pred_categories = np.array(gt.categories, int), np.array(pred.categories, int)
        is_crowd = np.array(gt.is_crowd or [False] * num_gt, bool)
        same_category = gt_categories[:, None] == pred_categories
        union = gt_areas[:, None] + pred_areas - overlap - unlabeled
        iou = overlap / np.maximum(union, 1)
        match = (iou > 0.5) & same_category & ~is_crowd[:, None]
        rows, columns = match.nonzero()
        np.add.at(self.iou, gt_categories[rows], iou[rows, columns])
        np.add.at(self.matched, gt_categories[rows], 1)

        is_missed = ~match.any(axis=1) & ~is_crowd & (gt_areas > 0)
        np.add.at(self.missed, gt_categories[is_missed], 1)
        excused = unlabeled + (overlap * (same_category & is_crowd[:, None])).sum(axis=0)
        is_wrong = ~match.any(axis=0) & (pred_areas > 0) & (2 * excused <= pred_areas)
        np.add.at(self.wrong, pred_categories[is_wrong], 1)

    def miss(self, categories: Sequence[int], is_crowd: Sequence[bool]) -> None:
        """Count all segments of an image without a prediction as missed."""
        for category, crowd in zip(categories, is_crowd):
            self.missed[category] += not crowd

    def quality(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return PQ, SQ and RQ of each category, (K,) float64 in [0, 1]; nan if it does not occur."""
        size = self.matched + 0.5 * self.missed + 0.5 * self.wrong
        occurs = size > 0
        pq, sq, rq = (np.full(self.num_categories, np.nan) for _ in range(3))
        pq[occurs] = self.iou[occurs] / size[occurs]
        sq[occurs] = self.iou[occurs] / np.maximum(self.matched[occurs], 1)
        rq[occurs] = self.matched[occurs] / size[occurs]
        return pq, sq, rq
