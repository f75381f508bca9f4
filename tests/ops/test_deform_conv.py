"""Deformable convolution against its definition, tap by tap, and torch's convolution."""

import math

import pytest
import torch
from torch.nn import functional as F

from detlib.ops import deform_conv, deform_conv2d
from detlib.ops.deform_conv import reference_deform_conv2d

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# Kernel, stride, padding and dilation as (y, x), groups, deformable groups.
SETTINGS = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((2, 3), (2, 1), (1, 2), (1, 2), 2, 3),
    ((1, 2), (1, 3), (0, 1), (2, 1), 3, 2),
]


def random(*size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def arguments(kernel, stride, padding, dilation, groups, offset_groups, modulated=True, num_images=2):
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip((6, 7), kernel, stride, padding, dilation)
    ]
    taps = kernel[0] * kernel[1]
    return {
        "input": random(num_images, 6, 6, 7),
        "offset": random(num_images, 2 * offset_groups * taps, *size, seed=1) * 5,
        "weight": random(12, 6 // groups, *kernel, seed=2),
        "bias": random(12, seed=3),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": random(num_images, offset_groups * taps, *size, seed=4) + 0.5 if modulated else None,
    }


def slow_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask):
    """Compute the definition, tap by tap."""
    (num_images, channels, height, width), (num_outputs, group_channels, kh, kw) = input.shape, weight.shape
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    offset = offset.unflatten(1, (offset_groups, kh, kw, 2))
    output = torch.zeros(num_images, num_outputs, *offset.shape[-2:], dtype=input.dtype)
    for n, o, y, x in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        total = bias[o].item()
        for c, i, j in torch.cartesian_prod(*map(torch.arange, weight.shape[1:])).tolist():
            channel = o // (num_outputs // groups) * group_channels + c
            group = channel // (channels // offset_groups)
            dy, dx = offset[n, group, i, j, :, y, x].tolist()
            factor = 1 if mask is None else mask.unflatten(1, (offset_groups, kh, kw))[n, group, i, j, y, x]
            row = y * stride[0] - padding[0] + i * dilation[0] + dy
            column = x * stride[1] - padding[1] + j * dilation[1] + dx
            for r in (math.floor(row), math.floor(row) + 1):
                for k in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < height and 0 <= k < width:
                        weight_of_cell = (1 - abs(row - r)) * (1 - abs(column - k)) * factor
                        total += weight_of_cell * input[n, channel, r, k] * weight[o, c, i, j]
        output[n, o, y, x] = total
    return output


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_values_match_the_definition(setting, modulated):
    given = arguments(*setting, modulated, num_images=1)
    expected = slow_deform_conv2d(**given)
    torch.testing.assert_close(deform_conv2d(**given), expected)
    torch.testing.assert_close(reference_deform_conv2d(**given), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_zero_offsets_give_a_convolution(setting):
    given = arguments(*setting)
    given["offset"].zero_()
    given["mask"].fill_(1)
    expected = F.conv2d(given["input"], given["weight"], given["bias"], *setting[1:4], groups=setting[4])
    torch.testing.assert_close(deform_conv2d(**given), expected)


def test_scalar_arguments_mean_pairs():
    given = arguments((2, 2), (2, 2), (1, 1), (2, 2), 1, 1)
    expected = deform_conv2d(**given)
    assert torch.equal(deform_conv2d(**given | {"stride": 2, "padding": 1, "dilation": 2}), expected)


def gradients(function, given):
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    output = function(**given | leaves)
    grad = random(*output.shape, seed=9).to(output.dtype)
    return dict(zip(names, torch.autograd.grad(output, list(leaves.values()), grad)))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_of_kernel_and_formula_agree(setting, modulated):
    given = arguments(*setting, modulated)
    for (name, ours), theirs in zip(
        gradients(deform_conv2d, given).items(), gradients(reference_deform_conv2d, given).values()
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    sizes = ((1, 2, 2, 3), (1, 4, 2, 2), (2, 1, 1, 2), (2,), (1, 2, 2, 2))
    leaves = [random(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    for function in (deform_conv2d, reference_deform_conv2d):
        assert torch.autograd.gradcheck(
            lambda *t, function=function: function(*t[:4], (1, 1), (0, 0), (1, 1), t[4]), leaves
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_keeps_dtype_and_layout(dtype):
    given = arguments(*SETTINGS[1])
    tensors = {name: value.to(dtype) for name, value in given.items() if isinstance(value, torch.Tensor)}
    exact = given | {name: value.double() for name, value in tensors.items()}
    expected, expected_grads = deform_conv2d(**exact), gradients(deform_conv2d, exact)
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors["input"] = tensors["input"].to(memory_format=layout)
        got = deform_conv2d(**given | tensors)
        assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
        for name, grad in gradients(deform_conv2d, given | tensors).items():
            assert grad.dtype == dtype
            torch.testing.assert_close(
                grad.double(), expected_grads[name], atol=3 * tolerance, rtol=3 * tolerance
            )


def test_autocast_keeps_dtype_and_precision():
    given = arguments(*SETTINGS[1])
    tensors = {name: value.float() for name, value in given.items() if isinstance(value, torch.Tensor)}
    plain = deform_conv2d(**given | tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(deform_conv2d(**given | tensors), plain)
        mixed = deform_conv2d(**given | tensors | {"input": tensors["input"].bfloat16()})
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), plain, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("modulated", [False, True])
def test_empty_batch_has_gradients(modulated):
    given = arguments(*SETTINGS[1], modulated, num_images=0)
    output = deform_conv2d(**given)
    assert output.shape == (0, 12, *given["offset"].shape[2:])
    grads = gradients(deform_conv2d, given)
    assert torch.equal(grads["weight"], torch.zeros_like(given["weight"]))
    assert grads["input"].shape == given["input"].shape and grads["offset"].shape == given["offset"].shape


@pytest.mark.parametrize("setting", SETTINGS)
def test_reference_replaces_missing_torchvision(setting, monkeypatch):
    given = arguments(*setting)
    expected = deform_conv2d(**given)
    monkeypatch.setattr("detlib.ops.deform_conv.torchvision_ops", lambda: (None, "broken"))
    torch.testing.assert_close(deform_conv2d(**given), expected)


def test_can_be_exported():
    given = arguments(*SETTINGS[0])

    class Convolve(torch.nn.Module):
        def forward(self, input, offset, mask):
            return deform_conv2d(**given | {"input": input, "offset": offset, "mask": mask})

    tensors = given["input"], given["offset"], given["mask"]
    exported = torch.export.export(Convolve(), tensors).module()
    torch.testing.assert_close(exported(*tensors), deform_conv2d(**given))


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("input", lambda t: t[0], r"input must have shape \(N, C, H, W\), got \(6, 6, 7\)"),
        ("input", lambda t: t.long(), "input must be floating point, got torch.int64"),
        ("input", lambda t: t[:, :, :1], r"input of \(1, 7\) is too small for a kernel of \(3, 3\)"),
        ("offset", lambda t: t[:, 1:], r"offset must have 2 \* G \* kH \* kW = 18 \* G channels, .* got 17"),
        ("offset", lambda t: t[..., 1:], r"offset must have shape \(2, 18, 4, 5\), got \(2, 18, 4, 4\)"),
        ("offset", lambda t: t.to("meta"), "offset is on meta, but input is on cpu"),
        ("weight", lambda t: t[:, :4], "weight must have shape .* for the 6 channels of input .* got"),
        ("weight", lambda t: t[0], "weight must have shape"),
        ("bias", lambda t: t[1:], r"bias must have shape \(12,\), got \(11,\)"),
        ("mask", lambda t: t[:, 1:], r"mask must have shape \(2, 9, 4, 5\), got \(2, 8, 4, 5\)"),
        ("stride", lambda t: 0, "stride must be from 1 to 1048576, got 0"),
        ("padding", lambda t: (0, -1), r"padding must be from 0 to 1048576, got \(0, -1\)"),
        ("dilation", lambda t: (1, 1, 1), r"dilation must be an int or a pair of ints, got \(1, 1, 1\)"),
    ],
)
def test_wrong_arguments_are_named(name, change, message):
    given = arguments((3, 3), (1, 1), (0, 0), (1, 1), 1, 1)
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**given | {name: change(given[name])})


def test_torchvision_kernel_is_used_if_available(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    given, calls = arguments(*SETTINGS[0]), []
    kernel = torchvision.ops.deform_conv2d
    monkeypatch.setattr(torchvision.ops, "deform_conv2d", lambda *a: calls.append(a) or kernel(*a))
    deform_conv2d(**given)
    assert len(calls) == 1
    deform_conv2d(**arguments(*SETTINGS[0], num_images=0))
    assert len(calls) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e9, -3e9, 1e30, 2.0**31, -(2.0**31)])
@pytest.mark.parametrize("channels", [slice(0, None, 2), slice(1, None, 2), slice(3, 4), slice(None)])
def test_offsets_that_are_huge_or_not_finite_give_the_values_of_the_formula(value, channels):
    given = arguments(*SETTINGS[0])
    given["offset"][:, channels, 1:3] = value
    given["input"].requires_grad_()
    output = deform_conv2d(**given)
    torch.testing.assert_close(output, reference_deform_conv2d(**given), equal_nan=True)
    assert output[:, :, 1:3].isnan().all() == (not math.isfinite(value))
    assert not output[:, :, 0].isnan().any()
    output.nan_to_num().sum().backward()
    assert given["input"].grad.isfinite().all()


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**20 + 1, 2**31, 2**32, 10**30])
def test_huge_scalar_arguments_fail(name, value):
    given = arguments(*SETTINGS[0])
    with pytest.raises(ValueError, match=f"{name} must be from . to 1048576"):
        deform_conv2d(**given | {name: value})


def test_large_padding_and_dilation_are_exact():
    size = 2**20
    given = arguments(*SETTINGS[0])
    given |= {"padding": size, "dilation": size, "offset": torch.zeros(2, 18, 6, 7, dtype=torch.float64)}
    given["mask"] = torch.ones(2, 9, 6, 7, dtype=torch.float64)
    # Only the middle tap reads inside of the input.
    middle = F.conv2d(given["input"], given["weight"][:, :, 1:2, 1:2], given["bias"])
    torch.testing.assert_close(deform_conv2d(**given), middle)


@pytest.mark.parametrize("limit", [1, 3000])
@pytest.mark.parametrize("setting", SETTINGS)
def test_too_many_samples_for_the_kernel_are_computed_in_parts(monkeypatch, setting, limit):
    given = arguments(*setting)
    expected = deform_conv2d(**given)
    monkeypatch.setattr(deform_conv, "_MAX_INDEX", limit)
    monkeypatch.setattr(deform_conv, "_MAX_SAMPLES", limit)
    torch.testing.assert_close(deform_conv2d(**given), expected)
