"""CUDA kernels of rotated boxes against CPU kernels."""

import pytest
import torch

from detlib.ops import _library, batched_nms_rotated, box_iou_rotated, nms_rotated, roi_align_rotated
from tests.ops.cases import DTYPES, rotated_boxes_and_scores, rotated_rois

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def native():
    if not _library.has_native_kernel("box_iou_rotated", "cuda"):
        pytest.skip("built without CUDA kernels")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 63, 300])
def test_iou_matches_cpu(dtype, count):
    boxes, _ = rotated_boxes_and_scores(count, dtype=dtype)
    boxes[::7, 2] = 0
    boxes[3::11, 0] = torch.nan
    got, expected = box_iou_rotated(boxes.cuda(), boxes[:50].cuda()), box_iou_rotated(boxes, boxes[:50])
    assert got.dtype == expected.dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(got.cpu(), expected, atol=tolerance, rtol=1e-6)
    assert torch.equal(got.cpu() > 0, expected > 0)


def test_disjoint_boxes_have_zero_iou():
    first = torch.tensor([[160.0, 153, 230, 23, -37], [3, 3, 8, 2, -45]]).cuda()
    second = torch.tensor([[190.0, 127, 80, 21, -46], [6, 0, 8, 2, -45]]).cuda()
    assert not box_iou_rotated(first, second).diagonal().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 5000])
def test_nms_matches_cpu(count, dtype):
    boxes, scores = rotated_boxes_and_scores(count, span=count**0.5 * 10, dtype=dtype)
    idxs = torch.arange(count) * 7919 % 20
    for threshold in (0.3, 0.7):
        kept = nms_rotated(boxes.cuda(), scores.cuda(), threshold)
        assert kept.is_cuda and torch.equal(kept.cpu(), nms_rotated(boxes, scores, threshold))
        kept = batched_nms_rotated(boxes.cuda(), scores.cuda(), idxs.cuda(), threshold)
        assert torch.equal(kept.cpu(), batched_nms_rotated(boxes, scores, idxs, threshold))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling_ratio,size", [(0, 7), (2, 14), (0, (3, 9))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align_rotated_matches_cpu(dtype, sampling_ratio, size, layout):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 5, 12, 17, generator=generator).to(dtype).to(memory_format=layout)
    boxes = torch.cat([rotated_rois(), torch.tensor([[0, 20, 20, 1e6, 1e6, 30]])])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 4e-2)
    results = []
    for device in ("cpu", "cuda"):
        input = maps.to(device).detach().requires_grad_()
        output = roi_align_rotated(input, boxes.to(device), size, 0.25, sampling_ratio)
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype).view(output.shape)
        output.backward(grad.to(device))
        results.append((output.detach().cpu(), input.grad.cpu()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def test_deterministic_backward_and_nonfinite_boxes():
    maps = torch.rand(1, 3, 20, 20).cuda().requires_grad_()
    boxes = torch.nn.functional.pad(rotated_boxes_and_scores(100, span=20)[0], (1, 0)).cuda()
    boxes[5, 2] = torch.nan
    pooled = roi_align_rotated(maps, boxes, 7)
    assert pooled[5].isnan().all() and pooled[:5].isfinite().all()
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(roi_align_rotated(maps, boxes, 7)[6:].sum(), maps)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("name", ["scores", "idxs"])
def test_devices_must_be_the_same(name):
    boxes, scores = rotated_boxes_and_scores(5)
    arguments = {"boxes": boxes.cuda(), "scores": scores.cuda(), "idxs": scores.cuda(), "iou_threshold": 0.5}
    with pytest.raises(ValueError, match=f"{name} is on cpu, but boxes is on cuda"):
        batched_nms_rotated(**arguments | {name: scores})
