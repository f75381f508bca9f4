"""Axis-aligned boxes against slow formulas and torchvision."""

import math

import numpy as np
import pytest
import torch
import torchvision

from detlib.structures import (
    Boxes,
    BoxMode,
    matched_pairwise_iou,
    pairwise_intersection,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from tests.builders import random_boxes


def slow_intersection(a, b):
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def slow_area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


class TestBoxes:
    @pytest.mark.parametrize("empty", [[], torch.empty(0), torch.empty(0, 4), np.zeros((0, 4))])
    def test_empty_inputs_give_no_boxes(self, empty):
        boxes = Boxes(empty)
        assert boxes.tensor.shape == (0, 4) and boxes.tensor.dtype == torch.float32
        assert len(boxes) == 0 and boxes.area().shape == (0,) and len(boxes.nonempty()) == 0

    def test_converts_to_float32(self):
        assert Boxes([[0, 1, 2, 3]]).tensor.dtype == torch.float32
        assert Boxes(torch.zeros(1, 4, dtype=torch.float64)).tensor.dtype == torch.float32

    @pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 4)])
    def test_wrong_shape_is_reported(self, shape):
        with pytest.raises(ValueError, match=r"shape \(N, 4\), got \("):
            Boxes(torch.zeros(shape))

    def test_empty_boxes_keep_the_autograd_graph(self):
        source = torch.zeros(0, requires_grad=True)
        Boxes(source).tensor.sum().backward()
        assert source.grad is not None

    def test_area_centers_nonempty(self):
        boxes = Boxes([[0, 0, 10, 5], [2, 2, 2, 8], [1, 1, 4, 3]])
        assert boxes.area().tolist() == [50, 0, 6]
        assert boxes.get_centers().tolist() == [[5, 2.5], [2, 5], [2.5, 2]]
        assert boxes.nonempty().tolist() == [True, False, True]
        assert boxes.nonempty(threshold=2).tolist() == [True, False, False]

    def test_clip_to_the_image(self):
        boxes = Boxes([[-5, -6, 30, 40], [1, 2, 3, 4]])
        boxes.clip((10, 20))
        assert boxes.tensor.tolist() == [[0, 0, 20, 10], [1, 2, 3, 4]]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_clip_rejects_nonfinite_coordinates(self, bad):
        with pytest.raises(ValueError, match="1 of 2 boxes .* infinite or NaN"):
            Boxes([[0, 0, bad, 1], [0, 0, 1, 1]]).clip((10, 10))

    def test_inside_box(self):
        boxes = Boxes([[0, 0, 5, 5], [-2, 0, 5, 5], [0, 0, 22, 5], [0, 0, 5, 10], [0, -9, 5, 5]])
        assert boxes.inside_box((10, 20)).tolist() == [True, False, False, False, False]
        assert boxes.inside_box((10, 20), boundary_threshold=3).tolist() == [True, True, True, True, False]

    def test_scale_is_in_place(self):
        boxes = Boxes([[1, 2, 3, 4]])
        boxes.scale(2, 10)
        assert boxes.tensor.tolist() == [[2, 20, 6, 40]]

    def test_indexing_by_int_slice_and_vector(self):
        boxes = Boxes(random_boxes(5))
        for index, rows in [
            (1, [1]),
            (-1, [4]),
            (np.int64(2), [2]),
            (slice(1, 3), [1, 2]),
            (torch.tensor([3, 0]), [3, 0]),
            (torch.tensor([True, False, False, False, True]), [0, 4]),
            (torch.zeros(5, dtype=torch.bool), []),
        ]:
            assert torch.equal(boxes[index].tensor, boxes.tensor[rows]), index
        with pytest.raises(IndexError):
            boxes[5]
        assert torch.equal(torch.stack(list(boxes)), boxes.tensor)

    def test_cat_and_clone(self):
        a, b = Boxes(random_boxes(2)), Boxes(random_boxes(3, seed=1))
        joined = Boxes.cat([a, b])
        assert torch.equal(joined.tensor, torch.cat([a.tensor, b.tensor]))
        single = Boxes.cat([a])
        single.scale(2, 2)
        assert not torch.equal(single.tensor, a.tensor), "cat must not share memory"
        copy = a.clone()
        copy.tensor.zero_()
        assert a.tensor.abs().sum() > 0
        assert len(Boxes.cat([])) == 0
        with pytest.raises(TypeError, match="list of Boxes, got Tensor"):
            Boxes.cat([a, b.tensor])

    def test_to_and_repr(self):
        boxes = Boxes([[0, 0, 1, 1]])
        assert boxes.to("cpu").device == torch.device("cpu")
        assert "Boxes(tensor(" in repr(boxes)

    def test_batched_nms_does_not_suppress_across_groups(self):
        boxes = Boxes([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]])
        scores = torch.tensor([0.5, 0.9, 0.7, 0.1])
        assert boxes.batched_nms(scores, torch.tensor([0, 0, 1, 0]), 0.5).tolist() == [1, 2, 3]
        assert boxes.batched_nms(scores, torch.zeros(4, dtype=torch.long), 0.5).tolist() == [1, 3]


