"""NMS against a plain loop and torchvision."""

import pytest
import torch
import torchvision

from detlib.ops import batched_nms, nms


def slow_nms(boxes, scores, threshold, idxs=None):
    """The definition in Python floats: greedy, by falling score."""
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    categories = [0] * len(boxes) if idxs is None else idxs.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(categories[i] != categories[k] or iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def random_boxes(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    size = torch.rand(count, 2, generator=generator) * 40
    scores = torch.rand(count, generator=generator)
    return torch.cat([corner, corner + size], 1).to(dtype), scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_the_greedy_definition(dtype, threshold):
    boxes, scores = random_boxes(150, dtype=dtype)
    assert nms(boxes, scores, threshold).tolist() == slow_nms(boxes, scores, threshold)


@pytest.mark.parametrize("count", [1, 17, 1500])
def test_nms_equals_torchvision(count):
    boxes, scores = random_boxes(count, seed=count)
    for threshold in (0.3, 0.5, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_batched_nms_separates_categories(dtype):
    boxes, scores = random_boxes(300, seed=3, dtype=dtype)
    idxs = torch.arange(300) % 5 - 2
    assert batched_nms(boxes, scores, idxs, 0.3).tolist() == slow_nms(boxes, scores, 0.3, idxs)
