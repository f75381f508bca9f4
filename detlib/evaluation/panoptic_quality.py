"""Panoptic quality (arXiv:1801.00868): matching of segments in one image, and the sums over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PanopticStats", "Segments"]


@dataclass(frozen=True)
class Segments:
    """An image's segments.

    Attributes:
        ids: (H, W) integers, the segment of each pixel; 0 for none.
        segment_ids: S ids; those without a pixel do not count.
        categories: S category indices.
        is_crowd: S flags: regions of several objects that were not told apart; all False by default.
        where: what this is, for messages.
    """

    ids: np.ndarray
    segment_ids: Sequence[int]
    categories: Sequence[int]
    is_crowd: Sequence[bool] = ()
    where: str = "the prediction"

    def numbered(self) -> np.ndarray:
        """(H, W) int64: 1 + the place of each pixel's segment in `segment_ids`, 0 for none.

        Raises:
            ValueError: an id that is not listed, listed twice, or out of [1, 2^24).
        """
        listed = np.array(self.segment_ids, np.int64)
        lowest, highest = int(self.ids.min(initial=0)), int(self.ids.max(initial=0))
        highest = max(highest, int(listed.max(initial=0)))
        if lowest < 0 or highest >= 1 << 24 or (listed < 1).any():
            raise ValueError(
                f"{self.where}: segment ids must lie in [1, 2^24), and pixels without a segment be 0; got "
                f"pixels from {lowest}, ids up to {highest}, and the segments {listed.tolist()}."
            )
        if len(np.unique(listed)) < len(listed):
            raise ValueError(f"{self.where}: two segments have the same id: {sorted(listed.tolist())}.")
        # With 0 in front, the place of an id in `known` is its number. Ids are too large for a quick table.
        known = np.concatenate([np.zeros(1, np.int64), listed])
        order = np.argsort(known)
        numbers = order[np.searchsorted(known, self.ids, sorter=order).clip(max=len(listed))]
        unlisted = known[numbers] != self.ids
        if unlisted.any():
            raise ValueError(
                f"{self.where}: the map has the segment ids {np.unique(self.ids[unlisted]).tolist()}, which "
                f"segments_info does not list; it lists {sorted(listed.tolist())}."
            )
        return numbers


@dataclass
class PanopticStats:
    """Sums over images, of each category.

    Attributes:
        num_categories: K.
        iou: (K,) float64, IoU of the matched pairs.
        matched, missed, wrong: (K,) int64: matched pairs, true segments that nothing matches, predicted ones
            that match nothing.
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

    def add_image(self, truth: Segments, pred: Segments) -> None:
        """Match an image's segments and count them.

        A pair of one category matches when its IoU is above 0.5, where pixels without truth do not count;
        there is one partner at most. Crowd regions are no truth to be found; a prediction that matches
        nothing is not wrong when more than half of it lies on pixels without truth or crowds of its category.

        Raises:
            ValueError: the maps differ in size, or do not fit their lists.
        """
        if truth.ids.shape != pred.ids.shape:
            raise ValueError(
                f"{pred.where} has the size {pred.ids.shape}, {truth.where} has {truth.ids.shape}."
            )
        num_true, num_pred = len(truth.segment_ids), len(pred.segment_ids)
        pairs = truth.numbered() * (num_pred + 1) + pred.numbered()
        overlap = np.bincount(pairs.ravel(), minlength=(num_true + 1) * (num_pred + 1))
        overlap = overlap.reshape(num_true + 1, num_pred + 1)
        true_areas, pred_areas = overlap.sum(axis=1)[1:], overlap.sum(axis=0)[1:]
        unlabeled, overlap = overlap[0, 1:], overlap[1:, 1:]

        true_kinds, pred_kinds = np.array(truth.categories, int), np.array(pred.categories, int)
        is_crowd = np.array(truth.is_crowd or [False] * num_true, bool)
        same_kind = true_kinds[:, None] == pred_kinds
        union = true_areas[:, None] + pred_areas - overlap - unlabeled
        iou = overlap / np.maximum(union, 1)
        match = (iou > 0.5) & same_kind & ~is_crowd[:, None]
        rows, columns = match.nonzero()
        np.add.at(self.iou, true_kinds[rows], iou[rows, columns])
        np.add.at(self.matched, true_kinds[rows], 1)

        is_missed = ~match.any(axis=1) & ~is_crowd & (true_areas > 0)
        np.add.at(self.missed, true_kinds[is_missed], 1)
        excused = unlabeled + (overlap * (same_kind & is_crowd[:, None])).sum(axis=0)
        is_wrong = ~match.any(axis=0) & (pred_areas > 0) & (2 * excused <= pred_areas)
        np.add.at(self.wrong, pred_kinds[is_wrong], 1)

    def miss(self, categories: Sequence[int], is_crowd: Sequence[bool]) -> None:
        """Count an image without a prediction: all its segments are missed."""
        for category, crowd in zip(categories, is_crowd):
            self.missed[category] += not crowd

    def quality(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """PQ, SQ and RQ of each category, (K,) float64 in [0, 1]; nan where it does not occur."""
        size = self.matched + 0.5 * self.missed + 0.5 * self.wrong
        occurs = size > 0
        pq, sq, rq = (np.full(self.num_categories, np.nan) for _ in range(3))
        pq[occurs] = self.iou[occurs] / size[occurs]
        sq[occurs] = self.iou[occurs] / np.maximum(self.matched[occurs], 1)
        rq[occurs] = self.matched[occurs] / size[occurs]
        return pq, sq, rq
