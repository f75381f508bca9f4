"""The CUDA kernels against the CPU ones."""

import pytest
import torch

from detlib.ops import (
    _library,
    batched_nms,
    encode_rle,
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
def test_nms(count, dtype):
    boxes, scores = boxes_and_scores(count, dtype)
    idxs = torch.arange(count) % 5
    for threshold in (0.3, 0.7):
        kept = nms(boxes.cuda(), scores.cuda(), threshold)
        assert torch.equal(kept.cpu(), nms(boxes, scores, threshold))
        kept = batched_nms(boxes.cuda(), scores.cuda(), idxs.cuda(), threshold)
        assert torch.equal(kept.cpu(), batched_nms(boxes, scores, idxs, threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampling_ratio,aligned,size", [(0, True, 7), (2, False, 14), (0, False, (3, 9))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align(dtype, sampling_ratio, aligned, size, layout):
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
        results.append((output.detach().cpu(), input.grad.cpu()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def test_other_stream_and_boxes_that_are_not_finite():
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


def test_deterministic_backward():
    maps = torch.rand(1, 3, 20, 20).cuda().requires_grad_()
    boxes = torch.nn.functional.pad(boxes_and_scores(300)[0] / 8, (1, 0)).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(roi_align(maps, boxes, 7).sum(), maps)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, -1.0])
def test_paste_masks(dtype, threshold):
    masks = torch.rand(70, 9, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = boxes_and_scores(70)[0] - 20
    boxes[5:7] = torch.tensor([[4.0, 3, 4, 9], [torch.nan, 0, 5, 5]])
    pasted = paste_masks(masks, boxes, (90, 301), threshold)
    on_gpu = masks.cuda(), boxes.cuda(), (90, 301), threshold
    assert paste_masks(*on_gpu).is_cuda and torch.equal(paste_masks(*on_gpu).cpu(), pasted)
    if threshold >= 0:
        assert paste_masks_to_rle(*on_gpu) == encode_rle(paste_masks(*on_gpu)) == encode_rle(pasted)
    assert paste_masks(masks[:0].cuda(), boxes[:0].cuda(), (9, 30)).shape == (0, 9, 30)
