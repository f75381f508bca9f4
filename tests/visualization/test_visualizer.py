from types import SimpleNamespace

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detlib.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks, RotatedBoxes
from detlib.structures.panoptic import rgb_to_id
from detlib.visualization.canvas import change_brightness
from detlib.visualization.labels import create_text_labels, place_label
from detlib.visualization.visualizer import ColorMode, GenericMask, VisImage, Visualizer
from tests.builders import circle_polygon

HEIGHT, WIDTH = 120, 160
METADATA = SimpleNamespace(
    thing_classes=["cat", "dog"],
    thing_colors=[(255, 0, 0), (0, 0, 255)],
    stuff_classes=["sky", "grass"],
    stuff_colors=[(0, 255, 255), (0, 255, 0)],
)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(60, 190, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def make_predictions(with_masks=True):
    boxes = torch.tensor([[10.0, 15.0, 60.0, 75.0], [90.0, 40.0, 150.0, 110.0]])
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor([0, 1]),
        scores=torch.tensor([0.97, 0.5]),
    )
    if with_masks:
        polygons = [[circle_polygon(35, 45, 20)], [circle_polygon(120, 75, 25)]]
        instances.pred_masks = BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH).tensor
    return instances


def texts(vis_image):
    return [artist.get_text() for artist in vis_image.ax.texts]


def assert_color(actual, expected, tolerance=3):
    assert np.abs(np.asarray(actual, dtype=float) - np.asarray(expected, dtype=float)).max() <= tolerance


class TestVisImage:
    @pytest.mark.parametrize("size", [(120, 160), (37, 53), (1, 200)])
    def test_undrawn_image_is_returned_unchanged(self, size):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert np.array_equal(VisImage(image).get_image(), image)

    def test_scale_and_reset(self, image):
        output = VisImage(image, scale=2.0)
        assert output.get_image().shape == (240, 320, 3)
        assert np.array_equal(output.get_image()[::2, ::2], image)
        output.reset_image(np.full_like(image, 7))
        assert (output.get_image() == 7).all()

    def test_save(self, image, tmp_path):
        VisImage(image).save(tmp_path / "image.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png").convert("RGB")), image)


