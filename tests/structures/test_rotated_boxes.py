"""Rotated boxes against corners and the operators."""

import math

import numpy as np
import pytest
import torch

from detlib.layers import ROIAlignRotated, batched_nms_rotated, pairwise_iou_rotated, roi_align_rotated
from detlib.structures import Boxes, Instances, RotatedBoxes
from detlib.structures import pairwise_iou_rotated as pairwise_iou_of_objects
from detlib.structures.rotated_boxes import pairwise_iou
from tests.builders import random_rotated_boxes


def corners(box):
    """Return the corners x, y of one box, (4, 2)."""
    x, y, width, height, angle = box.double().tolist()
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along_width = np.array([cosine, -sine]) * width / 2
    along_height = np.array([sine, cosine]) * height / 2
    return [
        np.array([x, y]) + i * along_width + j * along_height for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]


@pytest.mark.parametrize("empty", [[], torch.empty(0), torch.empty(0, 5), np.zeros((0, 5))])
def test_empty_inputs_give_no_boxes(empty):
    boxes = RotatedBoxes(empty)
    assert boxes.tensor.shape == (0, 5) and boxes.tensor.dtype == torch.float32
    boxes.clip((10, 10))
    boxes.scale(2, 3)
    boxes.normalize_angles()
    assert len(boxes) == 0 and boxes.area().shape == (0,) and boxes.nonempty().shape == (0,)
    assert boxes.pairwise_iou(RotatedBoxes(random_rotated_boxes(6))).shape == (0, 6)


@pytest.mark.parametrize("shape", [(5,), (2, 4), (1, 2, 5)])
def test_wrong_shape_is_reported(shape):
    with pytest.raises(ValueError, match=r"RotatedBoxes needs shape \(N, 5\), got \("):
        RotatedBoxes(torch.zeros(shape))


def test_has_the_interface_of_boxes():
    boxes = RotatedBoxes(random_rotated_boxes(6))
    assert isinstance(boxes, Boxes) and boxes.box_dim == 5
    for other in (boxes[1], boxes[:2], boxes[torch.arange(6) > 2], boxes.clone(), boxes.to("cpu")):
        assert type(other) is RotatedBoxes
    assert torch.equal(boxes[-1].tensor, boxes.tensor[-1:])
    joined = RotatedBoxes.cat([boxes[:2], boxes[2:]])
    assert type(joined) is RotatedBoxes and torch.equal(joined.tensor, boxes.tensor)
    assert RotatedBoxes.cat([]).tensor.shape == (0, 5)
    with pytest.raises(TypeError, match="RotatedBoxes.cat takes a list of RotatedBoxes, got Boxes"):
        RotatedBoxes.cat([boxes, Boxes(torch.zeros(1, 4))])
    assert [tuple(row.shape) for row in boxes] == [(5,)] * 6
    assert repr(boxes).startswith("RotatedBoxes(tensor(")
    instances = Instances.cat(
        [Instances((60, 60), pred_boxes=boxes[:4]), Instances((60, 60), pred_boxes=boxes[4:])]
    )
    assert type(instances.pred_boxes) is RotatedBoxes and len(instances[instances.pred_boxes.area() > 0]) == 6


def test_area_centers_nonempty_inside():
    boxes = RotatedBoxes([[10, 20, 4, 3, 30], [-1, 5, 0, 3, 0], [39, 29, 5, -1, 90], [40, 5, 9, 9, 45]])
    assert boxes.area().tolist() == [12, 0, -5, 81]
    assert boxes.get_centers().tolist() == [[10, 20], [-1, 5], [39, 29], [40, 5]]
    assert boxes.nonempty().tolist() == [True, False, False, True]
    assert boxes.nonempty(threshold=3.5).tolist() == [False, False, False, True]
    assert boxes.inside_box((30, 40)).tolist() == [True, False, True, False]
    assert boxes.inside_box((30, 40), boundary_threshold=2).tolist() == [True] * 4


