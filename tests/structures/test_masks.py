"""Polygons and bit masks against pycocotools and torchvision."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torchvision

from detlib.structures import BitMasks, Boxes, PolygonMasks, ROIMasks
from detlib.structures.masks import (
    bounded_polygons,
    polygon_area,
    polygons_to_bitmask,
    rasterize_polygons_within_box,
)
from tests.builders import circle_polygon, random_boxes

SQUARE = np.array([10.0, 20.0, 30.0, 20.0, 30.0, 50.0, 10.0, 50.0])
TRIANGLE = np.array([40.0, 10.0, 60.0, 10.0, 50.0, 40.0])
CIRCLE = circle_polygon(70, 60, 15)


def make_polygons():
    return PolygonMasks([[SQUARE], [TRIANGLE, CIRCLE], []])


class TestPolygonMasks:
    def test_area_by_shoelace_formula(self):
        assert polygon_area(SQUARE[0::2], SQUARE[1::2]) == 600
        areas = make_polygons().area()
        circle = 0.5 * 24 * 15**2 * np.sin(2 * np.pi / 24)
        np.testing.assert_allclose(areas, [600, 300 + circle, 0], rtol=1e-12)

    def test_bounding_boxes_and_nonempty(self):
        masks = make_polygons()
        expected = [[10, 20, 30, 50], [40, 10, 85, 75], [0, 0, 0, 0]]
        np.testing.assert_allclose(masks.get_bounding_boxes().tensor, expected, atol=1e-4)
        assert masks.nonempty().tolist() == [True, True, False]
        outside = PolygonMasks([[np.array([-5.0, -4.0, -1.0, -4.0, -1.0, -2.0])]])
        assert outside.get_bounding_boxes().tensor.tolist() == [[-5, -4, -1, -2]]

    @pytest.mark.parametrize(
        "item, rows",
        [
            (0, [0]),
            (-1, [2]),
            (slice(0, 2), [0, 1]),
            ([2, 0], [2, 0]),
            ([], []),
            (torch.tensor([1, 1]), [1, 1]),
            (torch.tensor([True, False, True]), [0, 2]),
            (np.array([False, True, False]), [1]),
        ],
    )
    def test_indexing_by_int_list_and_vector(self, item, rows):
        masks = make_polygons()
        selected = masks[item]
        assert len(selected) == len(rows)
        assert all(polygons is masks.polygons[i] for polygons, i in zip(selected, rows))

    def test_wrong_index_types_are_rejected(self):
        with pytest.raises(TypeError, match="float32"):
            make_polygons()[torch.tensor([0.5])]
        with pytest.raises(IndexError):
            make_polygons()[torch.tensor([True, False])]

    def test_accepts_tensors_and_lists_and_keeps_float64(self):
        masks = PolygonMasks([[torch.tensor(SQUARE, dtype=torch.float32)], [TRIANGLE.tolist()]])
        assert all(p.dtype == np.float64 for polygons in masks for p in polygons)
        assert masks.to("meta") is masks and masks.device.type == "cpu"
        assert repr(masks) == "PolygonMasks(num_instances=2)"

    @pytest.mark.parametrize(
        "polygons, message",
        [
            (SQUARE, "list of polygons for each object, got ndarray"),
            ([[SQUARE], SQUARE], "Object 1: polygons must be a list of coordinate vectors, got ndarray"),
            ([[SQUARE], [TRIANGLE, SQUARE[:4]]], "Object 1, polygon 1: .* at least 6, got 4"),
            ([[SQUARE[:7]]], "Object 0, polygon 0: .* got 7"),
            ([[SQUARE.reshape(4, 2)]], r"Object 0, polygon 0: .* got shape \(4, 2\)"),
        ],
    )
    def test_errors_name_object_and_polygon(self, polygons, message):
        with pytest.raises(ValueError, match=message):
            PolygonMasks(polygons)

    def test_cat_concatenates_objects(self):
        masks = make_polygons()
        joined = PolygonMasks.cat([masks, masks[1]])
        assert len(joined) == 4 and joined.polygons[3] is masks.polygons[1]
        assert len(PolygonMasks.cat([])) == 0
        with pytest.raises(TypeError, match="got list"):
            PolygonMasks.cat([masks, [[SQUARE]]])

    def test_crop_and_resize_matches_pycocotools(self):
        masks = make_polygons()
        boxes = torch.tensor([[5.0, 15.0, 35.5, 40.0], [45.0, 5.0, 90.0, 80.0], [0.0, 0.0, 10.0, 10.0]])
        crops = masks.crop_and_resize(boxes, 14)
        assert crops.dtype == torch.bool and crops.shape == (3, 14, 14)
        for crop, polygons, (x0, y0, x1, y1) in zip(crops, masks, boxes.tolist()):
            moved = [p.copy() for p in polygons]
            for p in moved:
                p[0::2] = (p[0::2] - x0) * (14 / (x1 - x0))
                p[1::2] = (p[1::2] - y0) * (14 / (y1 - y0))
            expected = np.zeros((14, 14), dtype=bool)
            for p in moved:
                expected |= mask_util.decode(mask_util.frPyObjects([p], 14, 14))[:, :, 0].astype(bool)
            np.testing.assert_array_equal(crop, expected)
        assert crops[0].any() and crops[1].any() and not crops[2].any()

    def test_crop_and_resize_of_no_objects_and_flat_boxes(self):
        assert PolygonMasks([]).crop_and_resize(torch.zeros(0, 4), 7).shape == (0, 7, 7)
        flat = rasterize_polygons_within_box([SQUARE], np.array([12.0, 25.0, 12.0, 30.0]), 7)
        assert flat.shape == (7, 7), "a box of no width must not divide by zero"
        with pytest.raises(ValueError, match="2 boxes and 3 objects"):
            make_polygons().crop_and_resize(torch.zeros(2, 4), 7)
        # The polygons must not change.
        masks = make_polygons()
        masks.crop_and_resize(torch.tensor([[5.0, 15.0, 35.5, 40.0]] * 3), 7)
        assert np.array_equal(masks.polygons[0][0], SQUARE)


def test_polygons_to_bitmask_fills_the_union():
    mask = polygons_to_bitmask([SQUARE, TRIANGLE], 64, 80)
    assert mask.shape == (64, 80) and mask.dtype == bool
    expected = np.zeros((64, 80), dtype=bool)
    expected[20:50, 10:30] = True
    np.testing.assert_array_equal(mask[:, :38], expected[:, :38])
    assert mask[:, 40:].sum() == pytest.approx(300, rel=0.05)
    assert not polygons_to_bitmask([], 3, 4).any()


class TestBitMasks:
    def test_from_polygon_masks_and_bounding_boxes(self):
        masks = BitMasks.from_polygon_masks([[SQUARE], [TRIANGLE, CIRCLE], []], 80, 100)
        assert masks.tensor.shape == (3, 80, 100) and masks.tensor.dtype == torch.bool
        assert masks.image_size == (80, 100)
        assert masks.nonempty().tolist() == [True, True, False]
        boxes = masks.get_bounding_boxes()
        assert isinstance(boxes, Boxes)
        assert boxes.tensor[0].tolist() == [10, 20, 30, 50] and boxes.tensor[2].tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(
            boxes.tensor[:2], torchvision.ops.masks_to_boxes(masks.tensor[:2]) + torch.tensor([0, 0, 1, 1])
        )
        assert masks.area().tolist() == [int(m.sum()) for m in masks.tensor]
        assert masks.area()[0] == 600

    def test_indexing_iteration_and_cat(self):
        tensor = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)) > 0.5
        masks = BitMasks(tensor)
        for item, rows in [
            (1, [1]),
            (slice(1, 3), [1, 2]),
            (torch.tensor([3, 0]), [3, 0]),
            (tensor[:, 0, 0], None),
        ]:
            expected = tensor[rows] if rows is not None else tensor[tensor[:, 0, 0]]
            assert torch.equal(masks[item].tensor, expected)
        assert torch.equal(torch.stack(list(masks)), tensor) and len(masks) == 4
        assert torch.equal(BitMasks.cat([masks, masks[0]]).tensor, torch.cat([tensor, tensor[:1]]))
        with pytest.raises(ValueError, match="at least one"):
            BitMasks.cat([])
        with pytest.raises(ValueError, match=r"\(N, H, W\), got \(6, 7\)"):
            BitMasks(tensor[0])

    def test_accepts_uint8_arrays(self):
        masks = BitMasks(np.full((1, 2, 2), 255, dtype=np.uint8))
        assert masks.tensor.all() and masks.to("cpu").device.type == "cpu"

    def test_no_objects_give_empty_results(self):
        masks = BitMasks(torch.zeros(0, 5, 6))
        assert len(masks.get_bounding_boxes()) == 0 and len(masks.nonempty()) == 0
        assert masks.crop_and_resize(torch.zeros(0, 4), 7).shape == (0, 7, 7)

    def test_crop_and_resize_matches_torchvision(self):
        masks = BitMasks.from_polygon_masks([[SQUARE], [TRIANGLE, CIRCLE], [CIRCLE]], 80, 100)
        boxes = random_boxes(3, (80, 100), min_side=5, seed=4)
        crops = masks.crop_and_resize(boxes, 28)
        rois = torch.cat([torch.arange(3.0)[:, None], boxes], dim=1)
        soft = torchvision.ops.roi_align(masks.tensor[:, None].float(), rois, 28, 1.0, 0, aligned=True)[:, 0]
        decided = (soft - 0.5).abs() > 1e-5
        assert torch.equal(crops[decided], (soft >= 0.5)[decided]) and decided.float().mean() > 0.9
        with pytest.raises(ValueError, match="2 boxes and 3 objects"):
            masks.crop_and_resize(boxes[:2], 28)

    def test_crop_and_resize_in_chunks_gives_the_same_masks(self, monkeypatch):
        masks = BitMasks.from_polygon_masks([[SQUARE], [TRIANGLE, CIRCLE], [CIRCLE]], 80, 100)
        boxes = torch.tensor([[8.0, 15.0, 40.0, 55.0], [38.0, 8.0, 90.0, 78.0], [50.0, 40.0, 80.0, 70.0]])
        expected = masks.crop_and_resize(boxes, 28)
        monkeypatch.setattr("detlib.structures.masks._MAX_FLOATS", 2 * 80 * 100)
        assert torch.equal(masks.crop_and_resize(boxes, 28), expected) and expected.any(dim=(1, 2)).all()

    def test_crops_agree_with_polygon_masks(self):
        boxes = torch.tensor([[8.0, 15.0, 40.0, 55.0], [38.0, 8.0, 90.0, 78.0]])
        polygons = PolygonMasks([[SQUARE], [TRIANGLE, CIRCLE]])
        bits = BitMasks.from_polygon_masks(polygons, 80, 100)
        same = polygons.crop_and_resize(boxes, 28) == bits.crop_and_resize(boxes, 28)
        assert same.float().mean() > 0.95


class TestROIMasks:
    def test_to_bitmasks_pastes_into_the_boxes(self):
        masks = ROIMasks(torch.ones(2, 4, 4))
        boxes = torch.tensor([[2.0, 3.0, 10.0, 9.0], [0.0, 0.0, 4.0, 4.0]])
        for given in (boxes, Boxes(boxes)):
            pasted = masks.to_bitmasks(given, 12, 15)
            assert pasted.tensor.shape == (2, 12, 15)
            assert pasted.get_bounding_boxes().tensor.tolist() == boxes.tolist()
            assert pasted.area().tolist() == [48, 16]

    def test_from_roi_masks_covers_the_image(self):
        full = BitMasks.from_roi_masks(ROIMasks(torch.ones(1, 4, 4)), 6, 8)
        assert full.tensor.all()

    def test_indexing_and_len(self):
        masks = ROIMasks(torch.rand(3, 4, 4))
        assert len(masks[1]) == 1 and len(masks[torch.tensor([True, False, True])]) == 2
        assert len(masks.to("meta")) == 3
        with pytest.raises(ValueError, match=r"\(N, M, M\), got \(4, 4\)"):
            ROIMasks(torch.rand(4, 4))


FAR = [1e5, 1e7, 1e9, 3e9, 1e18, 1e30, 1e308]


class TestPolygonsFarOutsideOfTheImage:
    @pytest.mark.parametrize("far", FAR)
    def test_mask_is_that_of_a_nearby_polygon(self, far):
        for shape in ([0, 0, 1, 0, 1, 1], [-1, -1, 1, -1, 1, 1, -1, 1], [1, 0, 0, 1, -1, 0, 0, -1]):
            near, distant = (np.array(shape, np.float64) * size for size in (1000, far))
            expected = polygons_to_bitmask([near], 50, 60)
            np.testing.assert_array_equal(polygons_to_bitmask([distant], 50, 60), expected)
            assert expected.any()
        # One corner is far away, the other part of the polygon is not.
        flat = [10.0, 20.0, far, 20.0, far, 30.0, 10.0, 30.0]
        expected = np.zeros((50, 60), bool)
        expected[20:30, 10:] = True
        np.testing.assert_array_equal(polygons_to_bitmask([np.array(flat)], 50, 60), expected)

    @pytest.mark.parametrize("far", FAR)
    def test_polygon_that_does_not_touch_the_image_is_empty(self, far):
        polygon = np.array([far, far, 1.1 * far, far, far, 1.1 * far])
        assert not polygons_to_bitmask([polygon], 50, 60).any()
        assert not polygons_to_bitmask([-polygon], 50, 60).any()

    @pytest.mark.parametrize("far", FAR)
    def test_crop_and_bit_mask(self, far):
        masks = PolygonMasks([[[0, 0, far, 0, far, far]], [[-far, -far, far, -far, far, far, -far, far]]])
        crops = masks.crop_and_resize(torch.tensor([[0.0, 0.0, 14.0, 14.0], [3.0, 3.0, 9.0, 9.0]]), 14)
        near = [np.array([0.0, 0.0, 99.0, 0.0, 99.0, 99.0])]
        assert np.array_equal(crops[0], polygons_to_bitmask(near, 14, 14)) and crops[1].all()
        bits = BitMasks.from_polygon_masks(masks, 20, 30).tensor
        assert np.array_equal(bits[0], polygons_to_bitmask(near, 20, 30)) and bits[1].all()

    @pytest.mark.parametrize("far", FAR)
    def test_huge_box_crops_to_an_almost_empty_mask(self, far):
        masks = PolygonMasks([[SQUARE]])
        for box in ([0, 0, far, far], [-far, -far, far, far], [far, far, 0, 0]):
            crop = rasterize_polygons_within_box(masks.polygons[0], np.array(box), 14)
            assert crop.shape == (14, 14) and crop.sum() <= 4

    def test_many_long_edges_take_bounded_time(self):
        zigzag = np.tile([-1e6, 0.0, 1e6, 9.0], 5000) + np.arange(20000) % 7
        assert len(bounded_polygons([zigzag], 50, 60)[0]) < 50_000
        assert np.abs(bounded_polygons([zigzag], 50, 60)[0]).max() <= 171

    def test_large_polygons_near_the_image_are_unchanged(self):
        rng = np.random.default_rng(0)
        for polygon in (SQUARE, rng.uniform(-50, 150, 20_000), rng.uniform(-3e4, 3e4, 20)):
            assert np.array_equal(bounded_polygons([polygon], 100, 100)[0], polygon)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_coordinates_that_are_not_finite_fail(self, value):
        polygon = np.array([0, 0, 9, 0, 9, value])
        with pytest.raises(ValueError, match="Object 1, polygon 1: .* NaN or infinite"):
            PolygonMasks([[SQUARE], [SQUARE, polygon]])
        with pytest.raises(ValueError, match="Polygon 0 has coordinates that are NaN or infinite"):
            polygons_to_bitmask([polygon], 20, 20)
        with pytest.raises(ValueError, match="box of a mask must be finite"):
            rasterize_polygons_within_box([SQUARE], np.array([0, 0, value, 9]), 14)

    @pytest.mark.parametrize("far", FAR)
    def test_bit_masks_and_roi_masks_accept_huge_boxes(self, far):
        far = min(far, 1e30)
        box = torch.tensor([[-far, -far, far, far]])
        assert BitMasks(torch.ones(1, 20, 30)).crop_and_resize(box, 14).shape == (1, 14, 14)
        assert ROIMasks(torch.ones(1, 14, 14)).to_bitmasks(box, 20, 30).tensor.all()
