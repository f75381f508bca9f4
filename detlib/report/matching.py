"""Matching of detections to objects: matches, confusion matrix, F1 and a score per image.

Shapes: G ground-truth objects, D detections, K classes, N images, P pairs of a detection and an object.

Matches within a class follow COCO's rule: in descending confidence, each detection of an image takes the
free object with the highest IoU, if that is at least 0.5. The matches above a confidence threshold therefore
do not depend on the threshold. The remaining detections above the threshold are matched across classes, in
descending order of IoU: these are the confusions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detlib.evaluation.coco_metrics import rotated_iou
from detlib.report.detections import Detections

__all__ = ["F1Curve", "Matches", "confusion_matrix", "f1_curve", "match_classes", "image_scores"]

IOU_THRESHOLD = 0.5
_THRESHOLDS = np.linspace(0, 1, 1001)


@dataclass(frozen=True)
class Matches:
    """Matches within classes.

    Attributes:
        dt_match: (D,) int64, the object matched by each detection, or -1.
        dt_iou: (D,) float64, the IoU with that object, or 0.
        dt_ignored: (D,) bool, detections that count neither as correct nor as wrong: they are in a crowd, or
            not every object of their class is annotated in their image.
    """

    dt_match: np.ndarray
    dt_iou: np.ndarray
    dt_ignored: np.ndarray


@dataclass(frozen=True)
class F1Curve:
    """Precision, recall and F1 at T ascending confidence thresholds.

    Attributes:
        thresholds: (T,) confidence thresholds.
        true_positives, num_detections: (T, K) counts of the detections with at least that confidence.
        num_objects: (K,) counts of the objects.
        best: index of the threshold with the best F1 over all detections; if there is no true positive at any
            threshold, the index of 0.5.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    num_detections: np.ndarray
    num_objects: np.ndarray
    best: int

    @property
    def threshold(self) -> float:
        """Threshold with the best F1."""
        return float(self.thresholds[self.best])

    def rates(self, class_index: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return precision, recall and F1 at each threshold, (T,) in [0, 1], of one class or of all.

        Precision is nan where there are no detections, recall and F1 where there are no objects.
        """
        columns = slice(None) if class_index is None else slice(class_index, class_index + 1)
        correct = self.true_positives[:, columns].sum(axis=1)
        found = self.num_detections[:, columns].sum(axis=1)
        objects = np.full(len(correct), self.num_objects[columns].sum())
        f1 = _ratio(2 * correct, found + objects)
        return _ratio(correct, found), _ratio(correct, objects), np.where(objects > 0, f1, np.nan)


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(part, total, out=np.full(np.shape(part), np.nan), where=np.asarray(total) > 0)


def _cross(dt_group: np.ndarray, gt_group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of a detection and an object of the same group, as (P,) indices of each."""
    order = np.argsort(gt_group, kind="stable")
    first = np.searchsorted(gt_group[order], dt_group, side="left")
    count = np.searchsorted(gt_group[order], dt_group, side="right") - first
    dt = np.repeat(np.arange(len(dt_group)), count)
    within = np.arange(len(dt)) - np.repeat(np.cumsum(count) - count, count)
    return dt, order[np.repeat(first, count) + within]


def _overlaps(found: Detections, dt: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """Return the (P,) IoUs of pairs; for crowds, the fraction of the detection inside the crowd."""
    if found.is_rotated:
        return _rotated_overlaps(found, dt, gt)
    a, b, crowd = found.dt_boxes[dt], found.gt_boxes[gt], found.gt_crowd[gt]
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    inside = (high - low).clip(min=0).prod(axis=1)
    of_detection, of_object = a[:, 2:].prod(axis=1), b[:, 2:].prod(axis=1)
    total = np.where(crowd, of_detection, of_detection + of_object - inside)
    return np.divide(inside, total, out=np.zeros(len(dt)), where=total > 0)


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
    """Return for each pair whether it is the first of its group in `order`."""
    sorted_group = group[order]
    is_first = np.zeros(len(group), dtype=bool)
    at = np.argsort(sorted_group, kind="stable")
    begins = np.r_[True, sorted_group[at][1:] != sorted_group[at][:-1]] if len(at) else at.astype(bool)
    is_first[order[at[begins]]] = True
    return is_first


def _match_greedily(dt: np.ndarray, gt: np.ndarray, for_dt: np.ndarray, for_gt: np.ndarray) -> np.ndarray:
    """Match greedily in all images together.

    Every round takes each pair that is the best remaining one both for its detection and for its object. The
    objects rank the detections in the order in which these choose, so the result equals that of choosing one
    detection after the other.

    Args:
        dt, gt: (P,) indices of the detection and of the object of each pair.
        for_dt: (P,) preference of the detection, lower is better, without ties.
        for_gt: (P,) preference of the object, likewise.

    Returns:
        Indices of the matched pairs.
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
    """Return the rank of each pair when sorted by the first key, then by the second."""
    order = np.lexsort(keys[::-1])
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def match_classes(found: Detections) -> Matches:
    """Match detections to objects of their class."""
    dt_group = found.dt_image * found.num_classes + found.dt_class
    dt, gt = _cross(dt_group, found.gt_image * found.num_classes + found.gt_class)
    iou = _overlaps(found, dt, gt)
    near = iou >= IOU_THRESHOLD
    dt, gt, iou = dt[near], gt[near], iou[near]
    in_crowd = found.gt_crowd[gt]
    real = np.flatnonzero(~in_crowd)
    # Also sorted by detection index: of equally confident detections, the earlier one comes first.
    chosen = real[
        _match_greedily(
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
    """Count the detections at each threshold and select the threshold with the best F1."""
    counted = ~matches.dt_ignored
    num_thresholds, num_classes = len(_THRESHOLDS), found.num_classes
    # A detection counts at every threshold up to the last one that its confidence reaches.
    last = np.searchsorted(_THRESHOLDS, found.dt_score, side="right") - 1

    def count(which: np.ndarray) -> np.ndarray:
        which = which & (last >= 0)
        cells = last[which] * num_classes + found.dt_class[which]
        table = np.bincount(cells, minlength=num_thresholds * num_classes)
        return table.reshape(num_thresholds, num_classes)[::-1].cumsum(axis=0)[::-1]

    correct, all_found = count(matches.dt_match >= 0), count(counted)
    f1 = _ratio(2 * correct.sum(axis=1), all_found.sum(axis=1) + found.gt_counts.sum())
    best = int(np.nanargmax(f1)) if np.nanmax(f1, initial=0) > 0 else num_thresholds // 2
    return F1Curve(_THRESHOLDS, correct, all_found, found.gt_counts, best)


def confusion_matrix(found: Detections, matches: Matches, threshold: float) -> np.ndarray:
    """Count detections by true and predicted class.

    Args:
        found: the detections and the ground truth.
        matches: result of `match_classes`.
        threshold: minimum confidence of the counted detections.

    Returns:
        (K + 1, K + 1) int64. Rows are the true classes, columns the predicted classes; the last row and the
        last column are the background. The diagonal counts the matches within a class, the last column the
        missed objects, the last row the detections that match no object.
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
    chosen = _match_greedily(dt, gt, order, order)
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


def image_scores(found: Detections, matches: Matches, threshold: float) -> dict[str, np.ndarray]:
    """Score the detections of each image.

    The score is the sum of the IoUs of all matches, divided by the mean of the number of objects and the
    number of detections. It is 1 if every object is detected exactly and nothing else, and 0 if there is no
    match.

    Returns:
        Arrays of (N,): "score" (nan if there are neither objects nor detections), "objects", "detections",
        "correct".
    """
    number = len(found.image_ids)
    above = (found.dt_score >= threshold) & ~matches.dt_ignored
    correct = above & (matches.dt_match >= 0)
    objects = np.bincount(found.gt_image[~found.gt_crowd], minlength=number)
    detections = np.bincount(found.dt_image[above], minlength=number)
    overlaps = np.bincount(found.dt_image[correct], weights=matches.dt_iou[correct], minlength=number)
    return {
        "score": _ratio(overlaps, (objects + detections) / 2),
        "objects": objects,
        "detections": detections,
        "correct": np.bincount(found.dt_image[correct], minlength=number),
    }
