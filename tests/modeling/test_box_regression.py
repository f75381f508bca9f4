"""Box transforms and losses, compared with torchvision and with loops."""

import math

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

from detlib.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    box_regression_loss,
)
from tests.builders import random_boxes


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 5.0, 4.0, 2.0)])
def test_deltas_equal_torchvision(weights):
    src, dst = random_boxes(50, (305, 305), 5, 105, seed=1), random_boxes(50, (305, 305), 5, 105, seed=2)
    transform, coder = Box2BoxTransform(weights), BoxCoder(weights)
    deltas = transform.get_deltas(src, dst)
    torch.testing.assert_close(deltas, coder.encode_single(dst, src), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transform.apply_deltas(deltas, src), dst, rtol=1e-5, atol=1e-3)
    several = torch.randn(50, 12, generator=torch.Generator().manual_seed(3)) * 2
    want = coder.decode_single(several, src)
    torch.testing.assert_close(transform.apply_deltas(several, src), want, rtol=1e-5, atol=1e-3)


def test_large_size_deltas_are_clamped():
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = Box2BoxTransform((1, 1, 1, 1)).apply_deltas(torch.tensor([[0.0, 0.0, 50.0, 50.0]]), box)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492.0, 508.0, 508.0]]))
    grown = Box2BoxTransform((1, 1, 1, 1), scale_clamp=math.log(2)).apply_deltas(
        torch.tensor([[0.0, 0.0, 50.0, -100.0]]), box
    )
    torch.testing.assert_close(grown, torch.tensor([[-8.0, 8.0, 24.0, 8.0]]))


@pytest.mark.parametrize("transform", [Box2BoxTransform((1, 1, 1, 1)), Box2BoxTransformLinear()])
def test_half_precision_and_empty_boxes_are_decoded(transform):
    boxes = random_boxes(3, (305, 305), 5, 105)
    assert transform.apply_deltas(torch.zeros(3, 4, dtype=torch.half), boxes).dtype == torch.float32
    assert transform.apply_deltas(torch.zeros(3, 4, dtype=torch.double), boxes).dtype == torch.float64
    assert transform.apply_deltas(torch.zeros(0, 8), boxes[:0]).shape == (0, 8)
    assert transform.get_deltas(boxes[:0], boxes[:0]).shape == (0, 4)


def test_wrong_weights_and_source_boxes_raise():
    transform = Box2BoxTransform((1, 1, 1, 1))
    boxes = random_boxes(3, (305, 305), 5, 105)
    flat = boxes.clone()
    flat[1, 2] = flat[1, 0]
    with pytest.raises(ValueError, match=r"without area.*rows \[1\]"):
        transform.get_deltas(flat, boxes)
    with pytest.raises(TypeError, match="target_boxes must be a Tensor, got list"):
        transform.get_deltas(boxes, boxes.tolist())
    with pytest.raises(ValueError, match="four numbers"):
        Box2BoxTransform((1, 1))
    with pytest.raises(ValueError, match="'l2'.*'smooth_l1', 'giou', 'diou', 'ciou'"):
        box_regression_loss(transform, boxes, torch.zeros(3, 4), boxes, "l2")


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_deltas_equal_a_loop(normalize):
    transform = Box2BoxTransformLinear(normalize_by_size=normalize)
    src, dst = random_boxes(20, (305, 305), 5, 105, seed=1), random_boxes(20, (305, 305), 5, 105, seed=2)
    deltas = transform.get_deltas(src, dst)
    for s, t, d in zip(src.tolist(), dst.tolist(), deltas.tolist()):
        cx, cy, w, h = (s[0] + s[2]) / 2, (s[1] + s[3]) / 2, s[2] - s[0], s[3] - s[1]
        w, h = (w, h) if normalize else (1, 1)
        want = [(cx - t[0]) / w, (cy - t[1]) / h, (t[2] - cx) / w, (t[3] - cy) / h]
        assert d == pytest.approx(want, abs=1e-4)
    inside = torch.cat((src[:, :2] - 3, src[:, 2:] + 7), dim=1)
    back = transform.apply_deltas(transform.get_deltas(src, inside), src)
    torch.testing.assert_close(back, inside, rtol=1e-5, atol=1e-3)
    centers = (src[:, :2] + src[:, 2:]) / 2
    nothing = transform.apply_deltas(torch.full((20, 4), -1.0), src)
    torch.testing.assert_close(nothing, torch.cat((centers, centers), dim=1))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_smooth_l1_loss_equals_the_formula(beta):
    src, dst = random_boxes(30, (305, 305), 5, 105, seed=1), random_boxes(30, (305, 305), 5, 105, seed=2)
    transform = Box2BoxTransform((10, 10, 5, 5))
    pred = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    loss = box_regression_loss(transform, src, pred, dst, "smooth_l1", beta)
    diff = (pred - transform.get_deltas(src, dst)).abs()
    want = diff if beta == 0 else torch.where(diff < beta, diff**2 / (2 * beta), diff - beta / 2)
    torch.testing.assert_close(loss, want.sum())


@pytest.mark.parametrize(
    "name, reference",
    [
        ("giou", torchvision.ops.generalized_box_iou_loss),
        ("diou", torchvision.ops.distance_box_iou_loss),
        ("ciou", torchvision.ops.complete_box_iou_loss),
    ],
)
def test_iou_losses_equal_torchvision(name, reference):
    src, dst = random_boxes(30, (305, 305), 5, 105, seed=1), random_boxes(30, (305, 305), 5, 105, seed=2)
    transform = Box2BoxTransform((1, 1, 1, 1))
    pred = (0.3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = box_regression_loss(transform, src, pred, dst, name)
    want = reference(BoxCoder((1, 1, 1, 1)).decode_single(pred, src), dst, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    gradient, wanted = torch.autograd.grad(loss, pred)[0], torch.autograd.grad(want, pred)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou"])
def test_loss_without_boxes_is_zero_and_requires_grad(name):
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = box_regression_loss(Box2BoxTransform((1, 1, 1, 1)), pred.detach(), pred, pred.detach(), name)
    loss.backward()
    assert loss.item() == 0 and pred.grad.shape == (0, 4)