def test_normalize_angles_to_half_open_range():
    angles = [0, 180, -180, 179, 190, -190, 360, 540, -725]
    boxes = RotatedBoxes([[1, 2, 3, 4, angle] for angle in angles])
    boxes.normalize_angles()
    assert boxes.tensor[:, 4].tolist() == [0, -180, -180, 179, -170, 170, 0, -180, -5]
    assert boxes.tensor[:, :4].tolist() == [[1, 2, 3, 4]] * 9


def test_clip_changes_axis_aligned_boxes_only():
    boxes = RotatedBoxes(
        [
            [5, 5, 20, 6, 0.5],
            [5, 5, 20, 6, 2],
            [38, 28, 10, 10, 361],
            [10, 10, 4, 4, 0],
            [5, 5, 20, 6, 180],
            [-9, 5, 4, 4, 0],
        ]
    )
    source = boxes.tensor.clone()
    boxes.clip((30, 40))
    assert boxes.tensor.tolist() == [
        [7.5, 5, 15, 6, 0.5], [5, 5, 20, 6, 2], [36.5, 26.5, 7, 7, 1], [10, 10, 4, 4, 0], [5, 5, 20, 6, -180],
        [0, 5, 0, 4, 0],
    ]  # fmt: skip
    wide = RotatedBoxes(source)
    wide.clip((30, 40), clip_angle_threshold=2)
    assert wide.tensor[1].tolist() == [7.5, 5, 15, 6, 2]


def test_clip_rejects_nonfinite_values():
    with pytest.raises(ValueError, match="1 of 2 boxes .* infinite or NaN"):
        RotatedBoxes([[0, 0, math.nan, 1, 0], [0, 0, 1, 1, 0]]).clip((10, 10))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_equal_factors_scale_the_corners(factor):
    boxes = RotatedBoxes(random_rotated_boxes(6))
    before = [corners(box) for box in boxes]
    boxes.scale(factor, factor)
    for box, old in zip(boxes, before):
        np.testing.assert_allclose(corners(box), np.array(old) * factor, rtol=1e-4, atol=1e-4)


def test_unequal_factors_keep_side_lengths_and_direction_of_height():
    boxes = RotatedBoxes(random_rotated_boxes(6))
    before = [corners(box) for box in boxes]
    boxes.scale(2.0, 0.7)
    for box, old in zip(boxes, before):
        old = np.array(old) * [2.0, 0.7]
        new = np.array(corners(box))
        np.testing.assert_allclose(new.mean(0), old.mean(0), rtol=1e-4)
        assert box[2].item() == pytest.approx(np.linalg.norm(old[1] - old[0]), rel=1e-4)
        np.testing.assert_allclose(new[2] - new[1], old[2] - old[1], rtol=1e-3, atol=1e-3)


def test_iou_and_nms_match_the_operators():
    boxes, others = RotatedBoxes(random_rotated_boxes(6)), RotatedBoxes(random_rotated_boxes(5, seed=1))
    expected = pairwise_iou_rotated(boxes.tensor, others.tensor)
    assert expected.max() > 0.1
    for iou in (
        boxes.pairwise_iou(others),
        pairwise_iou(boxes, others),
        pairwise_iou_of_objects(boxes, others),
    ):
        assert torch.equal(iou, expected)
    scores, idxs = torch.arange(6) / 6, torch.arange(6) % 2
    assert torch.equal(
        boxes.batched_nms(scores, idxs, 0.1), batched_nms_rotated(boxes.tensor, scores, idxs, 0.1)
    )


def test_roi_align_rotated_module_matches_the_operator():
    maps = torch.rand(1, 2, 20, 20)
    rois = torch.nn.functional.pad(random_rotated_boxes(6), (1, 0))
    layer = ROIAlignRotated((4, 5), spatial_scale=0.5, sampling_ratio=2)
    assert torch.equal(layer(maps, rois), roi_align_rotated(maps, rois, (4, 5), 0.5, 2))
    assert "output_size=(4, 5), spatial_scale=0.5, sampling_ratio=2" in repr(layer)
    with pytest.raises(ValueError, match=r"rois must have shape \(R, 6\), got \(6, 5\)"):
        layer(maps, rois[:, 1:])
