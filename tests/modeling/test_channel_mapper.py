"""ChannelMapper: outputs compared with the formula, parameter names, shapes and errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import LazyCall, instantiate
from detlib.layers import ShapeSpec
from detlib.modeling import ChannelMapper

SHAPES = {"res3": ShapeSpec(channels=8), "res4": ShapeSpec(channels=12), "res5": ShapeSpec(channels=20)}


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"res3": (13, 17), "res4": (7, 9), "res5": (4, 5)}
    return {name: torch.randn(2, SHAPES[name].channels, *sizes[name], generator=g) for name in SHAPES}


def randomize(module):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return module


def conv_norm_relu(neck, x, name, stride, padding, dilation=1):
    """Compute the convolution `name` of the neck, its GroupNorm of 4 groups, and ReLU from the weights."""
    state = neck.state_dict()
    x = F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], stride, padding, dilation)
    grouped = x.reshape(len(x), 4, -1)
    mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
    x = ((grouped - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)
    scale, shift = (state[f"{name}.norm.{part}"].reshape(1, -1, 1, 1) for part in ("weight", "bias"))
    return (x * scale + shift).clamp(min=0)


@pytest.mark.parametrize("kernel_size, dilation", [(1, 1), (3, 1), (3, 2)])
def test_outputs_equal_the_formula(kernel_size, dilation):
    node = LazyCall(ChannelMapper)(
        input_shapes=SHAPES,
        in_features=["res3", "res4", "res5"],
        out_channels=16,
        kernel_size=kernel_size,
        dilation=dilation,
        norm_layer=LazyCall(nn.GroupNorm)(num_groups=4, num_channels=16),
        activation=LazyCall(nn.ReLU)(),
        num_outs=5,
    )
    neck, x = randomize(instantiate(node)), inputs()
    out = neck(x)
    assert [tuple(o.shape[2:]) for o in out] == [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]
    padding = dilation * (kernel_size // 2)
    want = [conv_norm_relu(neck, x[n], f"convs.{i}", 1, padding, dilation) for i, n in enumerate(SHAPES)]
    want.append(conv_norm_relu(neck, x["res5"], "extra_convs.0", 2, 1))
    want.append(conv_norm_relu(neck, want[-1], "extra_convs.1", 2, 1))
    for actual, expected in zip(out, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_state_dict_has_published_names_and_shapes():
    norm = nn.GroupNorm(4, 16)
    neck = ChannelMapper(SHAPES, ["res4", "res5"], 16, kernel_size=1, bias=False, norm_layer=norm, num_outs=4)
    shapes = {key: tuple(value.shape) for key, value in neck.state_dict().items()}
    norms = {"norm.weight": (16,), "norm.bias": (16,)}
    weights = {
        "convs.0": (16, 12, 1, 1),
        "convs.1": (16, 20, 1, 1),
        "extra_convs.0": (16, 20, 3, 3),
        "extra_convs.1": (16, 16, 3, 3),
    }
    want = {f"{name}.conv.weight": shape for name, shape in weights.items()}
    want |= {f"{name}.{key}": shape for name in weights for key, shape in norms.items()}
    assert shapes == want
    norms = {id(module) for module in neck.modules() if isinstance(module, nn.GroupNorm)}
    assert len(norms) == 4 and id(norm) not in norms  # every convolution has its own


def test_default_is_3x3_convolutions_without_extra_levels():
    neck = ChannelMapper(SHAPES, ["res3", "res4", "res5"], 16)
    assert len(neck.extra_convs) == 0 and neck.convs[0].conv.kernel_size == (3, 3)
    assert [tuple(o.shape[2:]) for o in neck(inputs())] == [(13, 17), (7, 9), (4, 5)]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"in_features.*'res6' is not among them.*Did you mean"):
        ChannelMapper(SHAPES, ["res3", "res6"], 16)
    with pytest.raises(ValueError, match="at least one"):
        ChannelMapper(SHAPES, [], 16)
    with pytest.raises(ValueError, match="number of channels of 'res3'"):
        ChannelMapper({"res3": ShapeSpec(stride=8)}, ["res3"], 16)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        ChannelMapper(SHAPES, ["res3"], 16, kernel_size=2)
    with pytest.raises(ValueError, match="num_outs is 2, but there are 3 in_features"):
        ChannelMapper(SHAPES, list(SHAPES), 16, num_outs=2)
    neck = ChannelMapper(SHAPES, ["res3", "res4"], 16)
    with pytest.raises(ValueError, match="the backbone gives .'res3'.: 'res4' is not among them"):
        neck({"res3": inputs()["res3"]})
