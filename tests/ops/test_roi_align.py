"""RoIAlign against the definition, sample by sample, and torchvision."""

import math

import pytest
import torch

from detlib.ops import roi_align
from detlib.ops.roi_align import reference_roi_align, reference_roi_align_backward
from tests.ops.cases import DTYPES, TOLERANCE, bilinear, feature_map, rois


def slow_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned):
    """Compute the definition in double precision, sample by sample."""
    input, (bins_y, bins_x) = input.double(), output_size
    output = []
    shift = 0.5 if aligned else 0.0
    for image, *corners in boxes.double().tolist():
        x1, y1, x2, y2 = (corner * spatial_scale - shift for corner in corners)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        count_y = sampling_ratio if sampling_ratio > 0 else max(math.ceil(height / bins_y), 0)
        count_x = sampling_ratio if sampling_ratio > 0 else max(math.ceil(width / bins_x), 0)
        y = y1 + (torch.arange(bins_y * count_y, dtype=torch.float64) + 0.5) * height / max(
            bins_y * count_y, 1
        )
        x = x1 + (torch.arange(bins_x * count_x, dtype=torch.float64) + 0.5) * width / max(
            bins_x * count_x, 1
        )
        samples = bilinear(input[int(image)], *torch.meshgrid(y, x, indexing="ij"))
        bins = samples.reshape(input.shape[1], bins_y, count_y, bins_x, count_x).sum((2, 4))
        output.append(bins / max(count_y * count_x, 1))
    return torch.stack(output)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (14, 14), (1, 1), (9, 20)])
def test_values_match_the_definition(output_size, sampling_ratio, aligned):
    input, boxes = feature_map(torch.float64), rois(torch.float64)
    expected = slow_roi_align(input, boxes, output_size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(roi_align(input, boxes, output_size, 0.25, sampling_ratio, aligned), expected)
    reference = reference_roi_align(input, boxes, 0.25, *output_size, sampling_ratio, aligned)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_feature_maps_and_dtypes(dtype, width):
    """Feature maps that are narrow or end inside a vector use other paths of the kernel."""
    input, boxes = feature_map(dtype, (2, 5, 12, width)), rois()
    got = roi_align(input, boxes, (7, 7), 0.25, 0, True)
    assert got.dtype == dtype and got.is_contiguous()
    expected = slow_roi_align(input, boxes, (7, 7), 0.25, 0, True)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sampling_ratio,aligned,size", [(0, True, (7, 7)), (2, False, (14, 14)), (0, False, (3, 9))]
)
def test_backward_matches_the_gradient_of_the_definition(dtype, sampling_ratio, aligned, size):
    shape, boxes = (2, 3, 12, 17), rois()
    grad = torch.randn(len(boxes), 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    scalars = (0.25, *size, *shape, sampling_ratio, aligned)
    got = torch.ops.detlib.roi_align_backward(grad, boxes, *scalars)
    assert got.dtype == dtype
    input = feature_map(torch.float64).requires_grad_()
    pooled = slow_roi_align(input, boxes, size, 0.25, sampling_ratio, aligned)
    (expected,) = torch.autograd.grad(pooled, input, grad.double())
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    reference = reference_roi_align_backward(grad.double(), boxes.double(), *scalars)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_matches_torchvision_at_realistic_size(sampling_ratio):
    torchvision = pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 8, 50, 67, generator=generator, requires_grad=True)
    low = torch.rand(300, 2, generator=generator) * 200
    image = torch.randint(0, 2, (300, 1), generator=generator).float()
    boxes = torch.cat([image, low, low + 1 + torch.rand(300, 2, generator=generator) * 150], 1)
    ours = roi_align(input, boxes, 7, 0.25, sampling_ratio, True)
    theirs = torchvision.ops.roi_align(input, boxes, 7, 0.25, sampling_ratio, True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    grad = torch.randn(ours.shape, generator=generator)
    torch.testing.assert_close(
        *(torch.autograd.grad(output, input, grad)[0] for output in (ours, theirs)), atol=2e-5, rtol=1e-5
    )


def test_gradcheck_and_gradgradcheck():
    input = feature_map(torch.float64, (2, 1, 4, 9)).requires_grad_()
    boxes = rois(torch.float64)[:4]

    def pooled(input):
        return roi_align(input, boxes, (3, 2), 0.15, 0, True)

    assert torch.autograd.gradcheck(pooled, input)
    assert torch.autograd.gradgradcheck(pooled, input)


def test_noncontiguous_inputs_give_the_same_values():
    input, boxes = feature_map(), rois()
    expected = roi_align(input, boxes, 7, 0.25, 0, True)
    sliced = torch.stack([input, -input], 2)[:, :, 0]
    assert not sliced.is_contiguous()
    assert torch.equal(roi_align(sliced, boxes, 7, 0.25, 0, True), expected)
    wide = torch.cat([boxes, boxes], 1)[:, :5]
    assert torch.equal(roi_align(input, wide, 7, 0.25, 0, True), expected)
    scalars = (0.25, 7, 7, *input.shape, 0, True)
    grad = torch.randn(expected.shape)
    strided = torch.stack([grad, -grad], 2)[:, :, 0]
    backward = torch.ops.detlib.roi_align_backward
    assert torch.equal(backward(strided, boxes, *scalars), backward(grad, boxes, *scalars))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [2, 9, 37, 300])
