"""Matching, compared with torchvision's matcher and with loops."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher

from detlib.modeling.matcher import Matcher, match_boxes
from detlib.structures import Boxes
from tests.builders import random_boxes


def test_labels_of_a_worked_example():
    quality = torch.tensor(
        [
            [0.15, 0.45, 0.20, 0.60],
            [0.30, 0.65, 0.05, 0.10],
            [0.05, 0.40, 0.25, 0.40],
        ]
    )
    matches, labels = Matcher([0.3, 0.5], [0, -1, 1])(quality)
    assert matches.tolist() == [1, 1, 2, 0] and matches.dtype == torch.int64
    assert labels.tolist() == [-1, 1, 0, 1] and labels.dtype == torch.int8
    # The second and the fourth prediction tie as the best match of the third ground truth.
    matches, labels = Matcher([0.7], [0, 1], allow_low_quality_matches=True)(quality)
    assert matches.tolist() == [1, 1, 2, 0]
    assert labels.tolist() == [0, 1, 0, 1]


def test_quality_on_a_threshold_gets_the_upper_label():
    _, labels = Matcher([0.25, 0.5], [0, -1, 1])(torch.tensor([[0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0]]))
    assert labels.tolist() == [0, 0, -1, -1, 1, 1]


@pytest.mark.parametrize("low_quality", [False, True])
def test_matches_equal_torchvision(low_quality):
    quality = torch.rand(7, 400, generator=torch.Generator().manual_seed(0)) ** 2
    quality[3] *= 0.3
    quality[4, ::5] = quality[4].max()  # ties
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], low_quality)(quality)
    want = TorchvisionMatcher(0.7, 0.3, low_quality)(quality)
    assert labels.tolist() == [{-1: 0, -2: -1}.get(m, 1) for m in want.tolist()]
    assert torch.equal(matches[want >= 0], want[want >= 0])


def test_ground_truth_without_overlap_sets_no_label():
    quality = torch.tensor([[0.6, 0.0, 0.2], [0.0, 0.0, 0.0]])
    _, labels = Matcher([0.5], [0, 1], allow_low_quality_matches=True)(quality)
    assert labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs_give_empty_or_background_matches(shape):
    matches, labels = Matcher([0.5], [-1, 1], True)(torch.zeros(shape))
    assert matches.tolist() == [0] * shape[1] and labels.tolist() == [-1] * shape[1]
    assert matches.dtype == torch.int64 and labels.dtype == torch.int8


@pytest.mark.parametrize(
    "thresholds, labels, words",
    [
        ([0.5, 0.3], [0, -1, 1], "ascending"),
        ([0.0], [0, 1], "above 0"),
        ([0.5], [0, -1, 1], "1 thresholds need 2 labels"),
        ([0.5], [0, 2], "-1 .ignore."),
    ],
)
def test_wrong_thresholds_labels_and_matrix_raise(thresholds, labels, words):
    with pytest.raises(ValueError, match=words):
        Matcher(thresholds, labels)
    with pytest.raises(ValueError, match=r"\(M, N\) matrix, got \(3,\)"):
        Matcher([0.5], [0, 1])(torch.zeros(3))


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("max_pairs", [1, 700, 2**20])
def test_matching_in_chunks_equals_the_full_matrix(low_quality, max_pairs):
    matcher = Matcher([0.3, 0.7], [0, -1, 1], low_quality)
    gt, boxes = Boxes(random_boxes(23, seed=0)), Boxes(random_boxes(300, seed=1))
    gt = Boxes.cat([gt, gt[:4]])  # duplicates tie
    matches, labels = match_boxes(matcher, gt, boxes, max_pairs=max_pairs)
    want_matches, want_labels = matcher(gt.pairwise_iou(boxes))
    assert torch.equal(matches, want_matches) and torch.equal(labels, want_labels)
    assert labels.dtype == torch.int8 and {-1, 0, 1} == set(labels.tolist())


def test_chunks_bound_the_size_of_matrices():
    sizes = []

    class Watched(Boxes):
        def pairwise_iou(self, other):
            sizes.append(len(self) * len(other))
            return super().pairwise_iou(other)

    gt = Watched(random_boxes(50, seed=0))
    match_boxes(Matcher([0.5], [0, 1]), gt, Watched(random_boxes(100, seed=1)), max_pairs=1000)
    assert max(sizes) <= 1000 and sum(sizes) == 5000


def test_subclass_of_matcher_gets_the_full_matrix():
    class CustomMatcher(Matcher):
        def __call__(self, match_quality_matrix):
            assert match_quality_matrix.shape == (5, 40)
            return super().__call__(match_quality_matrix)

    match_boxes(
        CustomMatcher([0.5], [0, 1]),
        Boxes(random_boxes(5, seed=0)),
        Boxes(random_boxes(40, seed=1)),
        max_pairs=10,
    )
