"""The deformable convolution modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import DeformConv, ModulatedDeformConv
from detlib.ops import deform_conv2d


def test_parameter_names_and_shapes():
    assert {n: tuple(p.shape) for n, p in DeformConv(4, 6, 3, groups=2).named_parameters()} == {
        "weight": (6, 2, 3, 3)
    }
    modulated = ModulatedDeformConv(4, 6, (1, 3))
    assert {n: tuple(p.shape) for n, p in modulated.named_parameters()} == {
        "weight": (6, 4, 1, 3),
        "bias": (6,),
    }
    assert torch.equal(modulated.bias, torch.zeros(6))
    bound = (6 / (4 * 3)) ** 0.5  # Kaiming initialization for ReLU
    assert 0.8 * bound < modulated.weight.abs().max() <= bound
    assert ModulatedDeformConv(4, 6, 3, bias=False).bias is None
    assert DeformConv(4, 6, 3, bias=True).bias.shape == (6,)


def test_values_with_norm_and_activation():
    torch.manual_seed(0)
    settings = {"stride": 2, "padding": (1, 2), "dilation": 2, "groups": 2}
    x, norm = torch.randn(2, 4, 9, 8), nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.weight)
    plain = DeformConv(4, 6, 3, deformable_groups=2, **settings)
    modulated = ModulatedDeformConv(4, 6, 3, deformable_groups=2, norm=norm, activation=F.relu, **settings)
    offset, mask = torch.randn(2, 36, 4, 4), torch.rand(2, 18, 4, 4)
    common = (2, (1, 2), 2)
    torch.testing.assert_close(plain(x, offset), deform_conv2d(x, offset, plain.weight, None, *common))
    expected = deform_conv2d(x, offset, modulated.weight, modulated.bias, *common, mask)
    torch.testing.assert_close(modulated(x, offset, mask), norm(expected).relu())
    zero = torch.zeros_like(offset)
    torch.testing.assert_close(plain(x, zero), F.conv2d(x, plain.weight, **settings))
    assert {name for name, _ in modulated.named_parameters()} == {
        "weight",
        "bias",
        "norm.weight",
        "norm.bias",
    }


def test_offsets_move_y_before_x():
    conv = DeformConv(1, 1, 1)
    nn.init.ones_(conv.weight)
    x = torch.arange(12.0).view(1, 1, 3, 4)
    offset = torch.zeros(1, 2, 3, 4)
    offset[:, 0] = 1
    down = conv(x, offset)
    assert torch.equal(down[0, 0, :2], x[0, 0, 1:]) and torch.equal(down[0, 0, 2], torch.zeros(4))


def test_empty_batch_has_gradients():
    conv = ModulatedDeformConv(4, 6, 3, padding=1)
    output = conv(torch.zeros(0, 4, 5, 5), torch.zeros(0, 18, 5, 5), torch.zeros(0, 9, 5, 5))
    assert output.shape == (0, 6, 5, 5)
    output.sum().backward()
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="groups must divide in_channels, got 3 and 4"):
        DeformConv(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match="groups must divide out_channels, got 4 and 6"):
        DeformConv(4, 6, 3, groups=4)
    with pytest.raises(ValueError, match="deformable_groups must divide in_channels, got 3 and 4"):
        ModulatedDeformConv(4, 6, 3, deformable_groups=3)
    x = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match="offset must have 2 .* = 18 channels, got 36"):
        DeformConv(4, 6, 3, padding=1)(x, torch.zeros(1, 36, 5, 5))
    modulated = ModulatedDeformConv(4, 6, 3, padding=1)
    with pytest.raises(ValueError, match="mask must have 1 .* = 9 channels, got 18"):
        modulated(x, torch.zeros(1, 18, 5, 5), torch.zeros(1, 18, 5, 5))
    with pytest.raises(ValueError, match="mask must be a tensor"):
        modulated(x, torch.zeros(1, 18, 5, 5), None)


def test_repr_names_the_settings():
    text = repr(ModulatedDeformConv(4, 6, 3, stride=2, deformable_groups=2))
    assert "kernel_size=(3, 3), stride=(2, 2)" in text and "deformable_groups=2, bias=True" in text
