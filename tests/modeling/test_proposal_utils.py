"""Selection of proposals and appending of ground truth, compared with slow formulas."""

import math

import pytest
import torch
import torchvision

from detlib.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    add_ground_truth_to_proposals_single_image,
    find_top_rpn_proposals,
)
from detlib.structures import Boxes, Instances
from tests.builders import make_proposals, random_boxes

SIZES = [(60, 64), (48, 50)]


def slow_proposals(boxes, scores, sizes, thresh, pre, post, min_size):
    """Compute `find_top_rpn_proposals` one box at a time, with torchvision's NMS."""
    out = []
    for i, (height, width) in enumerate(sizes):
        rows = []
        for level, (b, s) in enumerate(zip(boxes, scores)):
            order = sorted(range(b.shape[1]), key=lambda j: -s[i, j].item())[:pre]  # noqa: B023
            for j in order:
                x0, y0, x1, y1 = b[i, j].tolist()
                x0, x1 = (min(max(v, 0), width) for v in (x0, x1))
                y0, y1 = (min(max(v, 0), height) for v in (y0, y1))
                if x1 - x0 > min_size and y1 - y0 > min_size:
                    rows.append([x0, y0, x1, y1, s[i, j].item(), level])
        rows = torch.tensor(rows)
        keep = torchvision.ops.batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], thresh)[:post]
        out.append((rows[keep, :4], rows[keep, 4]))
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pre, post, min_size", [(30, 1000, 0.0), (1000, 20, 0.0), (25, 15, 12.0)])
def test_top_proposals_equal_a_slow_selection(training, pre, post, min_size):
    g = torch.Generator().manual_seed(0)
    boxes = [
        (random_boxes(2 * 60, (90, 90), 0, 40, seed=1) - 10).reshape(2, 60, 4),
        (random_boxes(2 * 20, (90, 90), 0, 40, seed=2) - 10).reshape(2, 20, 4),
    ]
    scores = [torch.randn(2, 60, generator=g), torch.randn(2, 20, generator=g)]
    given = [b.clone() for b in boxes]
    got = find_top_rpn_proposals(boxes, scores, SIZES, 0.5, pre, post, min_size, training)
    assert all(torch.equal(a, b) for a, b in zip(boxes, given))
    for inst, size, (want_boxes, want_scores) in zip(
        got, SIZES, slow_proposals(boxes, scores, SIZES, 0.5, pre, post, min_size)
    ):
        assert inst.image_size == size and len(inst) > 5
        torch.testing.assert_close(inst.proposal_boxes.tensor, want_boxes)
        torch.testing.assert_close(inst.objectness_logits, want_scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["boxes", "scores"])
def test_non_finite_predictions_raise_in_training_and_are_dropped_otherwise(bad, where):
    boxes, scores = (
        [(random_boxes(2 * 10, (90, 90), 0, 40, seed=1) - 10).reshape(2, 10, 4)],
        [torch.arange(20.0).view(2, 10)],
    )
    if where == "boxes":
        boxes[0][1, 9, 2] = bad
    else:
        scores[0][1, 9] = bad
    args = (boxes, scores, SIZES, 0.9, 100, 100, 0.0)
    with pytest.raises(FloatingPointError, match=r"1 of 20 predicted.*images \[1\].*diverged"):
        find_top_rpn_proposals(*args, training=True)
    first, second = find_top_rpn_proposals(*args, training=False)
    assert len(first) > 0 and torch.isfinite(second.proposal_boxes.tensor).all()
    assert second.objectness_logits.max() == 18


def test_images_may_have_no_proposals_left():
    boxes, scores = [torch.full((1, 4, 4), 500.0)], [torch.zeros(1, 4)]
    (inst,) = find_top_rpn_proposals(boxes, scores, SIZES[:1], 0.7, 10, 10, 0.0, False)
    assert len(inst) == 0 and inst.proposal_boxes.tensor.shape == (0, 4)


def test_ground_truth_is_appended_to_the_proposals():
    proposals = make_proposals(random_boxes(3, (90, 90), 0, 40), (50, 60))
    proposals.objectness_logits = torch.arange(3.0)
    gt = Instances((50, 60))
    gt.gt_boxes, gt.gt_classes = Boxes(random_boxes(2, (90, 90), 0, 40, seed=1)), torch.tensor([1, 2])
    for added in (gt, gt.gt_boxes):
        (joined,) = add_ground_truth_to_proposals([added], [proposals])
        assert len(joined) == 5 and set(joined.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert torch.equal(joined.proposal_boxes.tensor[3:], gt.gt_boxes.tensor)
        assert torch.equal(joined.objectness_logits[:3], torch.arange(3.0))
        assert (joined.objectness_logits[3:].sigmoid() == 1).all() and joined.objectness_logits[3] > 20
    assert len(proposals) == 3
    assert len(add_ground_truth_to_proposals_single_image(gt[:0], proposals)) == 3


def test_ground_truth_without_a_field_of_the_proposals_raises():
    proposals = make_proposals(random_boxes(2, (90, 90), 0, 40), (50, 60))
    proposals.objectness_logits = torch.arange(2.0)
    proposals.keep_me = torch.tensor([1, 2])
    gt = Instances((50, 60))
    gt.gt_boxes = Boxes(random_boxes(1, (90, 90), 0, 40, seed=1))
    with pytest.raises(ValueError, match="'keep_me'"):
        add_ground_truth_to_proposals_single_image(gt, proposals)
    gt.keep_me = torch.tensor([3])
    assert add_ground_truth_to_proposals_single_image(gt, proposals).keep_me.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="1 images for proposals of 0"):
        add_ground_truth_to_proposals([gt], [])