class TestShapes:
    def test_float_images_are_clipped(self):
        output = Visualizer(np.full((10, 12, 3), 300.0)).get_output()
        assert (output.get_image() == 255).all()
        with pytest.raises(ValueError, match=r"\(H, W, 3\), got \(10, 12\)"):
            Visualizer(np.zeros((10, 12)))

    def test_polygon_is_blended(self, image):
        square = np.array([[20, 30], [60, 30], [60, 80], [20, 80]])
        drawn = Visualizer(image).draw_polygon(square, (1.0, 0.0, 0.0), alpha=0.5).get_image()
        assert_color(drawn[32:78, 22:58], image[32:78, 22:58] * 0.5 + np.array([127.5, 0, 0]))
        assert np.array_equal(drawn[:28], image[:28]) and np.array_equal(drawn[:, 63:], image[:, 63:])

    def test_box(self, image):
        drawn = Visualizer(image).draw_box((20, 30, 60, 80), alpha=1.0, edge_color=(0, 1.0, 0)).get_image()
        assert_color(drawn[50, 20], [0, 255, 0], 0)
        changed = (drawn != image).any(axis=2)
        assert changed[30:80, 18:23].any(axis=1).all() and changed[28:33, 20:60].any(axis=0).all()
        assert not changed[35:75, 25:55].any() and not changed[:25].any()

    def test_circle_line_text(self, image):
        visualizer = Visualizer(image)
        visualizer.draw_circle((40, 40), "blue", radius=6)
        visualizer.draw_line([100, 150], [20, 20], "#ff0000", linewidth=4)
        visualizer.draw_text("50$ of $x", (80, 90), color="black", horizontal_alignment="left")
        drawn = visualizer.get_output().get_image()
        assert_color(drawn[38:43, 38:43], [0, 0, 255], 0)
        assert_color(drawn[20, 110:140], [255, 0, 0], 0)
        changed = (drawn != image).any(axis=2)
        assert changed[90:100, 82:120].any() and not changed[60:88].any()

    def test_mask_with_hole(self, image):
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[20:80, 20:100] = 1
        mask[40:60, 50:80] = 0
        mask[100, 10] = 1  # below the area threshold
        drawn = (
            Visualizer(image).draw_binary_mask(mask, (0, 0, 1.0), alpha=1.0, edge_color="white").get_image()
        )
        assert_color(drawn[25:35, 25:95], [0, 0, 255], 0)
        assert np.array_equal(drawn[43:57, 53:77], image[43:57, 53:77]), "a hole must not be filled"
        assert np.array_equal(drawn[95:], image[95:])
        with pytest.raises(ValueError, match=r"has shape \(5, 5\)"):
            Visualizer(image).draw_binary_mask(np.zeros((5, 5)))

    def test_mask_label_is_on_its_largest_part(self, image):
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[5:15, 5:15] = True
        mask[60:110, 60:150] = True
        output = Visualizer(image).draw_binary_mask(mask, "red", text="name")
        assert texts(output) == ["name"]
        x, y = output.ax.texts[0].get_position()
        assert 60 < x < 150 and 60 < y < 110
        assert texts(Visualizer(image).draw_binary_mask(mask * 0, "red", text="name")) == []

    def test_soft_mask(self, image):
        soft = np.zeros((HEIGHT, WIDTH))
        soft[30:60, 30:60] = 0.5
        output = Visualizer(image).draw_soft_mask(soft, (1.0, 0, 0), text="soft", alpha=0.8)
        drawn = output.get_image()
        assert_color(drawn[35:55, 35:55], image[35:55, 35:55] * 0.6 + np.array([102, 0, 0]))
        assert np.array_equal(drawn[70:], image[70:]) and texts(output) == []
        with pytest.raises(ValueError, match="soft_mask"):
            Visualizer(image).draw_soft_mask(soft[:5])


