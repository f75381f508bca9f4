"""The mapper of DETR-like models."""

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.config import LazyConfig, instantiate
from detlib.data import DetrDatasetMapper
from detlib.data import transforms as T
from detlib.structures import BoxMode
from tests.shipped_configs.published_lazy import CONFIGS


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    polygon = [10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]
    box = {"bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    annotations = [
        {**box, "segmentation": [polygon], "keypoints": [1.0] * 51},
        {**box, "segmentation": [polygon], "iscrowd": 1},
    ]
    return {
        "file_name": str(path),
        "height": 60,
        "width": 80,
        "image_id": 7,
        "annotations": annotations,
    }, pixels


def test_plain_and_cropped(record):
    """Half of the images go the second way, and boxes with them."""
    record, pixels = record
    crop = T.CropTransform(5, 4, 50, 40)
    mapper = DetrDatasetMapper([T.NoOpTransform()], [crop], is_train=True)
    np.random.seed(0)
    shapes = []
    for _ in range(400):
        out = mapper(record)
        shapes.append(tuple(out["image"].shape))
        cropped = shapes[-1] == (3, 40, 50)
        want = pixels[4:44, 5:55] if cropped else pixels
        assert np.array_equal(out["image"].numpy(), want.transpose(2, 0, 1))
        box = [5.0, 6.0, 35.0, 26.0] if cropped else [10.0, 10.0, 40.0, 30.0]
        assert out["instances"].gt_boxes.tensor.tolist() == [box]
        assert out["instances"].gt_classes.tolist() == [3]
        assert set(out["instances"].get_fields()) == {"gt_boxes", "gt_classes"}
    assert set(shapes) == {(3, 60, 80), (3, 40, 50)}
    assert abs(shapes.count((3, 40, 50)) - 200) < 4 * 10  # four deviations of 400 fair draws
    assert record["annotations"][0]["keypoints"] and len(record["annotations"]) == 2


def test_masks_and_color_order(record):
    record, pixels = record
    mapper = DetrDatasetMapper([T.NoOpTransform()], None, mask_on=True, img_format="BGR")
    out = mapper(record)
    assert np.array_equal(out["image"].numpy(), pixels.transpose(2, 0, 1)[::-1])
    assert out["instances"].gt_masks.polygons[0][0].tolist()[:4] == [10.0, 10.0, 40.0, 10.0]


def test_inference_does_not_crop(record):
    record, pixels = record
    mapper = DetrDatasetMapper([T.NoOpTransform()], [T.CropTransform(0, 0, 8, 8)], is_train=False)
    for _ in range(10):
        out = mapper(record)
        assert out["image"].shape == (3, 60, 80) and "annotations" not in out and "instances" not in out


def test_the_shipped_policy(record):
    """Sides of 480, 512, ... 800 pixels with and without crop, and crops of what has sides of 400 to 600."""
    record, _ = record
    loaders = LazyConfig.load(str(CONFIGS / "common/data/coco_detr.py")).dataloader
    train, test = instantiate(loaders.train.mapper), instantiate(loaders.test.mapper)
    assert train.is_train and not test.is_train and train.img_format == test.img_format == "RGB"
    np.random.seed(1)
    ratios = set()
    for _ in range(30):
        out = train(record)
        sides = sorted(out["image"].shape[1:])
        assert sides[1] <= 1333 and (sides[0] in range(480, 801, 32) or sides[1] in (1332, 1333))
        boxes = out["instances"].gt_boxes.tensor
        assert torch.all(boxes >= 0) and len(boxes) in (0, 1)
        ratios.add(round(out["image"].shape[2] / out["image"].shape[1], 1))
    assert len(ratios) > 3  # crops have other shapes than the image
    assert test(record)["image"].shape == (3, 800, 1067)


def test_what_it_prints():
    mapper = DetrDatasetMapper([T.RandomFlip()], [T.RandomFlip(), T.RandomCrop("absolute", (8, 8))])
    assert "RandomCrop" in repr(mapper.augmentations) and len(mapper.augmentation_with_crop.augs) == 2
