"""ROIPooler, compared with a loop over boxes that calls torchvision's operators."""

import math

import pytest
import torch
from torchvision.ops import roi_align, roi_pool

from detlib.modeling.poolers import ROIPooler, assign_boxes_to_levels, convert_boxes_to_pooler_format
from detlib.ops import roi_align_rotated
from detlib.structures import Boxes, RotatedBoxes

STRIDES = (4, 8, 16, 32)


def boxes_of_all_sizes(count: int, generator: torch.Generator, height: int = 256, width: int = 320) -> Boxes:
    sides = 2 ** (5 + 4.5 * torch.rand(count, 2, generator=generator))
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) - 10
    return Boxes(torch.cat([corner, corner + sides], dim=1))


def slow_level(box, min_level: int, max_level: int, size: int = 224, level: int = 4) -> int:
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    wanted = math.floor(level + math.log2(side / size + 1e-8))
    return min(max(wanted, min_level), max_level) - min_level


def test_levels_follow_the_formula():
    boxes = boxes_of_all_sizes(300, torch.Generator().manual_seed(0))
    got = assign_boxes_to_levels([boxes[:100], boxes[100:]], 2, 5, 224, 4)
    assert got.dtype == torch.int64
    assert got.tolist() == [slow_level(b.tolist(), 2, 5) for b in boxes.tensor]
    assert len(set(got.tolist())) == 4


def test_levels_are_clamped_to_the_pyramid():
    def boxes_of_sides(*sides):
        return [Boxes(torch.tensor([[0.0, 0.0, s, s] for s in sides]))]

    # Doubling the side moves a box one level up. A box on the boundary belongs to the upper level.
    sides = (0.0, 1.0, 55.0, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0)
    assert assign_boxes_to_levels(boxes_of_sides(*sides), 2, 5, 224, 4).tolist() == [
        *(0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert assign_boxes_to_levels(boxes_of_sides(31.9, 32.0, 64.0), 3, 5, 32, 4).tolist() == [0, 1, 2]


def test_pooler_format_prepends_the_image_index():
    first, second = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[9.0, 10, 11, 12]])
    rois = convert_boxes_to_pooler_format([Boxes(first), Boxes(torch.empty(0, 4)), Boxes(second)])
    assert rois.tolist() == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [2, 9, 10, 11, 12]]


def pool_one_by_one(kind: str, features, box_lists, output_size, sampling_ratio: int) -> torch.Tensor:
    pooled = []
    for image, boxes in enumerate(box_lists):
        for box in boxes.tensor:
            level = slow_level(box.tolist(), 2, 5) if len(features) > 1 else 0
            roi = torch.cat([torch.tensor([float(image)]), box])[None]
            scale = 1 / STRIDES[level]
            if kind == "ROIPool":
                pooled.append(roi_pool(features[level], roi, output_size, scale))
            else:
                aligned = kind == "ROIAlignV2"
                pooled.append(roi_align(features[level], roi, output_size, scale, sampling_ratio, aligned))
    return torch.cat(pooled)


