"""The focal loss, compared with its formula."""

import math

import pytest
import torch

from detlib.modeling.focal_loss import focal_loss_sum

K = 4


def example(seed=0, dtype=torch.float64):
    """Return (2, 6, 4) logits, and labels with foreground, background and ignored anchors."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, K, generator=g, dtype=torch.float64)
    labels = torch.tensor([[0, K, -1, 3, 2, K], [-1, 1, 1, K, 0, -1]])
    return logits.to(dtype), labels


def slow_loss(logits, labels, alpha, gamma):
    total = 0.0
    for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist()):
        for k, x in enumerate(row if label >= 0 else []):
            p = 1 / (1 + math.exp(-x))
            p = p if k == label else 1 - p
            weight = 1.0 if alpha < 0 else (alpha if k == label else 1 - alpha)
            total -= weight * (1 - p) ** gamma * math.log(p)
    return total


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (-1, 2.0), (0.25, 0.0), (0.0, 1.0)])
def test_value_and_gradient_equal_the_formula(alpha, gamma):
    logits, labels = example()
    assert focal_loss_sum(logits, labels, alpha, gamma).item() == pytest.approx(
        slow_loss(logits, labels, alpha, gamma), rel=1e-9
    )
    assert torch.autograd.gradcheck(
        lambda x: focal_loss_sum(x, labels, alpha, gamma), logits.requires_grad_(), atol=1e-6
    )


def test_gradient_is_multiplied_by_the_incoming_gradient():
    logits, labels = example()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    focal_loss_sum(a, labels).backward()
    (focal_loss_sum(b, labels) / 7).backward()
    torch.testing.assert_close(b.grad * 7, a.grad)
    assert not a.grad[labels < 0].any() and a.grad[labels >= 0].all()


def test_extreme_logits_give_finite_loss_and_gradient():
    logits = torch.tensor([[[500.0, -500.0, 500.0, -500.0]]], requires_grad=True)
    loss = focal_loss_sum(logits, torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 1000 + 0.25 * 500)
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([0.75, -0.25, 0.75, 0.0]))


def test_all_anchors_ignored_gives_zero_that_requires_grad():
    logits, labels = example()
    logits.requires_grad_()
    loss = focal_loss_sum(logits, torch.full_like(labels, -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    empty = torch.zeros(2, 0, K, requires_grad=True)
    assert focal_loss_sum(empty, torch.zeros(2, 0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = example(dtype=dtype)
    logits.requires_grad_()
    loss = focal_loss_sum(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert loss.item() == pytest.approx(slow_loss(logits.detach().double(), labels, 0.25, 2.0), rel=1e-5)


def test_arguments_are_not_changed():
    logits, labels = example()
    before = logits.clone(), labels.clone()
    focal_loss_sum(logits.requires_grad_(), labels).backward()
    assert torch.equal(logits.detach(), before[0]) and torch.equal(labels, before[1])


def test_mismatched_shapes_raise():
    with pytest.raises(ValueError, match=r"\(2, 6, 4\) need labels of the shape \(2, 6\), got \(2, 5\)"):
        focal_loss_sum(torch.zeros(2, 6, K), torch.zeros(2, 5, dtype=torch.int64))
