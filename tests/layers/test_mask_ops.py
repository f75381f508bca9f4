"""Pasting of masks into images against a slow formula and detectron2."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detlib.layers import paste_masks_in_image
from detlib.structures import Boxes
from tests.builders import random_boxes


def slow_paste(mask, box, height, width):
    """Sample a mask bilinearly at pixel centers, zero outside, in plain Python."""
    size = len(mask)
    x0, y0, x1, y1 = box
    image = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            v = (i + 0.5 - y0) / (y1 - y0) * size - 0.5
            u = (j + 0.5 - x0) / (x1 - x0) * size - 0.5
            top, left = math.floor(v), math.floor(u)
            for row in (top, top + 1):
                for column in (left, left + 1):
                    if 0 <= row < size and 0 <= column < size:
                        image[i, j] += (1 - abs(v - row)) * (1 - abs(u - column)) * mask[row][column]
    return image


def make_case():
    masks = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(4, (24, 30), min_side=4, seed=5)
    boxes[1] = torch.tensor([-6.0, -3.5, 20.0, 12.0])
    boxes[2] = torch.tensor([20.0, 15.0, 50.0, 40.0])
    return masks, boxes


def test_paste_matches_slow_formula():
    masks, boxes = make_case()
    pasted = paste_masks_in_image(masks, boxes, (24, 30), threshold=0.5)
    soft = paste_masks_in_image(masks, boxes, (24, 30), threshold=-1)
    assert pasted.shape == (4, 24, 30) and pasted.dtype == torch.bool and soft.dtype == torch.uint8
    for i in range(4):
        expected = slow_paste(masks[i].double().tolist(), boxes[i].double().tolist(), 24, 30)
        decided = (expected - 0.5).abs() > 1e-5
        assert torch.equal(pasted[i][decided], (expected >= 0.5)[decided])
        assert (soft[i].double() - expected * 255).abs().max() <= 1 + 1e-3
    assert pasted.any()


def test_paste_matches_detectron2():
    case = np.load(Path(__file__).with_name("paste_masks.npz"))
    masks, boxes = torch.tensor(case["masks"]), torch.tensor(case["boxes"])
    pasted = paste_masks_in_image(masks, boxes, case["pasted"].shape[1:])
    assert np.array_equal(pasted.numpy(), case["pasted"]) and pasted.any()


def test_accepts_boxes_object_threshold_and_half_precision():
    masks, boxes = make_case()
    at_half = paste_masks_in_image(masks, Boxes(boxes), (24, 30), 0.5)
    assert torch.equal(at_half, paste_masks_in_image(masks, boxes, (24, 30)))
    assert paste_masks_in_image(masks, boxes, (24, 30), 0.7).sum() < at_half.sum()
    half = paste_masks_in_image(masks.half(), boxes, (24, 30))
    assert (half != at_half).float().mean() < 0.01
    filled = paste_masks_in_image(masks >= 0, boxes.round().int(), (24, 30))
    assert torch.equal(filled, paste_masks_in_image(torch.ones_like(masks), boxes.round(), (24, 30)))


def test_boxes_outside_without_area_and_no_masks():
    masks = torch.ones(3, 5, 5)
    boxes = torch.tensor([[100.0, 100.0, 120.0, 120.0], [-30.0, -30.0, -20.0, -20.0], [5.0, 5.0, 5.0, 9.0]])
    assert not paste_masks_in_image(masks, boxes, (24, 30)).any()
    assert paste_masks_in_image(masks[:0], boxes[:0], (24, 30)).shape == (0, 24, 30)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(N, M, M\), got \(2, 3, 4\)"):
        paste_masks_in_image(torch.zeros(2, 3, 4), torch.zeros(2, 4), (5, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), got \(3, 4\)"):
        paste_masks_in_image(torch.zeros(2, 3, 3), torch.zeros(3, 4), (5, 5))
    with pytest.raises(ValueError, match="finite"):
        paste_masks_in_image(torch.zeros(1, 3, 3), torch.tensor([[0, 0, math.nan, 1]]), (5, 5))


def test_paste_can_be_exported():
    class Paste(torch.nn.Module):
        def forward(self, masks, boxes):
            return paste_masks_in_image(masks, boxes, (24, 30))

    masks, boxes = make_case()
    exported = torch.export.export(Paste(), (masks, boxes)).module()
    assert torch.equal(exported(masks, boxes), paste_masks_in_image(masks, boxes, (24, 30)))