@pytest.mark.parametrize("num_levels", [1, 4])
@pytest.mark.parametrize("kind, sampling_ratio", [("ROIAlign", 2), ("ROIAlignV2", 0), ("ROIPool", 0)])
def test_pooling_equals_torchvision_box_by_box(kind, sampling_ratio, num_levels):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(3, 5, 256 // s, 320 // s, generator=generator) for s in STRIDES[:num_levels]]
    box_lists = [boxes_of_all_sizes(n, generator) for n in (17, 0, 8)]
    ours = [f.clone().requires_grad_() for f in features]
    theirs = [f.clone().requires_grad_() for f in features]

    pooler = ROIPooler((3, 4), [1 / s for s in STRIDES[:num_levels]], sampling_ratio, kind)
    got = pooler(ours, box_lists)
    want = pool_one_by_one(kind, theirs, box_lists, (3, 4), sampling_ratio)
    assert got.shape == (25, 5, 3, 4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    weights = torch.randn(want.shape, generator=generator)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a.grad, torch.zeros_like(a) if b.grad is None else b.grad, atol=1e-5, rtol=1e-4
        )


def test_pooling_without_boxes_requires_grad():
    features = [torch.randn(2, 3, 256 // s, 320 // s, requires_grad=True) for s in STRIDES]
    pooler = ROIPooler(7, [1 / s for s in STRIDES], 0, "ROIAlignV2")
    out = pooler(features, [Boxes(torch.empty(0, 4))] * 2)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert all(f.grad is not None and not f.grad.any() for f in features)


def test_levels_without_boxes_get_a_gradient():
    features = [torch.randn(1, 3, 256 // s, 320 // s, requires_grad=True) for s in STRIDES]
    pooler = ROIPooler(7, [1 / s for s in STRIDES], 0, "ROIAlignV2")
    pooler(features, [Boxes(torch.tensor([[0.0, 0, 20, 20]]))]).sum().backward()
    assert features[0].grad.any()
    assert all(f.grad is not None for f in features)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": [1 / 4, 1 / 12]}, "power of 2"),
        ({"scales": [1 / 4, 1 / 16]}, "factors of 2"),
        ({"scales": [1 / 8, 1 / 4]}, "factors of 2"),
        ({"scales": []}, "factors of 2"),
        ({"pooler_type": "RoIAlign"}, "'ROIAlignV2'"),
        ({"output_size": (7, 7, 7)}, "output_size"),
        ({"canonical_box_size": 0}, "canonical_box_size"),
    ],
)
def test_wrong_arguments_raise(change, message):
    args = {"output_size": 7, "scales": [1 / 4, 1 / 8], "sampling_ratio": 0, "pooler_type": "ROIAlignV2"}
    with pytest.raises(ValueError, match=message):
        ROIPooler(**(args | change))


def test_wrong_inputs_raise():
    pooler = ROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
    features = [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)]
    with pytest.raises(ValueError, match="2 levels, got 1"):
        pooler(features[:1], [Boxes(torch.zeros(0, 4))] * 2)
    with pytest.raises(ValueError, match="1 images, features of 2"):
        pooler(features, [Boxes(torch.zeros(0, 4))])


def test_rotated_boxes_are_pooled_from_their_level():
    """Compare with the operator on each box alone; the level depends on width times height."""
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(2, 3, 256 // s, 320 // s, generator=generator) for s in STRIDES]
    sides = 2 ** (5 + 4.5 * torch.rand(20, 2, generator=generator))
    centers = torch.rand(20, 2, generator=generator) * torch.tensor([320.0, 256.0])
    angles = 360 * torch.rand(20, 1, generator=generator) - 180
    boxes = RotatedBoxes(torch.cat([centers, sides, angles], dim=1))
    pooled = ROIPooler((3, 5), [1 / s for s in STRIDES], 2, "ROIAlignRotated")(
        features, [boxes[:8], boxes[8:]]
    )
    levels = []
    for i, box in enumerate(boxes.tensor):
        side = math.sqrt(box[2] * box[3])
        level = min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 2), 5) - 2
        roi = torch.cat([torch.tensor([0.0 if i < 8 else 1.0]), box])[None]
        want = roi_align_rotated(features[level], roi, (3, 5), 1 / STRIDES[level], 2)[0]
        torch.testing.assert_close(pooled[i], want)
        levels.append(level)
    assert len(set(levels)) == 4


def test_boxes_of_a_type_that_the_pooler_does_not_support_raise():
    pooler, axis_aligned = ROIPooler(2, [0.25], 0, "ROIAlignRotated"), Boxes([[0, 0, 9, 9]])
    with pytest.raises(ValueError, match="ROIAlignRotated pools boxes of 5 numbers, got Boxes"):
        pooler([torch.zeros(1, 1, 8, 8)], [axis_aligned])


def test_features_pooled_from_a_pyramid_are_contiguous():
    """Custom box heads may flatten them with view(), even if a level has no boxes."""
    maps = [torch.randn(1, 3, 64 >> i, 80 >> i).to(memory_format=torch.channels_last) for i in range(3)]
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16], 0, "ROIAlignV2")
    small, large = [4.0, 5.0, 24.0, 30.0], [2.0, 3.0, 250.0, 240.0]
    for boxes in ([small], [small, large]):
        pooled = pooler(maps, [Boxes(torch.tensor(boxes))])
        assert pooled.view(len(boxes), -1).shape == (len(boxes), 3 * 7 * 7)
