"""RoIAlign of rotated boxes against the definition, sample by sample, and detectron2."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detlib.ops import roi_align, roi_align_rotated
from detlib.ops.roi_align_rotated import reference_roi_align_rotated, reference_roi_align_rotated_backward
from tests.ops.cases import DTYPES, TOLERANCE, bilinear, feature_map, rotated_rois


def slow_roi_align_rotated(input, boxes, output_size, spatial_scale, sampling_ratio):
    """Compute the definition in double precision, sample by sample."""
    input, (bins_y, bins_x) = input.double(), output_size
    output = []
    for image, *numbers, angle in boxes.double().tolist():
        x, y, width, height = (number * spatial_scale for number in numbers)
        count_y = sampling_ratio if sampling_ratio > 0 else max(math.ceil(height / bins_y), 0)
        count_x = sampling_ratio if sampling_ratio > 0 else max(math.ceil(width / bins_x), 0)
        down = (torch.arange(bins_y * count_y, dtype=torch.float64) + 0.5) / max(bins_y * count_y, 1) - 0.5
        right = (torch.arange(bins_x * count_x, dtype=torch.float64) + 0.5) / max(bins_x * count_x, 1) - 0.5
        down, right = torch.meshgrid(down * height, right * width, indexing="ij")
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        sample_x, sample_y = x - 0.5 + right * cosine + down * sine, y - 0.5 - right * sine + down * cosine
        samples = bilinear(input[int(image)], sample_y, sample_x)
        bins = samples.reshape(input.shape[1], bins_y, count_y, bins_x, count_x).sum((2, 4))
        output.append(bins / max(count_y * count_x, 1))
    return torch.stack(output)


def test_values_match_detectron2():
    """Compare outputs and the gradients of their sum and sum of squares, at spatial scale 1/4."""
    with np.load(Path(__file__).with_name("rotated.npz")) as arrays:
        stored = {name: torch.from_numpy(arrays[name]) for name in arrays}
    for size, ratio, power, name in (((7, 5), 2, 1, "ra"), ((3, 4), 0, 2, "ra_adaptive")):
        input = stored["ra_input"].requires_grad_()
        output = roi_align_rotated(input, stored["ra_rois"], size, 0.25, ratio)
        torch.testing.assert_close(output, stored[f"{name}_output"], atol=2e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad((output**power).sum(), input)
        torch.testing.assert_close(grad, stored[f"{name}_grad"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("spatial_scale", [0.25, 0.4])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (14, 14), (1, 1), (9, 20)])
def test_values_match_the_definition(output_size, spatial_scale, sampling_ratio):
    input, boxes = feature_map(torch.float64), rotated_rois(torch.float64)
    scalars = (output_size, spatial_scale, sampling_ratio)
    expected = slow_roi_align_rotated(input, boxes, *scalars)
    torch.testing.assert_close(roi_align_rotated(input, boxes, *scalars), expected)
    reference = reference_roi_align_rotated(input, boxes, spatial_scale, *output_size, sampling_ratio)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("channels", [1, 3, 8, 67])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_counts_and_dtypes(dtype, channels):
    """The kernel processes channels in vectors, and pads the last one."""
    input, boxes = feature_map(dtype, (2, channels, 12, 17)), rotated_rois()
    got = roi_align_rotated(input, boxes, (7, 7), 0.25, 2)
    assert got.dtype == dtype and got.is_contiguous()
    expected = slow_roi_align_rotated(input, boxes, (7, 7), 0.25, 2)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling_ratio,size", [(0, (7, 7)), (2, (14, 14)), (0, (3, 9))])
def test_backward_matches_the_gradient_of_the_definition(dtype, sampling_ratio, size):
    shape, boxes = (2, 11, 12, 17), rotated_rois()
    grad = torch.randn(len(boxes), 11, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    scalars = (0.25, *size, *shape, sampling_ratio)
    got = torch.ops.detlib.roi_align_rotated_backward(grad, boxes, *scalars)
    assert got.dtype == dtype
    input = feature_map(torch.float64, shape).requires_grad_()
    pooled = slow_roi_align_rotated(input, boxes, size, 0.25, sampling_ratio)
    (expected,) = torch.autograd.grad(pooled, input, grad.double())
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, atol=max(tolerance, 1e-10), rtol=max(tolerance, 1e-10))
    reference = reference_roi_align_rotated_backward(grad.double(), boxes.double(), *scalars)
    torch.testing.assert_close(reference, expected)


def test_zero_angle_matches_roi_align():
    input = feature_map(torch.float64)
    boxes = torch.tensor([[0.0, 30, 20, 25, 15, 0], [1, 12, 9, 40, 30, 0]], dtype=torch.float64)
    half = boxes[:, 3:5] / 2
    axis_aligned = torch.cat([boxes[:, :1], boxes[:, 1:3] - half, boxes[:, 1:3] + half], 1)
    got, expected = (
        roi_align_rotated(input, boxes, (4, 5), 0.25, 0),
        roi_align(input, axis_aligned, (4, 5), 0.25, 0, True),
    )
    torch.testing.assert_close(got, expected)
    # A quarter turn counter-clockwise: the first row of bins is the left side of the feature map, bottom to
    # top.
    turned = boxes[:, [0, 1, 2, 4, 3, 5]] + torch.tensor([0, 0, 0, 0, 0, 90], dtype=torch.float64)
    torch.testing.assert_close(roi_align_rotated(input, turned, (5, 4), 0.25, 0), expected.rot90(-1, (2, 3)))


def test_gradcheck_and_gradgradcheck():
    input = feature_map(torch.float64, (2, 1, 4, 9)).requires_grad_()
    boxes = rotated_rois(torch.float64)[:4].requires_grad_()

    def pooled(input):
        return roi_align_rotated(input, boxes, (3, 2), 0.15, 0)

    assert torch.autograd.gradcheck(pooled, input)
    assert torch.autograd.gradgradcheck(pooled, input)


def test_noncontiguous_inputs_give_the_same_values():
    input, boxes = feature_map(size=(2, 16, 12, 17)), rotated_rois()
    expected = roi_align_rotated(input, boxes, 7, 0.25, 0)
    for other in (input.to(memory_format=torch.channels_last), torch.stack([input, -input], 2)[:, :, 0]):
        assert not other.is_contiguous()
        assert torch.equal(roi_align_rotated(other, boxes, 7, 0.25, 0), expected)
    odd = feature_map(size=(2, 3, 12, 17))
    assert torch.equal(
        roi_align_rotated(odd.to(memory_format=torch.channels_last), boxes, 7),
        roi_align_rotated(odd, boxes.repeat(1, 2)[:, :6], 7),
    )
    scalars = (0.25, 7, 7, *input.shape, 0)
    grad = torch.randn(expected.shape)
    strided = grad.to(memory_format=torch.channels_last)
    backward = torch.ops.detlib.roi_align_rotated_backward
    assert torch.equal(backward(strided, boxes, *scalars), backward(grad, boxes, *scalars))


def test_reduced_precision_keeps_float32_boxes():
    input, boxes = feature_map(), rotated_rois() + 0.01
    boxes[:, 0] = 0
    half = roi_align_rotated(input.half(), boxes, 5, 0.25)
    assert torch.equal(half, roi_align_rotated(input.half().float(), boxes, 5, 0.25).half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            roi_align_rotated(input, boxes, 5, 0.25), roi_align_rotated(input.clone(), boxes, 5, 0.25)
        )
        assert roi_align_rotated(input, boxes, 5, 0.25).dtype == torch.float32


def test_empty_inputs_are_accepted():
    assert roi_align_rotated(feature_map(), torch.zeros(0, 6), 7).shape == (0, 3, 7, 7)
    assert roi_align_rotated(torch.zeros(1, 0, 4, 4), torch.zeros(2, 6), 7).shape == (2, 0, 7, 7)
    assert torch.equal(
        roi_align_rotated(torch.zeros(1, 2, 0, 4), torch.ones(2, 6), 7), torch.zeros(2, 2, 7, 7)
    )
    input = feature_map().requires_grad_()
    roi_align_rotated(input, torch.zeros(0, 6), 7).sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_nonfinite_huge_and_inverted_boxes(sampling_ratio):
    input, boxes = feature_map(), rotated_rois()[:3]
    expected = roi_align_rotated(input, boxes, 7, 0.25, sampling_ratio)
    others = [
        [0, 1, 2, torch.nan, 4, 0], [1, -torch.inf, 0, 5, 9, 0], [0, 1, 1, 4, 4, torch.nan],
        [0, 20, 20, 1e6, 1e6, 30], [0, 20, 20, 1e9, 1e9, 30], [0, 1e9, 20, 30, 30, 30], [0, 20, 20, -8, 8, 0],
    ]  # fmt: skip
    boxes = torch.cat([boxes, torch.tensor(others)])
    got = roi_align_rotated(input, boxes, 7, 0.25, sampling_ratio)
    assert torch.equal(got[:3], expected)
    assert got[3:6].isnan().all() and got[6:].isfinite().all()
    reference = reference_roi_align_rotated(input, boxes, 0.25, 7, 7, sampling_ratio)
    torch.testing.assert_close(got, reference, equal_nan=True, atol=1e-5, rtol=1e-5)
    scalars = (0.25, 7, 7, *input.shape, sampling_ratio)
    backward = torch.ops.detlib.roi_align_rotated_backward
    grad = torch.randn(got.shape)
    torch.testing.assert_close(
        backward(grad[:6], boxes[:6], *scalars), backward(grad[:3], boxes[:3], *scalars)
    )


def test_huge_boxes_use_every_sample_on_the_map():
    input = feature_map(torch.float64)
    boxes = torch.tensor([[0.0, 30, 20, 1500, 900, 35], [1, -300, 200, 1100, 800, 130]], dtype=torch.float64)
    expected = slow_roi_align_rotated(input, boxes, (3, 4), 0.25, 0)
    assert expected.abs().max() > 0
    torch.testing.assert_close(roi_align_rotated(input, boxes, (3, 4), 0.25, 0), expected)


def test_backward_is_deterministic():
    boxes = torch.cat([torch.zeros(60, 1), torch.rand(60, 4) * 40, torch.rand(60, 1) * 360], 1)
    grad = torch.randn(60, 16, 7, 7)
    first, second = (
        torch.ops.detlib.roi_align_rotated_backward(grad, boxes, 0.5, 7, 7, 1, 16, 40, 40, 0)
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"input": torch.zeros(3, 12, 17)}, r"input must have shape \(N, C, H, W\), got \(3, 12, 17\)"),
        (
            {"input": torch.zeros(2, 3, 4, 5, dtype=torch.int64)},
            "input must be floating point, got torch.int64",
        ),
        ({"boxes": torch.zeros(4, 5)}, r"boxes must have shape \(K, 6\), got \(4, 5\)"),
        ({"boxes": torch.zeros(4, 6, dtype=torch.int32)}, "boxes must be floating point, got torch.int32"),
        ({"boxes": torch.zeros(4, 6, device="meta")}, "boxes is on meta, but input is on cpu"),
        ({"output_size": (7, 7, 7)}, "output_size must be an int or a pair"),
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"input": feature_map(), "boxes": rotated_rois(), "output_size": 7} | change
    with pytest.raises(ValueError, match=message):
        roi_align_rotated(**arguments)


def test_wrong_image_index_is_named():
    boxes = torch.tensor([[2.0, 0, 0, 4, 4, 0]])
    with pytest.raises(RuntimeError, match=r"boxes\[:, 0\] must be image indices in \[0, 2\)"):
        roi_align_rotated(feature_map(), boxes, 7)
    with pytest.raises(TypeError, match="input must be a tensor"):
        roi_align_rotated(feature_map().numpy(), boxes, 7)
