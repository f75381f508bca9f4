"""Average precision of instance masks as Cityscapes defines it.

P predicted masks and G true ones of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["InstanceMatches", "THRESHOLDS", "instance_average_precision"]

THRESHOLDS = np.arange(0.5, 1.0, 0.05)

# Smaller objects need not be found.
_MIN_SIZE = 100


@dataclass(frozen=True)
class InstanceMatches:
    """How the masks of one image overlap, in pixels.

    Attributes:
        labels: (G,) label ids of the true masks, groups among them.
        is_group: (G,) bool, whether a mask is that of several objects which are not told apart.
        sizes: (G,) pixels.
        pred_labels: (P,) label ids.
        scores: (P,) float64.
        pred_sizes: (P,) pixels.
        void_sizes: (P,) pixels in regions whose label does not count.
        overlaps: (P, G) pixels in common.
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
        """The masks of one label; predictions without a pixel are left out."""
        true = self.labels == label
        pred = (self.pred_labels == label) & (self.pred_sizes > 0)
        return InstanceMatches(
            self.labels[true],
            self.is_group[true],
            self.sizes[true],
            self.pred_labels[pred],
            self.scores[pred],
            self.pred_sizes[pred],
            self.void_sizes[pred],
            self.overlaps[pred][:, true],
        )


def instance_average_precision(images: Sequence[InstanceMatches], labels: Sequence[int]) -> np.ndarray:
    """Computes average precision for each label and each of `THRESHOLDS`: (K, T), nan without objects."""
    table = np.full((len(labels), len(THRESHOLDS)), np.nan)
    for row, label in enumerate(labels):
        mine = [image.of_label(label) for image in images]
        to_find = sum(int(_must_be_found(image).sum()) for image in mine)
        if to_find:
            for column, threshold in enumerate(THRESHOLDS):
                outcomes = [_outcomes(image, threshold) for image in mine]
                right, scores = (np.concatenate(parts) for parts in zip(*outcomes))
                table[row, column] = _area(right, scores, to_find)
    return table


def _must_be_found(image: InstanceMatches) -> np.ndarray:
    return ~image.is_group & (image.sizes >= _MIN_SIZE)


def _outcomes(image: InstanceMatches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether predictions are right, (N,) bool, and their scores; those that do not count are left out.

    An object is found by the best of the predictions that match it. Of the others those are wrong which match
    an object that was to be found, and those which match none and lie for the most part where it counts.
    """
    overlaps = image.overlaps
    union = image.sizes + image.pred_sizes[:, None] - overlaps
    matches = overlaps / np.maximum(union, 1) > threshold
    objects = _must_be_found(image)
    finds = matches[:, objects]
    scores = np.where(finds, image.scores[:, None], -np.inf)
    found = finds.any(axis=0)
    right = scores.max(axis=0, initial=-np.inf)[found]

    is_best = np.zeros_like(finds)
    if len(finds):
        is_best[scores.argmax(axis=0)[found], np.flatnonzero(found)] = True
    late = image.scores[np.nonzero(finds & ~is_best)[0]]

    # A group that is small counts twice, as in the reference.
    ignored = image.void_sizes + overlaps[:, image.is_group].sum(axis=1)
    ignored = ignored + overlaps[:, image.sizes < _MIN_SIZE].sum(axis=1)
    alone = ~matches.any(axis=1) & (ignored / np.maximum(image.pred_sizes, 1) <= threshold)
    scores = np.concatenate([right, late, image.scores[alone]])
    return np.arange(len(scores)) < len(right), scores


def _area(right: np.ndarray, scores: np.ndarray, to_find: int) -> float:
    """The area below the curve of precision by recall, at all scores that occur, and recall 0."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores are one point
    num_right = np.cumsum(right[order])[last]
    precision = np.append(1.0, num_right / (last + 1))
    recall = np.append(0.0, num_right / to_find)
    # Each point stands for the recall from halfway to the one before to halfway to the one after.
    widths = np.append(recall[1:], recall[-1]) - np.append(0.0, recall[:-1])
    return float((precision * widths).sum() / 2)
