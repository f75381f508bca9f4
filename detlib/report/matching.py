"""Which detection is which object: matches, confusion matrix, F1 and a score for each picture.

G objects of the ground truth, D detections, K classes, N pictures, P pairs of a detection and an object.

Within a class COCO's rule holds: the detections of a picture take, the most confident first, the object that
they overlap most among those that are left, from an IoU of 0.5. So what is matched at a confidence threshold
does not depend on the threshold. What is left over above the threshold is matched across classes, the largest
overlap first: these are the confusions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detlib.evaluation.coco_metrics import rotated_iou
from detlib.report.detections import Detections

__all__ = ["F1Curve", "Matches", "confusion_matrix", "f1_curve", "match_classes", "picture_scores"]

IOU_THRESHOLD = 0.5
_THRESHOLDS = np.linspace(0, 1, 1001)


@dataclass(frozen=True)
class Matches:
    """Matches within classes.

    Attributes:
        dt_match: (D,) int64, the object that a detection has matched, or -1.
        dt_iou: (D,) float64, the overlap with it, or 0.
        dt_ignored: (D,) bool, detections that are neither right nor wrong: they lie in a crowd, or nobody
            has looked for all objects of their class in their picture.
    """

    dt_match: np.ndarray
    dt_iou: np.ndarray
    dt_ignored: np.ndarray


@dataclass(frozen=True)
class F1Curve:
    """Precision, recall and F1 at rising thresholds of confidence, T of them.

    Attributes:
        thresholds: (T,).
        true_positives, num_detections: (T, K), of the detections with at least that confidence.
        num_objects: (K,).
        best: the index of the threshold with the best F1 over all detections together; where nothing is right
            at any, that of 0.5.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    num_detections: np.ndarray
    num_objects: np.ndarray
    best: int

    @property
    def threshold(self) -> float:
        """The chosen threshold."""
        return float(self.thresholds[self.best])

    def rates(self, class_index: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 at each threshold, (T,) in 0..1, of a class or of all together.

        Precision is nan without detections, recall and F1 are without objects.
        """
        columns = slice(None) if class_index is None else slice(class_index, class_index + 1)
        right = self.true_positives[:, columns].sum(axis=1)
        found = self.num_detections[:, columns].sum(axis=1)
        there = np.full(len(right), self.num_objects[columns].sum())
        f1 = _ratio(2 * right, found + there)
        return _ratio(right, found), _ratio(right, there), np.where(there > 0, f1, np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def _cross(dt_group: np.ndarray, gt_group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a detection and an object of the same group: (P,) indices of each."""
    order = np.argsort(gt_group, kind="stable")
    first = np.searchsorted(gt_group[order], dt_group, side="left")
    count = np.searchsorted(gt_group[order], dt_group, side="right") - first
    dt = np.repeat(np.arange(len(dt_group)), count)
    within = np.arange(len(dt)) - np.repeat(np.cumsum(count) - count, count)
    return dt, order[np.repeat(first, count) + within]


def _overlaps(found: Detections, dt: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """(P,) overlaps of pairs; with crowds, it is the part of the detection that lies within."""
    if found.is_rotated:
        return _rotated_overlaps(found, dt, gt)
    a, b, crowd = found.dt_boxes[dt], found.gt_boxes[gt], found.gt_crowd[gt]
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    inside = (high - low).clip(min=0).prod(axis=1)
    of_detection, of_object = a[:, 2:].prod(axis=1), b[:, 2:].prod(axis=1)
    whole = np.where(crowd, of_detection, of_detection + of_object - inside)
    return np.divide(inside, whole, out=np.zeros(len(dt)), where=whole > 0)


def _rotated_overlaps(found: Detections, dt: np.ndarray, gt: np.ndarray) -> np.ndarray:
    overlaps = np.zeros(len(dt))
    image = found.dt_image[dt]
    order = np.argsort(image, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(image[order])) + 1):
        if len(rows):
            dts, dt_at = np.unique(dt[rows], return_inverse=True)
            gts, gt_at = np.unique(gt[rows], return_inverse=True)
            table = rotated_iou(found.dt_boxes[dts], found.gt_boxes[gts], found.gt_crowd[gts])
            overlaps[rows] = table[dt_at, gt_at]
    return overlaps


def _first_of(group: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each pair, whether it comes first in `order` among those of its group."""
    sorted_group = group[order]
    is_first = np.zeros(len(group), dtype=bool)
    at = np.argsort(sorted_group, kind="stable")
    begins = np.r_[True, sorted_group[at][1:] != sorted_group[at][:-1]] if len(at) else at.astype(bool)
    is_first[order[at[begins]]] = True
    return is_first


def _pair_off(dt: np.ndarray, gt: np.ndarray, for_dt: np.ndarray, for_gt: np.ndarray) -> np.ndarray:
    """Greedy matching of all pictures at once.

    Every round takes each pair that is the best left both for its detection and for its object. The object's
    order is that in which detections choose, so this is what choosing one after the other comes to.

    Args:
        dt, gt: (P,) pairs.
        for_dt: (P,) the order of the pairs in a detection's eyes, smaller is better, without ties.
        for_gt: likewise in an object's.

    Returns:
        Indices of the pairs that are matched.
    """
    left = np.arange(len(dt))
    taken = []
    while len(left):
        best_of_dt = _first_of(dt[left], np.argsort(for_dt[left], kind="stable"))
        best_of_gt = _first_of(gt[left], np.argsort(for_gt[left], kind="stable"))
        chosen = left[best_of_dt & best_of_gt]
        taken.append(chosen)
        left = left[~np.isin(dt[left], dt[chosen]) & ~np.isin(gt[left], gt[chosen])]
    return np.concatenate(taken) if taken else left


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """The place of each pair when sorted by the first key, then the second."""
    order = np.lexsort(keys[::-1])
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def match_classes(found: Detections) -> Matches:
    """Match detections with objects of their class."""
    dt_group = found.dt_image * found.num_classes + found.dt_class
    dt, gt = _cross(dt_group, found.gt_image * found.num_classes + found.gt_class)
    iou = _overlaps(found, dt, gt)
    near = iou >= IOU_THRESHOLD
    dt, gt, iou = dt[near], gt[near], iou[near]
    in_crowd = found.gt_crowd[gt]
    real = np.flatnonzero(~in_crowd)
    # Sorting by the detection's number as well: of equal confidence, the earlier comes first.
    chosen = real[
        _pair_off(
            dt[real],
            gt[real],
            _ranks(-iou[real], -gt[real]),
            _ranks(-found.dt_score[dt[real]], dt[real]),
        )
    ]
    match = np.full(len(found.dt_score), -1, dtype=np.int64)
    match[dt[chosen]] = gt[chosen]
    match_iou = np.zeros(len(match))
    match_iou[dt[chosen]] = iou[chosen]
    ignored = found.dt_uncounted.copy()
    ignored[dt[in_crowd]] = True
    return Matches(match, match_iou, ignored & (match < 0))


def f1_curve(found: Detections, matches: Matches) -> F1Curve:
    """Count detections by threshold, and chooses the threshold of the best F1."""
    counted = ~matches.dt_ignored
    num_thresholds, num_classes = len(_THRESHOLDS), found.num_classes
    # A detection counts up to the last threshold that its confidence reaches.
    last = np.searchsorted(_THRESHOLDS, found.dt_score, side="right") - 1

    def count(which: np.ndarray) -> np.ndarray:
        which = which & (last >= 0)
        cells = last[which] * num_classes + found.dt_class[which]
        table = np.bincount(cells, minlength=num_thresholds * num_classes)
        return table.reshape(num_thresholds, num_classes)[::-1].cumsum(axis=0)[::-1]

    right, all_found = count(matches.dt_match >= 0), count(counted)
    f1 = _ratio(2 * right.sum(axis=1), all_found.sum(axis=1) + found.gt_counts.sum())
    best = int(np.nanargmax(f1)) if np.nanmax(f1, initial=0) > 0 else num_thresholds // 2
    return F1Curve(_THRESHOLDS, right, all_found, found.gt_counts, best)


def confusion_matrix(found: Detections, matches: Matches, threshold: float) -> np.ndarray:
    """Count what is taken for what.

    Args:
        found: detections and ground truth.
        matches: from `match_classes`.
        threshold: detections with less confidence are left out.

    Returns:
        (K + 1, K + 1) int64: rows are the true classes, columns the predicted ones, the last of each stands
        for the background. Its diagonal has the matches within classes; the last column what was missed, the
        last row what was found where nothing is.
    """
    size = found.num_classes + 1
    above = (found.dt_score >= threshold) & ~matches.dt_ignored
    matched = np.flatnonzero(above & (matches.dt_match >= 0))
    free = np.flatnonzero(above & (matches.dt_match < 0))
    gt_is_free = ~found.gt_crowd
    gt_is_free[matches.dt_match[matched]] = False
    free_gt = np.flatnonzero(gt_is_free)

    dt, gt = _cross(found.dt_image[free], found.gt_image[free_gt])
    dt, gt = free[dt], free_gt[gt]
    iou = _overlaps(found, dt, gt)
    near = (iou >= IOU_THRESHOLD) & (found.dt_class[dt] != found.gt_class[gt])
    dt, gt, iou = dt[near], gt[near], iou[near]
    order = _ranks(-iou, dt)
    chosen = _pair_off(dt, gt, order, order)
    dt, gt = dt[chosen], gt[chosen]

    background = found.num_classes
    false, missed = np.setdiff1d(free, dt), np.setdiff1d(free_gt, gt)
    true_class = np.concatenate(
        [found.dt_class[matched], found.gt_class[gt], np.full(len(false), background), found.gt_class[missed]]
    )
    predicted = np.concatenate(
        [found.dt_class[matched], found.dt_class[dt], found.dt_class[false], np.full(len(missed), background)]
    )
    cells = np.bincount(true_class * size + predicted, minlength=size * size)
    return cells.reshape(size, size)


def picture_scores(found: Detections, matches: Matches, threshold: float) -> dict[str, np.ndarray]:
    """How good the detections on each picture are.

    The score is the sum of the overlaps of all matches, divided by the mean of the numbers of objects and of
    detections: 1 where everything is found exactly and nothing else, 0 where nothing is.

    Returns:
        Arrays of (N,): "score" (nan where there is nothing to find and nothing is found), "objects",
        "detections", "right".
    """
    number = len(found.image_ids)
    above = (found.dt_score >= threshold) & ~matches.dt_ignored
    right = above & (matches.dt_match >= 0)
    objects = np.bincount(found.gt_image[~found.gt_crowd], minlength=number)
    detections = np.bincount(found.dt_image[above], minlength=number)
    overlaps = np.bincount(found.dt_image[right], weights=matches.dt_iou[right], minlength=number)
    return {
        "score": _ratio(overlaps, (objects + detections) / 2),
        "objects": objects,
        "detections": detections,
        "right": np.bincount(found.dt_image[right], minlength=number),
    }