class TestPairwise:
    def setup_method(self):
        self.a, self.b = random_boxes(7, seed=2), random_boxes(5, seed=3)
        self.a[0] = self.b[0]
        self.a[1] = torch.tensor([200.0, 200.0, 200.0, 200.0])
        self.b[4] = torch.tensor([200.0, 200.0, 200.0, 200.0])

    def test_matches_slow_formulas(self):
        boxes1, boxes2 = Boxes(self.a), Boxes(self.b)
        inter, iou, ioa = (f(boxes1, boxes2) for f in (pairwise_intersection, pairwise_iou, pairwise_ioa))
        for i, first in enumerate(self.a.tolist()):
            for j, second in enumerate(self.b.tolist()):
                shared = slow_intersection(first, second)
                union = slow_area(first) + slow_area(second) - shared
                assert inter[i, j].item() == pytest.approx(shared, rel=1e-5, abs=1e-4)
                assert iou[i, j].item() == pytest.approx(shared / union if shared else 0, abs=1e-5)
                assert ioa[i, j].item() == pytest.approx(
                    shared / slow_area(second) if shared else 0, abs=1e-5
                )

    def test_matches_torchvision(self):
        expected = torchvision.ops.box_iou(self.a[2:], self.b[:4])
        torch.testing.assert_close(Boxes(self.a[2:]).pairwise_iou(Boxes(self.b[:4])), expected)

    def test_matched_pairwise_iou_compares_row_by_row(self):
        boxes1, boxes2 = Boxes(self.a[:5]), Boxes(self.b)
        torch.testing.assert_close(
            matched_pairwise_iou(boxes1, boxes2), pairwise_iou(boxes1, boxes2).diagonal()
        )
        with pytest.raises(ValueError, match="got 7 and 5"):
            matched_pairwise_iou(Boxes(self.a), boxes2)

    def test_empty_inputs_give_empty_results(self):
        assert pairwise_iou(Boxes([]), Boxes(self.b)).shape == (0, 5)
        assert pairwise_ioa(Boxes(self.a), Boxes([])).shape == (7, 0)

    def test_pairwise_iou_has_gradients(self):
        a = self.a[2:4].double().requires_grad_()
        iou = pairwise_iou(Boxes(a), Boxes(self.b[:2]))
        iou.sum().backward()
        assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0

    def test_point_box_distance_is_signed(self):
        points = torch.tensor([[1.0, 2.0], [30.0, 5.0]])
        distances = pairwise_point_box_distance(points, Boxes([[0, 0, 10, 20], [5, 5, 6, 6]]))
        assert distances.tolist() == [[[1, 2, 9, 18], [-4, -3, 5, 4]], [[30, 5, -20, 15], [25, 0, -24, 1]]]


class TestBoxMode:
    def test_integer_values_are_fixed(self):
        assert [(m.name, m.value) for m in BoxMode] == [
            ("XYXY_ABS", 0),
            ("XYWH_ABS", 1),
            ("XYXY_REL", 2),
            ("XYWH_REL", 3),
            ("XYWHA_ABS", 4),
        ]

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
    def test_axis_aligned_formats_keep_the_type(self, kind):
        box = kind([5.0, 6.0, 15.0, 26.0])
        xywh = BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        assert type(xywh) is type(box)
        assert list(xywh) == [5, 6, 10, 20]
        assert list(BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)) == [5, 6, 15, 26]
        assert list(BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)) == [10, 16, 10, 20, 0]
        assert list(BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)) == [10, 16, 10, 20, 0]

    def test_same_mode_returns_the_input(self):
        box = [1, 2, 3, 4]
        assert BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYXY_ABS) is box

    def test_convert_does_not_change_the_input_or_dtype(self):
        for boxes in (torch.tensor([[1, 2, 5, 9]]), np.array([[1, 2, 5, 9]], dtype=np.float32)):
            converted = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            assert converted.dtype == boxes.dtype
            assert boxes.tolist() == [[1, 2, 5, 9]] and converted.tolist() == [[1, 2, 4, 7]]
        assert BoxMode.convert([1, 2, 5, 9], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) == [1, 2, 4, 7]

    @pytest.mark.parametrize("angle", [0, 30, 90, 137, -45, 180])
    def test_rotated_box_becomes_its_enclosing_box(self, angle):
        cx, cy, w, h = 50.0, 40.0, 20.0, 10.0
        theta = math.radians(angle)
        # Counter-clockwise on the screen, where y points down.
        xs = [
            cx + math.cos(theta) * x + math.sin(theta) * y for x in (-w / 2, w / 2) for y in (-h / 2, h / 2)
        ]
        ys = [
            cy - math.sin(theta) * x + math.cos(theta) * y for x in (-w / 2, w / 2) for y in (-h / 2, h / 2)
        ]
        axis_aligned = BoxMode.convert([cx, cy, w, h, angle], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
        assert axis_aligned == pytest.approx([min(xs), min(ys), max(xs), max(ys)])
        xywh = BoxMode.convert([cx, cy, w, h, angle], BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS)
        assert xywh == pytest.approx([min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)])

    def test_relative_modes_and_wrong_lengths_are_rejected(self):
        with pytest.raises(ValueError, match="XYXY_REL"):
            BoxMode.convert([0, 0, 1, 1], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
        with pytest.raises(ValueError, match=r"XYWH_ABS has 4 numbers, got shape \(5,\)"):
            BoxMode.convert([0, 0, 1, 1, 1], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        with pytest.raises(ValueError, match="XYWHA_ABS has 5 numbers"):
            BoxMode.convert([0, 0, 1, 1], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
