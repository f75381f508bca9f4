"""Functions of boxes as plain tensors, against torchvision."""

import pytest
import torch
from torchvision import ops as tv

from detlib.layers import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    inverse_sigmoid,
    masks_to_boxes,
)
from tests.builders import random_boxes


def test_box_format_conversions():
    boxes = random_boxes(5, (1, 1), min_side=0, seed=0, dtype=torch.float64)
    torch.testing.assert_close(box_xyxy_to_cxcywh(boxes), tv.box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(box_cxcywh_to_xyxy(boxes), tv.box_convert(boxes, "cxcywh", "xyxy"))
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)[None])[0], boxes)


def test_iou_and_giou_match_torchvision():
    a, b = (
        random_boxes(6, (1, 1), min_side=0, seed=1, dtype=torch.float64),
        random_boxes(4, (1, 1), min_side=0, seed=2, dtype=torch.float64),
    )
    iou, union = box_iou(a, b)
    torch.testing.assert_close(iou, tv.box_iou(a, b))
    area = tv.box_area(a)[:, None] + tv.box_area(b)
    torch.testing.assert_close(union, area / (1 + iou))
    torch.testing.assert_close(generalized_box_iou(a, b), tv.generalized_box_iou(a, b))


def test_boxes_without_area_have_finite_giou_and_gradient():
    point = torch.tensor([[0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    giou = generalized_box_iou(point, torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.2, 0.2]]))
    assert giou.isfinite().all() and giou[0, 1] < -0.5
    giou.sum().backward()
    assert point.grad.isfinite().all()


def test_masks_to_boxes_matches_torchvision():
    masks = torch.zeros(3, 6, 7, dtype=torch.bool)
    masks[0, 2:4, 1:6] = True
    masks[1, 5, 0] = True
    want = torch.tensor([[1.0, 2, 5, 3], [0, 5, 0, 5], [0, 0, 0, 0]])
    assert torch.equal(masks_to_boxes(masks), want)
    assert torch.equal(masks_to_boxes(masks[:2]), tv.masks_to_boxes(masks[:2]))
    assert masks_to_boxes(masks[:0]).shape == (0, 4)


def test_inverse_sigmoid_is_finite_at_0_and_1():
    x = torch.tensor([0.0, 1e-5, 0.2, 0.5, 0.9, 1.0, 1.5], dtype=torch.float64)
    found = inverse_sigmoid(x)
    torch.testing.assert_close(found[2:5], torch.logit(x[2:5]))
    assert found[:2].tolist() == pytest.approx([-6.9078] * 2, abs=1e-3)
    assert found[5:].tolist() == pytest.approx([6.9078] * 2, abs=1e-3)
    assert inverse_sigmoid(x, eps=1e-4)[0].item() == pytest.approx(-9.2103, abs=1e-3)