class TestInstancePredictions:
    def test_boxes_labels_masks(self, image):
        output = Visualizer(image, METADATA).draw_instance_predictions(make_predictions())
        assert sorted(texts(output)) == ["cat 97%", "dog 50%"]
        drawn = output.get_image()
        changed = (drawn != image).any(axis=2)
        masks = make_predictions().pred_masks.numpy()
        for mask in masks:
            assert changed[cv2.erode(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)].mean() > 0.99
        assert not changed[100:, :60].any()

    def test_drawing_is_deterministic(self, image):
        first, second = (
            Visualizer(image, METADATA, instance_mode=ColorMode.SEGMENTATION)
            .draw_instance_predictions(make_predictions())
            .get_image()
            for _ in range(2)
        )
        assert np.array_equal(first, second)

    def test_options_of_instance_predictions(self, image):
        def draw(**kwargs):
            return Visualizer(image, METADATA).draw_instance_predictions(make_predictions(), **kwargs)

        assert sorted(texts(draw(show_scores=False))) == ["cat", "dog"]
        assert texts(draw(show_labels=False)) == []
        assert {artist.get_fontsize() for artist in draw(font_size=17).ax.texts} == {17}
        colored = draw(
            class_colors={"cat": (1.0, 1.0, 0.0), 1: "#ff00ff"}, alpha=1.0, show_labels=False
        ).get_image()
        assert_color(colored[40:50, 30:40], [255, 255, 0], 0)
        assert_color(colored[70:80, 115:125], [255, 0, 255], 0)
        listed = draw(class_colors=["lime", "blue"], alpha=0.5, show_labels=False).get_image()
        assert_color(listed[40:50, 30:40], image[40:50, 30:40] * 0.5 + np.array([0, 127.5, 0]))
        with pytest.raises(ValueError, match="1 colors and none for class 1"):
            draw(class_colors=["red"])

    def test_labels_without_metadata_are_class_ids(self, image):
        assert sorted(texts(Visualizer(image).draw_instance_predictions(make_predictions()))) == [
            "0 97%",
            "1 50%",
        ]

    def test_segmentation_mode_uses_class_colors(self, image):
        visualizer = Visualizer(image, METADATA, instance_mode=ColorMode.SEGMENTATION)
        drawn = visualizer.draw_instance_predictions(make_predictions(), jittering=False, show_labels=False)
        expected = image[40:50, 30:40] * 0.2 + 0.8 * np.array([255, 0, 0])
        assert_color(drawn.get_image()[40:50, 30:40], expected)

    def test_image_bw_is_gray_outside_masks(self, image):
        visualizer = Visualizer(image, METADATA, instance_mode=ColorMode.IMAGE_BW)
        drawn = visualizer.draw_instance_predictions(make_predictions(), show_labels=False).get_image()
        assert (np.ptp(drawn[:, 65:85].astype(int), axis=2) == 0).all()
        assert_color(drawn[:, 65:85, 0], image[:, 65:85].mean(axis=2), 1)
        assert np.ptp(drawn[70:80, 115:125].astype(int), axis=2).max() > 20

    def test_fields_may_be_missing(self, image):
        nothing = Instances((HEIGHT, WIDTH))
        assert np.array_equal(Visualizer(image).draw_instance_predictions(nothing).get_image(), image)
        empty = make_predictions()[torch.zeros(2, dtype=torch.bool)]
        for mode in ColorMode:
            assert (
                texts(Visualizer(image, METADATA, instance_mode=mode).draw_instance_predictions(empty)) == []
            )
        only_scores = Instances(
            (HEIGHT, WIDTH), pred_boxes=Boxes([[1, 1, 50, 50]]), scores=torch.tensor([0.25])
        )
        assert texts(Visualizer(image).draw_instance_predictions(only_scores)) == ["25%"]

    def test_scale(self, image):
        output = Visualizer(image, METADATA, scale=1.5).draw_instance_predictions(make_predictions())
        assert output.get_image().shape == (180, 240, 3)


class TestOverlay:
    def test_labels_do_not_cover_each_other_and_stay_inside(self, image):
        boxes = np.array([[100, 80, 158, 118]] * 3 + [[2, 2, 8, 8], [150, 2, 159, 10]])
        output = Visualizer(image).overlay_instances(boxes=boxes, labels=["label"] * 5)
        renderer = output.canvas.get_renderer()
        extents = [artist.get_window_extent(renderer) for artist in output.ax.texts]
        for i, first in enumerate(extents):
            assert first.x0 >= -1 and first.y0 >= -1 and first.x1 <= WIDTH + 1 and first.y1 <= HEIGHT + 1
            for second in extents[i + 1 :]:
                assert not first.overlaps(second)

    @pytest.mark.parametrize("mask_format", ["polygons", "lists", "bits", "tensor", "rle", "uncompressed"])
    def test_all_mask_formats_give_the_same_drawing(self, image, mask_format):
        polygons = [[circle_polygon(35, 45, 20)], [circle_polygon(120, 75, 25)]]
        bits = BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH)
        rles = [mask_util.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in bits]
        masks = {
            "polygons": PolygonMasks(polygons),
            "lists": polygons,
            "bits": bits,
            "tensor": bits.tensor,
            "rle": rles,
            "uncompressed": [{"size": [HEIGHT, WIDTH], "counts": uncompressed(m.numpy())} for m in bits],
        }[mask_format]
        drawn = (
            Visualizer(image)
            .overlay_instances(masks=masks, assigned_colors=["red", "lime"], alpha=1.0)
            .get_image()
        )
        assert_color(drawn[35:55, 25:45], [255, 0, 0], 0)
        assert_color(drawn[60:90, 105:135], [0, 255, 0], 0)
        assert np.array_equal(drawn[:20], image[:20])

    def test_keypoints_and_connections(self, image):
        metadata = SimpleNamespace(
            keypoint_names=["nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip"],
            keypoint_connection_rules=[("left_shoulder", "left_hip", (0, 0, 255))],
        )
        person = [[80, 20, 2], [60, 50, 2], [100, 50, 1], [60, 100, 2], [100, 100, 0]]
        drawn = Visualizer(image, metadata).overlay_instances(keypoints=Keypoints([person])).get_image()
        assert_color(drawn[75, 60], [0, 0, 255], 3)  # shoulder to hip
        assert_color(drawn[35, 80], [255, 0, 0], 3)  # the neck
        assert_color(drawn[50, 100], [255, 0, 0], 0)
        assert np.array_equal(drawn[100, 100], image[100, 100]), "invisible keypoints are not drawn"
        assert np.array_equal(drawn[75, 80], image[75, 80]), "no spine without both hips"

    def test_unequal_numbers_of_objects_raise(self, image):
        with pytest.raises(ValueError, match=r"\{'boxes': 2, 'labels': 1\}"):
            Visualizer(image).overlay_instances(boxes=np.zeros((2, 4)), labels=["one"])
        with pytest.raises(ValueError, match=r"\(N, 4\), or \(N, 5\).*got \(2, 6\)"):
            Visualizer(image).overlay_instances(boxes=np.zeros((2, 6)))


