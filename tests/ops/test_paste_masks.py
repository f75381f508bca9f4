"""Pasting of masks and run lengths against the definition and pycocotools."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from torch.nn import functional as F

from detlib.ops import encode_rle, paste_masks, paste_masks_to_rle
from detlib.ops.paste_masks import reference_paste_masks, reference_paste_masks_to_rle
from detlib.ops.rle import reference_encode_rle

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_case(seed, count=12, size=(9, 13), image=(50, 60), dtype=torch.float32):
    """Return masks and boxes: partly or fully outside the image, and with integer coordinates."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, *size, generator=generator)
    low = torch.rand(count, 2, generator=generator) * (max(image) + 30) - 30
    boxes = torch.cat([low, low + torch.rand(count, 2, generator=generator) * 70], 1)
    boxes[::3] = boxes[::3].round()
    masks[::4] = masks[::4].round()
    boxes[-1] = torch.tensor([-10.0, -10, image[1] + 10, image[0] + 10])
    return masks.to(dtype), boxes


def sampled(masks, boxes, height, width):
    """Compute every pixel with grid_sample in float64."""
    masks, boxes = masks.double(), boxes.double()
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def by_pycocotools(images):
    return [mask_utils.encode(np.asfortranarray(image.numpy().astype(np.uint8))) for image in images]


def as_bytes(strings):
    text, lengths = strings
    return [bytes(part.tolist()) for part in text.split(lengths.tolist())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_paste_matches_grid_sample(dtype, threshold):
    masks, boxes = random_case(0, dtype=dtype)
    values = sampled(masks, boxes, 50, 60)
    pasted = paste_masks(masks, boxes, (50, 60), threshold)
    assert pasted.dtype == torch.bool and pasted.shape == (12, 50, 60)
    decided = (values - threshold).abs() > 1e-5
    assert torch.equal(pasted[decided], (values >= threshold)[decided]) and pasted.any()
    soft = paste_masks(masks, boxes, (50, 60), -1.0)
    assert soft.dtype == torch.uint8 and ((soft + 1e-3 - values * 255) > -1).all()
    assert (soft - values * 255 < 1e-3).all() and soft.max() > 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("box_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernel_is_bit_equal_to_the_reference(dtype, box_dtype):
    for seed in range(4):
        masks, boxes = random_case(seed, size=(1 + seed, 7 - seed), dtype=dtype)
        boxes = boxes.to(box_dtype)
        for threshold in (0.0, 0.3, 0.5, 1.0, -1.0):
            expected = reference_paste_masks(masks, boxes, 50, 60, threshold)
            assert torch.equal(paste_masks(masks, boxes, (50, 60), threshold), expected)
            if threshold >= 0:
                rles = paste_masks_to_rle(masks, boxes, (50, 60), threshold)
                assert rles == by_pycocotools(expected)
                strings = reference_paste_masks_to_rle(masks, boxes, 50, 60, threshold)
                assert as_bytes(strings) == [rle["counts"] for rle in rles]


@pytest.mark.parametrize("size,image", [((28, 28), (97, 301)), ((5, 3), (300, 40)), ((56, 56), (31, 33))])
def test_paste_to_rle_matches_pycocotools(size, image):
    masks, boxes = random_case(7, 40, size, image)
    for threshold in (0.1, 0.5, 0.7):
        pasted = paste_masks(masks, boxes, image, threshold)
        assert paste_masks_to_rle(masks, boxes, image, threshold) == by_pycocotools(pasted)


def test_full_masks_and_values_equal_to_the_threshold():
    boxes = torch.tensor([[0.0, 0, 7, 5], [-40, -30, 60, 50], [0.3, -20, 3.3, 40]])
    masks = torch.full((3, 4, 4), 0.5)
    pasted = paste_masks(masks, boxes, (5, 7), 0.5)
    assert pasted[1].all() and pasted[2, :, 1:2].all(), "inside, a constant mask has its value exactly"
    assert paste_masks_to_rle(masks, boxes, (5, 7), 0.5) == by_pycocotools(pasted)
    assert (paste_masks(2 * masks, boxes, (5, 7), -1.0)[1] == 255).all()
    assert (paste_masks(8 * masks, boxes, (5, 7), -1.0)[1] == 255).all()
    assert not paste_masks(-masks, boxes, (5, 7), -1.0).any()


def test_boxes_without_area_outside_or_nonfinite_give_empty_images():
    inf, nan = math.inf, math.nan
    boxes = torch.tensor(
        [[3.0, 3, 3, 9], [9, 2, 4, 8], [200, 3, 220, 9], [-30, 3, -20, 9], [nan, 0, 9, 9], [0, -inf, 9, inf]]
    )
    masks = torch.ones(6, 4, 4)
    for threshold in (0.0, 0.5, -1.0):
        assert not paste_masks(masks, boxes, (20, 30), threshold).any()
    assert paste_masks_to_rle(masks, boxes, (20, 30)) == by_pycocotools(torch.zeros(6, 20, 30))
    assert not reference_paste_masks(masks, boxes, 20, 30, 0.5).any()


def test_nonfinite_mask_values_only_affect_neighboring_pixels():
    masks, boxes = random_case(2, 3, (6, 6))
    boxes[:] = torch.tensor([1.5, 2, 45, 48])
    expected = paste_masks(masks, boxes, (50, 60))
    masks[0, 2, 3], masks[1, 4, 1], masks[2, 0, 0] = math.nan, math.inf, -math.inf
    got = paste_masks(masks, boxes, (50, 60))
    assert torch.equal(got, reference_paste_masks(masks, boxes, 50, 60, 0.5))
    assert paste_masks_to_rle(masks, boxes, (50, 60)) == by_pycocotools(got)
    assert torch.equal(got[0, :, 40:], expected[0, :, 40:]) and got.any(dim=(1, 2)).all()


def test_huge_boxes_and_large_masks():
    boxes = torch.tensor([[-1e7, -1e7, 1e7, 1e7], [-1e30, 0, 1e30, 50], [10.0, 10.0, 10.001, 10.001]])
    masks = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(1))
    pasted = paste_masks(masks, boxes, (50, 60), 0.4)
    assert torch.equal(pasted, reference_paste_masks(masks, boxes, 50, 60, 0.4))
    assert paste_masks_to_rle(masks, boxes, (50, 60), 0.4) == by_pycocotools(pasted)


@pytest.mark.parametrize(
    "count,size,image", [(0, (28, 28), (4, 5)), (2, (0, 3), (4, 5)), (2, (3, 3), (0, 5))]
)
def test_empty_inputs_are_accepted(count, size, image):
    masks, boxes = torch.ones(count, *size), torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1)
    for paste in (paste_masks, lambda m, b, p, t: reference_paste_masks(m, b, *p, t)):
        pasted = paste(masks, boxes, image, 0.0)
        assert pasted.shape == (count, *image) and not pasted.any()
    assert paste_masks_to_rle(masks, boxes, image) == by_pycocotools(torch.zeros(count, *image))
    text, lengths = reference_paste_masks_to_rle(masks, boxes, *image, 0.5)
    assert text.dtype == torch.uint8 and lengths.dtype == torch.int64 and len(lengths) == count


