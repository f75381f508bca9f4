"""CUDA kernels against CPU kernels."""

import pytest
import torch

from detlib.ops import (
    _library,
    batched_nms,
    deform_conv2d,
    encode_rle,
    frozen_batch_norm,
    ms_deform_attn,
    nms,
    paste_masks,
    paste_masks_to_rle,
    roi_align,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def native():
    if not _library.has_native_kernel("nms", "cuda"):
        pytest.skip("built without CUDA kernels")


def boxes_and_scores(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    low = torch.rand(count, 2, generator=generator) * 100
    size = 1 + torch.rand(count, 2, generator=generator) * 60
    return torch.cat([low, low + size], 1).to(dtype), torch.rand(count, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 5000])
def test_nms_matches_cpu(count, dtype):
    boxes, scores = boxes_and_scores(count, dtype)
    for threshold in (0.3, 0.7):
        kept = nms(boxes.cuda(), scores.cuda(), threshold)
        assert torch.equal(kept.cpu(), nms(boxes, scores, threshold))
        # One, few, or about as many categories as boxes; from 1024 boxes on they are grouped.
        for num_categories in (1, 5, 700):
            idxs = torch.arange(count) * 7919 % num_categories - 2
            kept = batched_nms(boxes.cuda(), scores.cuda(), idxs.cuda(), threshold)
            assert torch.equal(kept.cpu(), batched_nms(boxes, scores, idxs, threshold))


def test_nms_of_many_boxes_matches_cpu():
    boxes, scores = boxes_and_scores(40000)
    boxes *= 4
    idxs = torch.randint(80, (40000,), generator=torch.Generator().manual_seed(0))
    on_gpu = boxes.cuda(), scores.cuda()
    assert torch.equal(nms(*on_gpu, 0.5).cpu(), nms(boxes, scores, 0.5))
    assert torch.equal(batched_nms(*on_gpu, idxs.cuda(), 0.5).cpu(), batched_nms(boxes, scores, idxs, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampling_ratio,aligned,size", [(0, True, 7), (2, False, 14), (0, False, (3, 9))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align_matches_cpu(dtype, sampling_ratio, aligned, size, layout):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 5, 30, 41, generator=generator).to(dtype).to(memory_format=layout)
    boxes, _ = boxes_and_scores(200)
    boxes = torch.cat([torch.arange(200)[:, None] % 2, boxes - 20], 1)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 4e-2)
    results = []
    for device in ("cpu", "cuda"):
        input = maps.to(device).detach().requires_grad_()
        output = roi_align(input, boxes.to(device), size, 0.25, sampling_ratio, aligned)
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype).view(output.shape)
        output.backward(grad.to(device))
        assert output.is_contiguous(memory_format=layout) and input.grad.is_contiguous(memory_format=layout)
        results.append((output.detach().cpu(), input.grad.cpu()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [(2, 64, 50, 68), (1, 2048, 7, 5), (2, 5, 9, 7), (3, 24, 8, 8), (0, 4, 2, 2)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_frozen_batch_norm_matches_cpu(dtype, size, layout, with_residual, relu):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = torch.randn(3, *size, generator=generator).to(dtype)
    mean, weight, bias = torch.randn(3, size[1], generator=generator)
    var = torch.rand(size[1], generator=generator) + 0.1
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [
            t.to(device).contiguous(memory_format=layout).requires_grad_()
            for t in ([x, residual] if with_residual else [x])
        ]
        constants = [t.to(device) for t in (mean, var, weight, bias)]
        extra = inputs[1] if with_residual else None
        y = frozen_batch_norm(inputs[0], *constants, 1e-3, residual=extra, relu=relu)
        grads = torch.autograd.grad(y, inputs, grad.to(device))
        assert x.numel() == 0 or all(t.stride() == inputs[0].stride() for t in (y, *grads))
        results.append([t.detach().cpu() for t in (y, *grads)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def test_frozen_batch_norm_of_an_unaligned_feature_map():
    x = torch.randn(2 * 8 * 5 * 4 + 1).cuda()[1:].view(2, 8, 5, 4)
    constants = torch.rand(4, 8).cuda().unbind()
    torch.testing.assert_close(frozen_batch_norm(x, *constants), frozen_batch_norm(x.clone(), *constants))


def test_roi_align_on_another_stream_and_with_nonfinite_boxes():
    maps, boxes = (
        torch.rand(1, 3, 20, 20).cuda(),
        torch.tensor([[0, 1.0, 2, 9, 8], [0, torch.nan, 0, 1, 1]]).cuda(),
    )
    expected = roi_align(maps, boxes, 7)
    assert expected[0].isfinite().all() and expected[1].isnan().all()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        doubled = roi_align(maps * 2, boxes[:1], 7)
    stream.synchronize()
    torch.testing.assert_close(doubled, expected[:1] * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling_ratio,channels,size", [(0, 3, 7), (2, 19, (3, 9))])
def test_roi_align_deterministic_backward(dtype, layout, sampling_ratio, channels, size):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, channels, 37, 20, generator=generator).to(dtype).to(memory_format=layout)
    boxes = boxes_and_scores(300)[0] / 8 - 2
    boxes = torch.cat([torch.arange(300)[:, None] % 2, boxes], 1)

    def gradient(device):
        input = maps.to(device).detach().requires_grad_()
        output = roi_align(input, boxes.to(device), size, 1.0, sampling_ratio, True)
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype).view(output.shape)
        return torch.autograd.grad(output, input, grad.to(device))[0].cpu()

    torch.use_deterministic_algorithms(True)
    try:
        grads = [gradient("cuda") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 4e-2)
    torch.testing.assert_close(grads[0], gradient("cpu"), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, -1.0])
def test_paste_masks_matches_cpu(dtype, threshold):
    masks = torch.rand(70, 9, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = boxes_and_scores(70)[0] - 20
    boxes[5:7] = torch.tensor([[4.0, 3, 4, 9], [torch.nan, 0, 5, 5]])
    pasted = paste_masks(masks, boxes, (90, 301), threshold)
    on_gpu = masks.cuda(), boxes.cuda(), (90, 301), threshold
    assert paste_masks(*on_gpu).is_cuda and torch.equal(paste_masks(*on_gpu).cpu(), pasted)
    if threshold >= 0:
        assert paste_masks_to_rle(*on_gpu) == encode_rle(paste_masks(*on_gpu)) == encode_rle(pasted)
    assert paste_masks(masks[:0].cuda(), boxes[:0].cuda(), (9, 30)).shape == (0, 9, 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 16, 32, 40, 64])
def test_ms_deform_attn_matches_cpu(dtype, channels):
    generator = torch.Generator().manual_seed(0)
    spatial_shapes = torch.tensor([[9, 13], [5, 7], [0, 3], [1, 1]])
    cells = spatial_shapes.prod(1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(2, int(cells.sum()), 3, channels, generator=generator).to(dtype)
    locations = (torch.rand(2, 150, 3, 4, 4, 2, generator=generator) * 1.4 - 0.2).to(precise)
    weights = torch.rand(2, 150, 3, 4, 4, generator=generator).to(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 8e-2)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in (value, locations, weights)]
        shapes = spatial_shapes.to(device), (cells.cumsum(0) - cells).to(device)
        output = ms_deform_attn(leaves[0], *shapes, *leaves[1:])
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype).view(output.shape)
        output.backward(grad.to(device))
        results.append((output.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def attention_on_gpu():
    torch.manual_seed(0)
    value = torch.randn(1, 100, 2, 32).cuda().requires_grad_()
    locations, weights = torch.rand(1, 500, 2, 1, 4, 2).cuda(), torch.rand(1, 500, 2, 1, 4).cuda()
    return value, torch.tensor([[10, 10]]).cuda(), torch.tensor([0]).cuda(), locations, weights


def test_ms_deform_attn_deterministic_backward():
    value, *others = attention_on_gpu()
    expected = torch.autograd.grad(ms_deform_attn(value, *others).sum(), value)[0]
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(ms_deform_attn(value, *others).sum(), value)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    torch.testing.assert_close(grads[0], expected, atol=1e-3, rtol=1e-3)


def test_ms_deform_attn_does_not_read_levels_outside_the_values():
    value, spatial_shapes, starts, locations, weights = attention_on_gpu()
    for shape, start in (([1000, 1000], 0), ([10, 10], 1), ([10, 10], -5), ([-10, -10], 0)):
        spatial_shapes[0], starts[0] = torch.tensor(shape), start
        output = ms_deform_attn(value, spatial_shapes, starts, locations, weights)
        assert output.isnan().all()
        assert torch.equal(torch.autograd.grad(output.sum(), value)[0], torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deform_conv2d_matches_cpu(dtype, deterministic):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 6, 9, 11), (2, 36, 9, 11), (4, 3, 3, 3), (4,), (2, 18, 9, 11))
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 1e-1)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            output = deform_conv2d(*leaves[:4], 1, 1, 1, leaves[4])
            output.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([output.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)