def uncompressed(mask):
    """Return COCO's uncompressed run lengths of a mask whose first pixel is zero."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int), [2]])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat))])).tolist()


class TestSegmentations:
    def test_sem_seg(self, image):
        sem_seg = torch.full((HEIGHT, WIDTH), 255)
        sem_seg[:60] = 0
        sem_seg[60:, :80] = 1
        output = Visualizer(image, METADATA).draw_sem_seg(sem_seg, alpha=0.8)
        drawn = output.get_image()
        assert sorted(texts(output)) == ["grass", "sky"]
        assert_color(drawn[5:15, 5:30], image[5:15, 5:30] * 0.2 + 0.8 * np.array([0, 255, 255]))
        assert np.array_equal(drawn[65:, 85:], image[65:, 85:]), "ids outside the classes must not be drawn"
        assert texts(Visualizer(image, METADATA).draw_sem_seg(sem_seg, draw_text=False)) == []
        assert sorted(texts(Visualizer(image).draw_sem_seg(sem_seg))) == ["0", "1", "255"]

    def test_panoptic(self, image):
        ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
        ids[:, :100] = 7
        ids[30:90, 20:80] = 9
        info = [
            {"id": 7, "category_id": 1, "isthing": False},
            {"id": 9, "category_id": 0, "isthing": True, "score": 0.8},
            {"id": 11, "category_id": 0, "isthing": True, "score": 0.8},
        ]
        output = Visualizer(image, METADATA).draw_panoptic_seg(ids, info, alpha=0.5)
        assert sorted(texts(output)) == ["cat 80%", "grass"]
        drawn = output.get_image()
        assert_color(drawn[5:25, 5:15], image[5:25, 5:15] * 0.5 + np.array([0, 127.5, 0]))
        assert np.array_equal(drawn[:, 105:], image[:, 105:])
        drawn = Visualizer(image, METADATA, instance_mode=ColorMode.IMAGE_BW).draw_panoptic_seg_predictions(
            ids, info
        )
        assert (np.ptp(drawn.get_image()[:, 105:].astype(int), axis=2) == 0).all()

    def test_panoptic_ids_encode_the_category(self, image):
        metadata = SimpleNamespace(
            **vars(METADATA), label_divisor=1000, thing_dataset_id_to_contiguous_id={1: 0}
        )
        ids = torch.full((HEIGHT, WIDTH), -1)
        ids[:50], ids[60:, :60], ids[60:, 90:] = 1000, 1, 2
        assert sorted(texts(Visualizer(image, metadata).draw_panoptic_seg(ids, None))) == [
            "cat",
            "cat",
            "grass",
        ]
        with pytest.raises(ValueError, match="label_divisor"):
            Visualizer(image, METADATA).draw_panoptic_seg(ids, None)


class TestDatasetDict:
    def test_annotations(self, image):
        annotations = [
            {
                "bbox": [20, 20, 40, 50],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [circle_polygon(40, 45, 15)],
                "keypoints": [40, 45, 2, 0, 0, 0],
            },
            {"bbox": [90, 30, 150, 110], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 1},
        ]
        output = Visualizer(image, METADATA).draw_dataset_dict({"annotations": annotations})
        assert sorted(texts(output)) == ["cat", "dog|crowd"]
        changed = (output.get_image() != image).any(axis=2)
        assert changed[40:50, 35:45].all() and changed[50:100, 88:93].any(axis=1).all()
        assert not changed[60:75, 100:140].any()
        assert_color(output.get_image()[45, 40], [255, 0, 0], 0)

    def test_segmentation_files(self, image, tmp_path):
        sem_seg = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        Image.fromarray(sem_seg).save(tmp_path / "sem.png")
        panoptic = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        panoptic[:, 80:] = (5, 1, 0)
        Image.fromarray(panoptic).save(tmp_path / "pan.png")
        output = Visualizer(image, METADATA).draw_dataset_dict(
            {"sem_seg_file_name": str(tmp_path / "sem.png")}
        )
        assert texts(output) == ["sky"]
        info = [{"id": 5 + 256, "category_id": 1, "isthing": False}]
        record = {"pan_seg_file_name": str(tmp_path / "pan.png"), "segments_info": info}
        assert texts(Visualizer(image, METADATA).draw_dataset_dict(record)) == ["grass"]

    def test_nothing_to_draw(self, image):
        assert np.array_equal(Visualizer(image).draw_dataset_dict({"annotations": []}).get_image(), image)


class TestParts:
    @pytest.mark.parametrize("counts", [[5], [10**9], [-5, 3005], [10**400], b"\xff\xff", "zzzz"])
    def test_malformed_rle_fails(self, counts):
        with pytest.raises(ValueError, match="run|counts"):
            GenericMask({"size": [50, 60], "counts": counts}, 50, 60)

    def test_generic_mask(self):
        square = [np.array([10.0, 10.0, 30.0, 10.0, 30.0, 40.0, 10.0, 40.0])]
        mask = GenericMask(square, 60, 50)
        assert mask.mask.sum() == 600 == mask.area() and not mask.has_holes
        assert mask.bbox().tolist() == [10, 10, 30, 40]
        ring = mask.mask.copy()
        ring[20:25, 15:20] = False
        assert GenericMask(ring, 60, 50).has_holes and len(GenericMask(ring, 60, 50).polygons) == 2
        empty = GenericMask(np.zeros((60, 50)), 60, 50)
        assert empty.polygons == [] and empty.bbox().tolist() == [0, 0, 0, 0]
        with pytest.raises(ValueError, match='"counts" and "size"'):
            GenericMask({"count": 1}, 60, 50)
        with pytest.raises(ValueError, match=r"\(60, 50\) .* size \(5, 5\)"):
            GenericMask({"counts": [25], "size": [5, 5]}, 60, 50)

    def test_text_labels(self):
        assert create_text_labels(None) is None
        assert create_text_labels([0, 3], [0.994, 0.5], ["a", "b"]) == ["a 99%", "3 50%"]
        assert create_text_labels([1], None, ["a", "b"], [True]) == ["b|crowd"]

    def test_place_label(self):
        large, size = (10, 10, 90, 90), (20, 8)
        assert place_label(size, large, (100, 100)) == (10, 10, 30, 18)
        assert place_label(size, large, (100, 100), taken=[(5, 5, 15, 15)]) == (70, 10, 90, 18)
        assert place_label(size, large, (100, 100), center=(50, 50)) == (40, 46, 60, 54)
        assert place_label(size, (50, 50, 60, 60), (100, 100)) == (50, 42, 70, 50), "outside a small object"
        assert place_label(size, (50, 0, 60, 6), (100, 100)) == (50, 6, 70, 14), (
            "below an object at the top edge"
        )
        x0, y0, x1, y1 = place_label((30, 10), (95, 95, 99, 99), (100, 100))
        assert x0 >= 0 and y0 >= 0 and x1 <= 100 and y1 <= 100

    def test_colors_and_ids(self):
        assert change_brightness((0.5, 0.5, 0.5), 0.5) == pytest.approx((0.75, 0.75, 0.75))
        assert change_brightness("red", -0.5) == pytest.approx((0.5, 0, 0))
        assert change_brightness("red", 1.0) == pytest.approx((1, 1, 1))
        assert rgb_to_id(np.array([[[1, 2, 3]]], dtype=np.uint8)).tolist() == [[1 + 512 + 3 * 65536]]


class TestRotatedBoxes:
    BOX = [80.0, 60.0, 60.0, 20.0, 30.0]

    def lines(self, output):
        return [(np.array(line.get_xydata()), line.get_linestyle()) for line in output.ax.lines]

    @staticmethod
    def corners_by_rotation(box):
        """Return OpenCV's corners; its angle is clockwise."""
        return cv2.boxPoints(((box[0], box[1]), (box[2], box[3]), -box[4]))

    def test_top_side_of_rotated_box_is_dashed(self, image):
        output = Visualizer(image).draw_rotated_box_with_label(self.BOX, edge_color="r", label="plane")
        (rest, style), (upper, upper_style) = self.lines(output)
        assert (style, upper_style) == ("-", "--") and texts(output) == ["plane"]
        expected = {tuple(np.round(p, 3)) for p in self.corners_by_rotation(self.BOX).tolist()}
        assert {tuple(np.round(p, 3)) for p in rest.tolist()} == expected
        # Counter-clockwise rotation: the right end of the top side is higher.
        assert upper[0, 0] < upper[1, 0] and upper[1, 1] < upper[0, 1]
        x0, y0 = upper.mean(axis=0)
        assert np.allclose([x0, y0], [80 - 10 * np.sin(np.pi / 6), 60 - 10 * np.cos(np.pi / 6)])

    def test_large_rotated_boxes_are_drawn_first(self, image):
        boxes = RotatedBoxes([[30, 30, 10, 6, 45], self.BOX])
        output = Visualizer(image).overlay_rotated_instances(boxes, ["a", "b"], ["r", "b"])
        assert [line.get_color() for line in output.ax.lines] == [(0, 0, 1)] * 2 + [(1, 0, 0)] * 2
        assert sorted(texts(output)) == ["a", "b"]
        assert not self.lines(Visualizer(image).overlay_rotated_instances(RotatedBoxes([])))

    def test_predictions_and_annotations(self, image):
        predictions = make_predictions(with_masks=False)
        predictions.pred_boxes = RotatedBoxes([self.BOX, [20, 20, 10, 30, -70]])
        output = Visualizer(image, METADATA).draw_instance_predictions(predictions)
        assert len(self.lines(output)) == 4 and texts(output) == ["dog 50%", "cat 97%"]
        annotations = [
            {"bbox": self.BOX, "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0},
            {"bbox": [5, 6, 10, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
        ]
        output = Visualizer(image, METADATA).draw_dataset_dict({"annotations": annotations})
        (_, _), (_, _), (axis_aligned, _), (_, _) = self.lines(output)
        assert {tuple(p) for p in axis_aligned.tolist()} == {(5, 6), (15, 6), (15, 26), (5, 26)}

    def test_axis_aligned_boxes_are_not_accepted_as_rotated(self, image):
        with pytest.raises(ValueError, match=r"\(N, 5\), got \(1, 4\)"):
            Visualizer(image).overlay_rotated_instances(np.zeros((1, 4)))