def test_noncontiguous_inputs_and_threads_give_the_same_images():
    masks, boxes = random_case(3, 60)
    expected = paste_masks(masks, boxes, (50, 60))
    strided = masks.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_boxes = boxes.T.contiguous().T
    rles = paste_masks_to_rle(masks, boxes, (50, 60))
    assert torch.equal(paste_masks(strided, strided_boxes, (50, 60)), expected)
    assert paste_masks_to_rle(strided, strided_boxes, (50, 60)) == rles
    assert encode_rle(expected.transpose(1, 2).contiguous().transpose(1, 2)) == rles
    channels_last = masks[:, None].to(memory_format=torch.channels_last)[:, 0]
    assert torch.equal(paste_masks(channels_last, boxes, (50, 60)), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(paste_masks(masks, boxes, (50, 60)), expected)
        assert paste_masks_to_rle(masks, boxes, (50, 60)) == rles == encode_rle(expected)
    finally:
        torch.set_num_threads(threads)


def test_autocast_and_export_give_the_same_images():
    masks, boxes = random_case(4)
    expected = paste_masks(masks, boxes, (50, 60))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(paste_masks(masks, boxes, (50, 60)), expected)
        assert paste_masks_to_rle(masks, boxes, (50, 60)) == encode_rle(expected)
    for threshold in (0.3, -1.0):
        arguments = (masks.requires_grad_(), boxes, 50, 60, threshold)
        torch.library.opcheck(torch.ops.detlib.paste_masks.default, arguments)


@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 70), (70, 1), (40, 131), (33, 64), (600, 700)]
)
def test_encode_rle_matches_pycocotools(shape):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(shape, generator=generator)
    bands = torch.arange(shape[0])[:, None] // 300 + torch.arange(shape[1]) // 7
    masks = torch.stack(
        [noise > 2, noise > -1, noise > 0.5, noise > 0.99, bands % 2 == 0, bands % 2 == 1, (bands - 1).bool()]
    )
    expected = by_pycocotools(masks)
    assert encode_rle(masks) == expected
    assert as_bytes(reference_encode_rle(masks)) == [rle["counts"] for rle in expected]
    assert encode_rle(masks[:0]) == []


@pytest.mark.parametrize(
    "change,message",
    [
        ({"masks": torch.zeros(2, 3)}, r"masks must have shape \(R, Hm, Wm\), got \(2, 3\)"),
        ({"masks": torch.zeros(2, 3, 3).int()}, "masks must be floating point, got torch.int32"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes must have shape \(R, 4\), got \(2, 5\)"),
        ({"boxes": torch.zeros(2, 4).long()}, "boxes must be floating point, got torch.int64"),
        ({"boxes": torch.zeros(3, 4)}, "boxes must have one entry per entry of masks, got 3 and 2"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, "boxes is on meta, but masks is on cpu"),
        ({"image_size": (-1, 5)}, r"image_size must be \(height, width\), not negative, got \(-1, 5\)"),
        ({"image_size": (1, 2, 3)}, r"image_size must be \(height, width\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"masks": torch.zeros(2, 3, 3), "boxes": torch.zeros(2, 4), "image_size": (5, 5)}
    for operator in (paste_masks, paste_masks_to_rle):
        with pytest.raises(ValueError, match=message):
            operator(**(arguments | change))


def test_wrong_threshold_and_mask_dtype_are_named():
    with pytest.raises(ValueError, match="threshold must not be negative, got -1"):
        paste_masks_to_rle(torch.zeros(2, 3, 3), torch.zeros(2, 4), (5, 5), -1)
    with pytest.raises(ValueError, match=r"masks must have shape \(R, H, W\), got \(5, 5\)"):
        encode_rle(torch.zeros(5, 5).bool())
    with pytest.raises(ValueError, match="masks must be bool, got torch.uint8"):
        encode_rle(torch.zeros(1, 5, 5).byte())
    with pytest.raises(TypeError, match="masks must be a tensor"):
        encode_rle([[1]])
