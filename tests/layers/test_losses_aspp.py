"""IoU losses and ASPP against slow formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import ASPP, ciou_loss, diou_loss
from tests.builders import random_boxes


def slow_iou_losses(a, b, eps=1e-7):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    iou = inter / (union + eps)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2 + eps
    distance = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diou = 1 - iou + distance / diagonal
    angle = math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))
    v = 4 / math.pi**2 * angle**2
    return diou, diou + v * v / (1 - iou + v + eps)


def test_iou_losses_against_slow_formulas():
    a, b = random_boxes(8, seed=1).double(), random_boxes(8, seed=2).double()
    b[0] = a[0]
    slow = torch.tensor([slow_iou_losses(x, y) for x, y in zip(a.tolist(), b.tolist())])
    torch.testing.assert_close(diou_loss(a, b), slow[:, 0], check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ciou_loss(a, b), slow[:, 1], check_dtype=False, rtol=1e-5, atol=1e-6)
    for loss in (diou_loss, ciou_loss):
        values = loss(a, b)
        torch.testing.assert_close(loss(a, b, reduction="mean"), values.mean())
        torch.testing.assert_close(loss(a, b, reduction="sum"), values.sum())
        assert loss(a[:0], b[:0], reduction="mean").item() == 0
        assert loss(a[:0], b[:0]).shape == (0,)


class TestASPP:
    def test_global_pooling_matches_the_formula(self):
        torch.manual_seed(0)
        layer = ASPP(4, 6, [2, 3, 4], norm="", activation=F.relu).eval()
        x = torch.randn(2, 4, 8, 10)
        branches = [F.relu(F.conv2d(x, layer.convs[0].weight, layer.convs[0].bias))]
        for conv, dilation in zip(layer.convs[1:4], [2, 3, 4]):
            branches.append(F.relu(F.conv2d(x, conv.weight, conv.bias, padding=dilation, dilation=dilation)))
        pooled = F.conv2d(x.mean((2, 3), keepdim=True), layer.convs[4][1].weight, layer.convs[4][1].bias)
        branches.append(F.relu(pooled).expand(2, 6, 8, 10))
        expected = F.relu(F.conv2d(torch.cat(branches, 1), layer.project.weight, layer.project.bias))
        torch.testing.assert_close(layer(x), expected)

    def test_parameter_names_and_biases(self):
        layer = ASPP(4, 32, [2, 3, 4], norm="GN", activation=nn.ReLU())
        names = set(layer.state_dict())
        assert {"convs.0.weight", "convs.0.norm.weight", "convs.4.1.bias", "project.norm.bias"} <= names
        assert not {"convs.0.bias", "convs.4.1.norm.weight", "project.bias"} & names
        windowed = ASPP(4, 32, [2, 3, 4], norm="GN", activation=nn.ReLU(), pool_kernel_size=(4, 5))
        assert "convs.4.1.norm.weight" in windowed.state_dict()
        assert "convs.4.1.bias" not in windowed.state_dict()
        assert windowed(torch.randn(1, 4, 8, 10)).shape == (1, 32, 8, 10)
        with pytest.raises(ValueError, match=r"\(4, 5\) must divide the size \(9, 10\)"):
            windowed(torch.randn(1, 4, 9, 10))

    def test_depthwise_branches_and_dropout(self):
        torch.manual_seed(0)
        layer = ASPP(
            32, 32, [2, 3, 4], norm="GN", activation=F.relu, dropout=0.5, use_depthwise_separable_conv=True
        )
        assert "convs.1.depthwise.weight" in layer.state_dict()
        x = torch.randn(1, 32, 8, 8)
        assert torch.equal(layer.eval()(x), layer(x))
        assert (layer.train()(x) == 0).float().mean() > (layer.eval()(x) == 0).float().mean() + 0.1
