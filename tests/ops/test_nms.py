"""NMS against a plain loop and torchvision."""

import pytest
import torch

from detlib.ops import batched_nms, nms
from tests.builders import random_boxes, random_scores, slow_iou


def slow_nms(boxes, scores, threshold, idxs=None):
    """Compute NMS in Python floats: greedy, in descending score order."""
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    categories = [0] * len(boxes) if idxs is None else idxs.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(categories[i] != categories[k] or slow_iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def boxes_and_scores(count, seed=0, dtype=torch.float32):
    boxes = random_boxes(count, (140, 140), min_side=0, max_side=40, seed=seed, dtype=dtype)
    return boxes, random_scores(count, seed, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_matches_the_greedy_definition(dtype, threshold):
    boxes, scores = boxes_and_scores(150, dtype=dtype)
    assert nms(boxes, scores, threshold).tolist() == slow_nms(boxes, scores, threshold)


@pytest.mark.parametrize("count", [1, 17, 1500])
def test_nms_matches_torchvision(count):
    torchvision = pytest.importorskip("torchvision")
    boxes, scores = boxes_and_scores(count, seed=count)
    for threshold in (0.3, 0.5, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_batched_nms_does_not_suppress_across_categories(dtype):
    boxes, scores = boxes_and_scores(300, seed=3, dtype=dtype)
    idxs = torch.arange(300) % 5 - 2
    assert batched_nms(boxes, scores, idxs, 0.3).tolist() == slow_nms(boxes, scores, 0.3, idxs)


def test_category_values_may_be_large_negative_or_float():
    boxes, scores = boxes_and_scores(300, seed=4)
    idxs = torch.arange(300) % 7
    expected = slow_nms(boxes, scores, 0.4, idxs)
    for other in (idxs * 10**15 - 5, idxs.to(torch.uint8), idxs.float()):
        assert batched_nms(boxes, scores, other, 0.4).tolist() == expected
    assert batched_nms(boxes, scores, idxs > 3, 0.4).tolist() == slow_nms(boxes, scores, 0.4, idxs > 3)


def test_many_categories_keep_coordinate_precision():
    """Shifting categories apart would round these boxes, whose IoU is barely above 0.7."""
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 7.001]])
    boxes, idxs = box.repeat(20000, 1) + 1000, torch.arange(20000).repeat_interleave(2)
    scores = torch.arange(40000, 0, -1).float()
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.7), torch.arange(0, 40000, 2))


def test_equal_scores_keep_input_order_and_threshold_is_exclusive():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [5, 5, 6, 6], [0, 0, 2, 2]])
    scores = torch.ones(4)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1, 2]  # the IoU of 0 and 1 is 0.5
    assert nms(boxes, scores, 0.49).tolist() == [0, 2]


def test_boxes_without_area_overlap_nothing():
    boxes = torch.tensor([[1.0, 1, 1, 4], [1, 1, 1, 4], [0, 0, 3, 3]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.0).tolist() == [0, 1, 2]


def test_noncontiguous_inputs_and_mixed_dtypes():
    boxes, scores = boxes_and_scores(120, seed=5)
    expected = nms(boxes, scores, 0.5)
    assert torch.equal(nms(boxes.T.contiguous().T, scores.repeat_interleave(2)[::2], 0.5), expected)
    assert torch.equal(nms(boxes, scores.double(), 0.5), expected)


def test_no_boxes_give_no_indices():
    kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64
    assert batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (
        0,
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must have shape \(N, 4\), got \(3, 5\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes must be floating point, got torch.int64"),
        ({"scores": torch.zeros(2)}, "scores must have one entry per entry of boxes, got 2 and 3"),
        ({"scores": torch.zeros(3, 1)}, r"scores must have shape \(N,\), got \(3, 1\)"),
        ({"scores": torch.zeros(3, device="meta")}, "scores is on meta, but boxes is on cpu"),
        ({"idxs": torch.zeros(4)}, "idxs must have one entry per entry of boxes, got 4 and 3"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "idxs": torch.zeros(3),
        "iou_threshold": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        batched_nms(**(arguments | change))
