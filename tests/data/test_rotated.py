"""Rotated boxes from annotation files to the models' input, against what happens to their corners."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, ScaleTransform, VFlipTransform
from PIL import Image

from detlib.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detlib.data import detection_utils as utils
from detlib.data import transforms as T
from detlib.data.datasets import convert_to_coco_json, load_coco_json, register_coco_instances
from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes
from tests.builders import rotated_config

HEIGHT, WIDTH = 60, 80


def corners(box):
    """(4, 2): upper left, upper right, lower right, lower left corner as seen at the angle 0."""
    x, y, w, h, degrees = box
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s], [s, c]])
    return np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 @ turn + [x, y]


def rotated_array(n, seed=0):
    random = np.random.RandomState(seed)
    low, high = [10, 10, 4, 4, -180], [70, 50, 40, 30, 180]
    return random.uniform(low, high, (n, 5))


RIGID = {
    "hflip": HFlipTransform(WIDTH),
    "vflip": VFlipTransform(HEIGHT),
    "nothing": NoOpTransform(),
    "crop": T.CropTransform(7, 11, 50, 40),
    "pad": T.PadTransform(3, 4, 5, 6),
    "resize": T.ResizeTransform(HEIGHT, WIDTH, 2 * HEIGHT, 2 * WIDTH),
    "scale": ScaleTransform(HEIGHT, WIDTH, HEIGHT // 2, WIDTH // 2),
    "rotation": T.RotationTransform(HEIGHT, WIDTH, 33),
    "rotation within the frame": T.RotationTransform(HEIGHT, WIDTH, -140, expand=False, center=(10, 20)),
    "extent": T.ExtentTransform((10, 5, 50, 35), (60, 80)),
    "color": T.ColorTransform(lambda image: image),
}


@pytest.mark.parametrize("name", RIGID)
def test_corners_go_where_the_transform_takes_them(name):
    transform = RIGID[name]
    boxes = rotated_array(20)
    before = boxes.copy()
    moved = transform.apply_rotated_box(boxes)
    assert np.array_equal(boxes, before)
    # What is up stays up; where the image is mirrored, left and right change places.
    order = [1, 0, 3, 2] if "flip" in name else [0, 1, 2, 3]
    for old, new in zip(boxes, moved):
        expected = transform.apply_coords(corners(old))[order]
        np.testing.assert_allclose(corners(new), expected, atol=1e-8)


def test_horizontal_flip_changes_the_sign():
    moved = HFlipTransform(WIDTH).apply_rotated_box(np.array([[30.0, 20, 8, 6, 30.1], [0, 20, 8, 6, 200]]))
    assert moved.tolist() == [[50, 20, 8, 6, -30.1], [80, 20, 8, 6, -200]]


def test_unequal_resize_keeps_sides_and_the_direction_of_the_height():
    boxes = rotated_array(50)
    moved = T.ResizeTransform(HEIGHT, WIDTH, HEIGHT // 2, WIDTH * 3).apply_rotated_box(boxes)
    for old, new in zip(boxes, moved):
        upper_left, upper_right, _, lower_left = corners(old) * [3, 0.5]
        np.testing.assert_allclose(new[:2], old[:2] * [3, 0.5])
        np.testing.assert_allclose(new[2], np.linalg.norm(upper_right - upper_left))
        np.testing.assert_allclose(new[3], np.linalg.norm(lower_left - upper_left))
        down, expected = corners(new)[3] - corners(new)[0], lower_left - upper_left
        np.testing.assert_allclose(down, expected, atol=1e-8)
    # The box type scales the same way.
    scaled = RotatedBoxes(boxes)
    scaled.scale(3, 0.5)
    np.testing.assert_allclose(moved, scaled.tensor.numpy(), rtol=1e-4, atol=1e-3)


def test_lists_and_transforms_of_users():
    class Shift(T.Transform):
        def apply_image(self, img):
            return img

        def apply_coords(self, coords):
            return coords + [5, -3]

    steps = T.TransformList([Shift(), HFlipTransform(WIDTH), T.RotationTransform(HEIGHT, WIDTH, 90)])
    (moved,) = steps.apply_rotated_box(np.array([[35.0, 33, 20, 10, 30]]))
    np.testing.assert_allclose(moved, [30, 40, 20, 10, 60], atol=1e-9)


def test_image_and_box_rotate_by_the_same_angle():
    """A painted box is found where its transformed box is."""
    box = np.array([40.0, 30, 30, 12, 25])
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    cv2.fillPoly(image, [np.round(corners(box) * 16 - 8).astype(np.int32)], (255, 255, 255), shift=4)
    augmentations = [T.RandomRotation([40, 40]), T.RandomFlip(prob=1.0), T.ResizeShortestEdge(150)]
    aug_input = T.AugInput(image)
    transforms = T.AugmentationList(augmentations)(aug_input)
    moved = transforms.apply_rotated_box(box[None])[0]
    expected = np.zeros(aug_input.image.shape[:2], np.uint8)
    cv2.fillPoly(expected, [np.round(corners(moved) * 16 - 8).astype(np.int32)], 255, shift=4)
    found = aug_input.image[:, :, 0] > 127
    both, either = (found & (expected > 0)).sum(), (found | (expected > 0)).sum()
    assert both > 0.9 * either


@pytest.fixture
def rotated_set(tmp_path):
    """Write an annotation file with rotated boxes, one axis-aligned box, and an image without objects."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(tmp_path / name)
    size = {"height": HEIGHT, "width": WIDTH}
    annotations = [
        {"bbox": [40, 30, 20, 10, 35.5], "category_id": 9, "image_id": 1},
        {"bbox": [70, 30, 30, 10, -80], "category_id": 4, "image_id": 1},
        {"bbox": [5, 6, 10, 20], "category_id": 4, "image_id": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", **size}, {"id": 2, "file_name": "b.png", **size}],
        "annotations": annotations,
        "categories": [{"id": 4, "name": "ship"}, {"id": 9, "name": "plane"}],
    }
    path = tmp_path / "rotated.json"
    path.write_text(json.dumps(content))
    return path


def test_rotated_coco_file_is_read_by_uri_and_converted_back(rotated_set, tmp_path):
    uri = f"coco:{rotated_set}@{tmp_path}"
    first, second = DatasetCatalog.get(uri)
    modes = [annotation["bbox_mode"] for annotation in first["annotations"]]
    assert modes == [BoxMode.XYWHA_ABS, BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS]
    assert first["annotations"][0]["bbox"] == [40, 30, 20, 10, 35.5] and second["annotations"] == []
    assert MetadataCatalog.get(uri).thing_classes == ["ship", "plane"]

    # The converted set is the same again.
    register_coco_instances("rotated_test", {}, str(rotated_set), str(tmp_path))
    try:
        DatasetCatalog.get("rotated_test")  # fills the metadata
        convert_to_coco_json("rotated_test", str(tmp_path / "again.json"))
    finally:
        DatasetCatalog.pop("rotated_test")
        MetadataCatalog.pop("rotated_test")
    again = json.loads((tmp_path / "again.json").read_text())
    boxes = [[40, 30, 20, 10, 35.5], [70, 30, 30, 10, -80], [5, 6, 10, 20]]
    assert [a["bbox"] for a in again["annotations"]] == boxes
    assert [a["area"] for a in again["annotations"]] == [200, 300, 200]
    assert [a["category_id"] for a in again["annotations"]] == [9, 4, 4]


@pytest.mark.parametrize("box, words", [([1, 2, 3, 0, 5], "without area"), ([1, 2, 3, 4, 5, 6], "center x")])
def test_bad_boxes_in_files(rotated_set, tmp_path, box, words):
    content = json.loads(rotated_set.read_text())
    content["annotations"][0]["bbox"] = box
    rotated_set.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        load_coco_json(str(rotated_set), str(tmp_path))


class TestMapper:
    def mapper(self, *augmentations, **kwargs):
        return DatasetMapper(True, augmentations=list(augmentations), image_format="BGR", **kwargs)

    def test_rotated_boxes(self, rotated_set, tmp_path):
        record = load_coco_json(str(rotated_set), str(tmp_path), "rotated_mapper_test")[0]
        untouched = copy.deepcopy(record)
        mapper = self.mapper(T.Resize((2 * HEIGHT, 2 * WIDTH)), T.RandomFlip(prob=1.0))
        instances = mapper(record)["instances"]
        assert record == untouched
        assert type(instances.gt_boxes) is RotatedBoxes and instances.image_size == (120, 160)
        expected = [[80, 60, 40, 20, -35.5], [20, 60, 60, 20, 80], [140, 32, 20, 40, 0]]
        torch.testing.assert_close(instances.gt_boxes.tensor, torch.tensor(expected))
        assert instances.gt_classes.tolist() == [1, 0, 0]

    def test_upright_boxes_on_demand(self, rotated_set, tmp_path):
        record = load_coco_json(str(rotated_set), str(tmp_path))[0]
        boxes = self.mapper(rotated_boxes=False)(record)["instances"].gt_boxes
        assert type(boxes) is Boxes
        low, high = corners([40, 30, 20, 10, 35.5]).min(axis=0), corners([40, 30, 20, 10, 35.5]).max(axis=0)
        np.testing.assert_allclose(boxes.tensor[0].numpy(), [*low, *high], rtol=1e-5)
        assert boxes.tensor[2].tolist() == [5, 6, 15, 26]

    def test_images_without_objects(self, rotated_set, tmp_path):
        record = load_coco_json(str(rotated_set), str(tmp_path))[1]
        assert type(self.mapper()(record)["instances"].gt_boxes) is Boxes
        assert type(self.mapper(rotated_boxes=True)(record)["instances"].gt_boxes) is RotatedBoxes
        mapper = DatasetMapper(rotated_config(), is_train=True)
        assert type(mapper(record)["instances"].gt_boxes) is RotatedBoxes

    def test_what_a_crop_leaves_nothing_of_is_dropped(self, rotated_set, tmp_path):
        record = load_coco_json(str(rotated_set), str(tmp_path))[0]
        # The second box spans x from 60 to 80 and the third from 5 to 15.
        instances = self.mapper(T.CropTransform(20, 10, 43, 40))(record)["instances"]
        torch.testing.assert_close(
            instances.gt_boxes.tensor, torch.tensor([[20, 20, 20, 10, 35.5], [50, 20, 30, 10, -80]])
        )
        instances = self.mapper(T.CropTransform(20, 10, 30, 40))(record)["instances"]
        assert instances.gt_boxes.tensor[:, 0].tolist() == [20]

    def test_wrong_number_of_numbers(self, rotated_set, tmp_path):
        record = load_coco_json(str(rotated_set), str(tmp_path))[0]
        record["annotations"][1]["bbox"] = [1, 2, 3, 4]
        with pytest.raises(ValueError, match=r"annotation 1 of .*a.png: a bbox in BoxMode.XYWHA_ABS has 5"):
            self.mapper()(record)


def test_annotations_to_instances_rotated():
    annos = [
        {"bbox": [10, 10, 30, 8, 20.0], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 3},
        {"bbox": [70, 50, 90, 70], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
    ]
    instances = utils.annotations_to_instances_rotated(annos, (HEIGHT, WIDTH))
    # Axis-aligned boxes are clipped to the image, others are not.
    torch.testing.assert_close(
        instances.gt_boxes.tensor, torch.tensor([[10, 10, 30, 8, 20.0], [75, 55, 10, 10, 0]])
    )
    assert instances.gt_classes.tolist() == [3, 1]
    empty = utils.annotations_to_instances_rotated([], (HEIGHT, WIDTH))
    assert empty.gt_boxes.tensor.shape == (0, 5) and empty.gt_classes.dtype == torch.int64


def test_filter_empty_instances():
    boxes = [
        [10, 10, 5, 0, 3],
        [10, 10, 5, 5, 40],
        [-20, 30, 10, 60, 0],
        [-20, 30, 10, 60, 90],
        [90, 70, 9, 9, 1],
    ]
    instances = Instances((HEIGHT, WIDTH), gt_boxes=RotatedBoxes(boxes), gt_classes=torch.arange(5))
    kept, mask = utils.filter_empty_instances(instances, return_mask=True)
    assert kept.gt_classes.tolist() == [1, 3] and mask.tolist() == [False, True, False, True, False]
    assert len(utils.filter_empty_instances(instances[:0])) == 0


def test_proposals():
    record = {
        "proposal_boxes": np.array([[40.0, 30, 20, 10, 30], [20, 20, 0.5, 9, 10], [10, 9, 8, 7, 190]]),
        "proposal_bbox_mode": BoxMode.XYWHA_ABS,
        "proposal_objectness_logits": np.array([3.0, 2, 1]),
    }
    utils.transform_proposals(record, (HEIGHT, WIDTH), HFlipTransform(WIDTH), proposal_topk=5, min_box_size=1)
    boxes = record["proposals"].proposal_boxes
    assert type(boxes) is RotatedBoxes and record["proposals"].objectness_logits.tolist() == [3, 1]
    torch.testing.assert_close(boxes.tensor, torch.tensor([[40.0, 30, 20, 10, -30], [70, 9, 8, 7, 170]]))
