"""Average precision of instance masks as defined by Cityscapes.

Shape legend: P predicted and G ground truth masks of an image, K labels, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["InstanceMatches", "THRESHOLDS", "instance_average_precision"]

THRESHOLDS = np.arange(0.5, 1.0, 0.05)

# In pixels. Smaller objects do not count as missed.
_MIN_SIZE = 100


@dataclass(frozen=True)
class InstanceMatches:
    """The overlaps of the masks of one image, in pixels.

    Attributes:
        labels: (G,) label ids of the ground truth masks, including groups.
        is_group: (G,) bool, whether the mask covers multiple objects that are not annotated separately.
        sizes: (G,) number of pixels.
        pred_labels: (P,) label ids.
        scores: (P,) float64.
        pred_sizes: (P,) number of pixels.
        void_sizes: (P,) number of pixels in regions with an ignored label.
        overlaps: (P, G) number of pixels in the intersection.
    """

    labels: np.ndarray
    is_group: np.ndarray
    sizes: np.ndarray
    pred_labels: np.ndarray
    scores: np.ndarray
    pred_sizes: np.ndarray
    void_sizes: np.ndarray
    overlaps: np.ndarray

    def of_label(self, label: int) -> InstanceMatches:
        """Return the masks of one label, without empty predictions."""
        gt = self.labels == label
        pred = (self.pred_labels == label) & (self.pred_sizes > 0)
        return InstanceMatches(
            self.labels[gt],
            self.is_group[gt],
            self.sizes[gt],
            self.pred_labels[pred],
            self.scores[pred],
            self.pred_sizes[pred],
            self.void_sizes[pred],
            self.overlaps[pred][:, gt],
        )


def instance_average_precision(images: Sequence[InstanceMatches], labels: Sequence[int]) -> np.ndarray:
    """Return the average precision of each label at each of `THRESHOLDS`, (K, T); nan without objects."""
    table = np.full((len(labels), len(THRESHOLDS)), np.nan)
    for row, label in enumerate(labels):
        mine = [image.of_label(label) for image in images]
        to_find = sum(int(_must_be_found(image).sum()) for image in mine)
        if to_find:
            for column, threshold in enumerate(THRESHOLDS):
                outcomes = [_outcomes(image, threshold) for image in mine]
                correct, scores = (np.concatenate(parts) for parts in zip(*outcomes))
                table[row, column] = _area(correct, scores, to_find)
    return table


def _must_be_found(image: InstanceMatches) -> np.ndarray:
    return ~image.is_group & (image.sizes >= _MIN_SIZE)


def _outcomes(image: InstanceMatches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return whether the N counted predictions are correct, (N,) bool, and their scores.

    An object is found by the matching prediction with the highest score. Other predictions that match an
    object to be found are wrong. So are predictions that match nothing, unless the fraction of their pixels
    that are ignored is above `threshold`.
    """
    overlaps = image.overlaps
    union = image.sizes + image.pred_sizes[:, None] - overlaps
    matches = overlaps / np.maximum(union, 1) > threshold
    objects = _must_be_found(image)
    finds = matches[:, objects]
    scores = np.where(finds, image.scores[:, None], -np.inf)
    found = finds.any(axis=0)
    correct = scores.max(axis=0, initial=-np.inf)[found]

    is_best = np.zeros_like(finds)
    if len(finds):
        is_best[scores.argmax(axis=0)[found], np.flatnonzero(found)] = True
    duplicates = image.scores[np.nonzero(finds & ~is_best)[0]]

    # Small groups count twice, as in cityscapesscripts.
    ignored = image.void_sizes + overlaps[:, image.is_group].sum(axis=1)
    ignored = ignored + overlaps[:, image.sizes < _MIN_SIZE].sum(axis=1)
    unmatched = ~matches.any(axis=1) & (ignored / np.maximum(image.pred_sizes, 1) <= threshold)
    scores = np.concatenate([correct, duplicates, image.scores[unmatched]])
    return np.arange(len(scores)) < len(correct), scores


def _area(correct: np.ndarray, scores: np.ndarray, to_find: int) -> float:
    """Return the area under the precision-recall curve, with a point for each distinct score and recall 0."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores make one point
    num_correct = np.cumsum(correct[order])[last]
    precision = np.append(1.0, num_correct / (last + 1))
    recall = np.append(0.0, num_correct / to_find)
    # Each point covers the recall range between the midpoints to its neighbors.
    widths = np.append(recall[1:], recall[-1]) - np.append(0.0, recall[:-1])
    return float((precision * widths).sum() / 2)