@pytest.mark.parametrize("sampling_ratio,aligned,size", [(0, True, (7, 7)), (2, False, (3, 20))])
def test_channels_last_matches_contiguous(dtype, channels, sampling_ratio, aligned, size):
    """Channel counts fill vectors, leave a remainder, or need multiple blocks."""
    shape, boxes = (2, channels, 12, 17), rois()
    input = feature_map(dtype, shape).to(memory_format=torch.channels_last).requires_grad_()
    got = roi_align(input, boxes, size, 0.25, sampling_ratio, aligned)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    scalars = (0.25, *size, sampling_ratio, aligned)
    expected = reference_roi_align(input.detach().double().contiguous(), boxes, *scalars)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference_roi_align_backward(
        grad.double(), boxes, 0.25, *size, *shape, sampling_ratio, aligned
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        (got_grad,) = torch.autograd.grad(got, input, grad.to(memory_format=layout), retain_graph=True)
        assert got_grad.dtype == dtype and got_grad.is_contiguous(memory_format=torch.channels_last)
        tolerance = 4 * TOLERANCE[dtype]
        torch.testing.assert_close(got_grad.double(), expected, atol=tolerance, rtol=tolerance)


def test_gradient_has_the_layout_of_the_input():
    input, boxes = feature_map().requires_grad_(), rois()
    pooled = roi_align(input, boxes, 7, 0.25)
    grad = torch.randn(pooled.shape).to(memory_format=torch.channels_last)
    assert torch.autograd.grad(pooled, input, grad)[0].is_contiguous()


def test_channels_last_gradcheck_and_gradgradcheck():
    input = feature_map(torch.float64, (2, 2, 4, 5)).to(memory_format=torch.channels_last).requires_grad_()
    boxes = rois(torch.float64)[:4]

    def pooled(input):
        return roi_align(input, boxes, (3, 2), 0.15, 0, True)

    assert torch.autograd.gradcheck(pooled, input)
    assert torch.autograd.gradgradcheck(pooled, input)


def test_accepts_one_box_tensor_per_image_and_float32_boxes():
    input, boxes = feature_map(), rois()
    listed = [boxes[boxes[:, 0] == i][:, 1:] for i in range(2)]
    order = torch.cat([(boxes[:, 0] == i).nonzero().squeeze(1) for i in range(2)])
    assert torch.equal(roi_align(input, listed, 5, 0.25), roi_align(input, boxes[order], 5, 0.25))
    half = roi_align(input.half(), boxes + 0.01, 5, 0.25)
    assert torch.equal(half, roi_align(input.half().float(), boxes + 0.01, 5, 0.25).half())


def test_empty_inputs_are_accepted():
    assert roi_align(feature_map(), torch.zeros(0, 5), 7).shape == (0, 3, 7, 7)
    assert roi_align(torch.zeros(1, 0, 4, 4), torch.zeros(2, 5), 7).shape == (2, 0, 7, 7)
    assert torch.equal(roi_align(torch.zeros(1, 2, 0, 4), torch.ones(2, 5), 7), torch.zeros(2, 2, 7, 7))
    input = feature_map().requires_grad_()
    roi_align(input, torch.zeros(0, 5), 7).sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nonfinite_and_huge_boxes(layout):
    input, boxes = feature_map().to(memory_format=layout), rois()[:3]
    expected = roi_align(input, boxes, 7, 0.25, 0, True)
    boxes = torch.cat(
        [boxes, torch.tensor([[0, 1, 2, torch.nan, 4], [1, -torch.inf, 0, 5, 9], [0, -1e9, -1e9, 1e9, 1e9]])]
    )
    got = roi_align(input, boxes, 7, 0.25, 0, True)
    torch.testing.assert_close(got[:3], expected)
    assert got[3:5].isnan().all() and got[5].isfinite().all()
    scalars = (0.25, 7, 7, *input.shape, 0, True)
    backward = torch.ops.detlib.roi_align_backward
    without, with_others = backward(got[:3], boxes[:3], *scalars), backward(got.nan_to_num(), boxes, *scalars)
    torch.testing.assert_close(with_others[1], without[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backward_is_deterministic(layout):
    boxes = torch.cat([torch.zeros(200, 1), torch.rand(200, 4) * 40], 1)
    boxes[:, 3:] += boxes[:, 1:3]
    grad = torch.randn(200, 16, 7, 7).to(memory_format=layout)
    first, second = (
        torch.ops.detlib.roi_align_backward(grad, boxes, 0.5, 7, 7, 1, 16, 40, 40, 0, True) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"input": torch.zeros(3, 12, 17)}, r"input must have shape \(N, C, H, W\), got \(3, 12, 17\)"),
        (
            {"input": torch.zeros(2, 3, 12, 17, dtype=torch.int64)},
            "input must be floating point, got torch.int64",
        ),
        ({"boxes": torch.zeros(4, 4)}, r"boxes must have shape \(K, 5\), got \(4, 4\)"),
        ({"boxes": torch.zeros(4, 5, dtype=torch.int32)}, "boxes must be floating point, got torch.int32"),
        ({"boxes": torch.zeros(4, 5, device="meta")}, "boxes is on meta, but input is on cpu"),
        ({"boxes": [torch.zeros(1, 4)]}, "boxes must have one tensor per image, got 1 for 2 images"),
        ({"boxes": [torch.zeros(1, 4), torch.zeros(1, 5)]}, r"boxes\[1\] must have shape \(K, 4\)"),
        ({"output_size": (7, 7, 7)}, "output_size must be an int or a pair"),
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"input": feature_map(), "boxes": rois(), "output_size": 7} | change
    with pytest.raises(ValueError, match=message):
        roi_align(**arguments)


def test_wrong_image_index_is_named():
    boxes = torch.tensor([[2.0, 0, 0, 4, 4]])
    with pytest.raises(RuntimeError, match=r"boxes\[:, 0\] must be image indices in \[0, 2\)"):
        roi_align(feature_map(), boxes, 7)
    with pytest.raises(TypeError, match="input must be a tensor"):
        roi_align(feature_map().numpy(), boxes, 7)
