"""Labeling and sampling of boxes."""

import pytest
import torch

from detlib.modeling import sampling
from detlib.modeling.matcher import Matcher
from detlib.modeling.sampling import label_and_sample, label_boxes, subsample_labels
from detlib.structures import Boxes

GT = Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 70.0, 70.0]]))
BOXES = Boxes(
    torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # IoU 1 with the first
            [50.0, 50.0, 70.0, 62.0],  # 0.6 with the second
            [0.0, 0.0, 10.0, 4.0],  # 0.4 with the first
            [80.0, 80.0, 90.0, 90.0],  # none
        ]
    )
)
MATCHER = Matcher([0.3, 0.5], [0, -1, 1])


@pytest.mark.parametrize(
    "num_samples, fraction, num_pos, num_neg",
    [(64, 0.5, 30, 34), (40, 0.5, 20, 20), (40, 0.26, 10, 30), (1000, 0.5, 30, 60), (10, 0.0, 0, 10)],
)
def test_sample_has_the_requested_size_and_foreground_fraction(num_samples, fraction, num_pos, num_neg):
    labels = torch.tensor([7] * 30 + [80] * 60 + [-1] * 10)[torch.randperm(100)]
    pos, neg = subsample_labels(labels, num_samples, fraction, bg_label=80)
    assert (len(pos), len(neg)) == (num_pos, num_neg)
    assert (labels[pos] == 7).all() and (labels[neg] == 80).all()
    assert len(set(pos.tolist())) == num_pos and len(set(neg.tolist())) == num_neg


def test_sampling_is_uniform_and_repeatable_with_a_seed():
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    counts = torch.zeros(10)
    for _ in range(600):
        pos, neg = subsample_labels(labels, 4, 0.5, 0)
        counts[pos] += 1
        counts[neg] += 1
    assert (counts[:4] - 300).abs().max() < 75 and (counts[4:] - 200).abs().max() < 75
    torch.manual_seed(5)
    first = subsample_labels(labels, 4, 0.5, 0)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, subsample_labels(labels, 4, 0.5, 0)))


def test_labels_without_classes_are_one_zero_or_ignored():
    matched, labels = label_boxes(BOXES, GT, MATCHER)
    assert matched.tolist() == [0, 1, 0, 0] and labels.tolist() == [1, 1, -1, 0]


def test_labels_with_classes_are_those_of_the_matches():
    _, labels = label_boxes(BOXES, GT, MATCHER, gt_classes=torch.tensor([3, 5]), bg_label=20)
    assert labels.tolist() == [3, 5, -1, 20] and labels.dtype == torch.int64


@pytest.mark.parametrize("classes", [None, torch.zeros(0, dtype=torch.int64)])
def test_boxes_without_ground_truth_are_background(classes):
    sample = label_and_sample(
        BOXES, GT[:0], MATCHER, num_samples=3, positive_fraction=0.5, bg_label=20, gt_classes=classes
    )
    assert sample.labels.tolist() == [20] * 4 and sample.matched_idxs.tolist() == [0] * 4
    assert len(sample.fg_idxs) == 0 and len(sample.bg_idxs) == 3


def test_empty_boxes_give_an_empty_sample():
    sample = label_and_sample(BOXES[:0], GT, MATCHER, num_samples=3, positive_fraction=0.5, bg_label=0)
    assert all(len(x) == 0 for x in sample)


def test_ignored_boxes_are_not_sampled():
    sample = label_and_sample(
        BOXES,
        GT,
        MATCHER,
        num_samples=10,
        positive_fraction=0.5,
        bg_label=0,
        ignore=torch.tensor([True, False, False, True]),
    )
    assert sample.labels.tolist() == [-1, 1, -1, -1]
    assert sample.fg_idxs.tolist() == [1] and sample.bg_idxs.tolist() == []


def test_subsample_labels_can_be_replaced(monkeypatch):
    seen = []

    def draw(labels, num_samples, positive_fraction, bg_label):
        seen.append((labels.tolist(), num_samples, positive_fraction, bg_label))
        return torch.tensor([1]), torch.tensor([3])

    monkeypatch.setattr(sampling, "subsample_labels", draw)
    sample = label_and_sample(BOXES, GT, MATCHER, num_samples=9, positive_fraction=0.25, bg_label=0)
    assert seen == [([1, 1, -1, 0], 9, 0.25, 0)]
    assert sample.fg_idxs.tolist() == [1] and sample.bg_idxs.tolist() == [3]
