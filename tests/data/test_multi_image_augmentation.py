"""Images made of several: what lies where, what is covered, and that a seed decides it."""

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.config import get_cfg
from detlib.data import DatasetMapper
from detlib.data import build as B
from detlib.data import detection_utils as utils
from detlib.data import transforms as T
from detlib.data.multi_image_augmentation import CopyPaste, Mosaic, Sample
from detlib.data.samplers import TrainingSampler
from detlib.structures import BoxMode


def square(x, y, side, category=0):
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {
        "bbox": [x, y, side, side],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "segmentation": [[float(v) for v in polygon]],
    }


def sample(value, annotations, size=(40, 50), sem_seg=None):
    return Sample(np.full((*size, 3), value, dtype=np.uint8), annotations, sem_seg)


def test_copy_paste_covers_and_drops(monkeypatch):
    monkeypatch.setattr(np.random, "randint", lambda *a, **k: 1)
    monkeypatch.setattr(np.random, "permutation", lambda n: np.arange(n))
    under = [square(0, 0, 10), square(8, 0, 10, 1), square(10, 10, 8, 2), square(30, 30, 5, 3)]
    under[1]["keypoints"] = [11.0, 5, 2, 9, 5, 2]
    other = sample(200, [square(10, 0, 20, 7)], sem_seg=np.full((40, 50), 5))
    out = CopyPaste(1.0)(sample(10, under, sem_seg=np.zeros((40, 50), dtype=int)), lambda: other)
    assert [a["category_id"] for a in out.annotations] == [0, 1, 3, 7]
    cut = out.annotations[1]
    assert cut["bbox"].tolist() == [8, 0, 10, 10] and cut["segmentation"].sum() == 20
    assert cut["keypoints"][:, 2].tolist() == [1, 2]
    pasted = np.zeros((40, 50), dtype=bool)
    pasted[0:20, 10:30] = True
    np.testing.assert_array_equal(out.image[:, :, 0], np.where(pasted, 200, 10))
    np.testing.assert_array_equal(out.sem_seg, np.where(pasted, 5, 0))
    np.testing.assert_array_equal(out.annotations[3]["segmentation"], pasted)


def test_copy_paste_cuts_a_larger_image(monkeypatch):
    monkeypatch.setattr(np.random, "randint", lambda *a, **k: 2)
    other = sample(200, [square(40, 30, 20, 7), square(70, 70, 9, 8)], size=(90, 90))
    out = CopyPaste(1.0)(sample(10, []), lambda: other)
    assert [a["category_id"] for a in out.annotations] == [7]
    assert out.annotations[0]["bbox"].tolist() == [40, 30, 50, 40]
    assert (out.image[30:, 40:] == 200).all() and out.image.shape == (40, 50, 3)


def test_mosaic_places_four_images(monkeypatch):
    monkeypatch.setattr(np.random, "uniform", lambda *a: 0.5)
    parts = iter([sample(v, [square(0, 0, 10, v)], size=(32, 32)) for v in (20, 30, 40)])
    first = sample(10, [square(20, 22, 10, 10), square(0, 0, 10, 11)], size=(32, 32))
    out = Mosaic(1.0, size=(64, 64))(first, lambda: next(parts))
    quarters = out.image[::32, ::32, 0]
    assert quarters.tolist() == [[10, 20], [30, 40]]
    # Images are doubled; each shows the corner next to the middle.
    found = {a["category_id"]: a["bbox"].tolist() for a in out.annotations}
    assert found == {10: [8, 12, 28, 32], 40: [32, 32, 52, 52]}
    assert out.annotations[0]["segmentation"][0].min() == 8


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        boxes = [square(*map(int, rng.integers(0, 20, 2)), 18, i) for _ in range(3)]
        boxes.append(square(0, 0, 40, 9) | {"iscrowd": 1})
        made.append(
            {"file_name": str(tmp_path / f"{i}.png"), "image_id": i, "height": 40, "width": 50}
            | {"annotations": boxes}
        )
    return made


def config():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.LSJ.ENABLED = True
    cfg.INPUT.LSJ.SIZE = [48, 48]
    cfg.INPUT.LSJ.SCALE = [0.5, 1.5]
    cfg.INPUT.COPY_PASTE.PROB = 0.8
    cfg.INPUT.MOSAIC.PROB = 0.5
    cfg.INPUT.MOSAIC.SIZE = [64, 64]
    cfg.INPUT.COLOR_JITTER.HUE = 0.1
    cfg.INPUT.COLOR_JITTER.BRIGHTNESS = 0.3
    return cfg


def test_loader_gives_the_same_on_any_number_of_workers(records):
    def load(workers):
        loader = B.build_detection_train_loader(
            records,
            mapper=DatasetMapper(config(), True),
            sampler=TrainingSampler(6, seed=3),
            total_batch_size=2,
            num_workers=workers,
        )
        batches = iter(loader)
        return [element for _ in range(6) for element in next(batches)]

    alone = load(0)
    assert len({element["image"].float().mean().item() for element in alone}) == 12
    for element in alone:
        masks, boxes = element["instances"].gt_masks, element["instances"].gt_boxes
        assert element["image"].shape == (3, 48, 48) and masks.tensor.shape[1:] == (48, 48)
        assert 9 not in element["instances"].gt_classes and masks.nonempty().all()
        inside = masks.get_bounding_boxes().tensor
        assert (inside[:, :2] >= boxes.tensor[:, :2] - 1).all() and (
            inside[:, 2:] <= boxes.tensor[:, 2:] + 1
        ).all()
    for one, other in zip(alone, load(2)):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["instances"].gt_masks.tensor, other["instances"].gt_masks.tensor)


def test_errors(records):
    cfg = config()
    with pytest.raises(ValueError, match="MapDataset"):
        DatasetMapper(cfg, True)(records[0])
    cfg.INPUT.MASK_FORMAT = "polygon"
    with pytest.raises(ValueError, match="INPUT.MASK_FORMAT"):
        DatasetMapper(cfg, True)
    with pytest.raises(ValueError, match="prob must be"):
        CopyPaste(1.5)


@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_decoders_agree(tmp_path, format):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = str(tmp_path / f"{orientation}.jpg")
        Image.fromarray(pixels).save(path, exif=exif, quality=90)
        expected = utils.read_image(path, format)
        np.testing.assert_array_equal(utils.read_image(path, format, decoder="opencv"), expected)
    data = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(utils.ImageReadError, match="cut.jpg is broken"):
        utils.read_image(str(tmp_path / "cut.jpg"), format, decoder="opencv")
    with pytest.raises(ValueError, match="INPUT.DECODER"):
        utils.read_image(path, format, decoder="cv")


def test_tensor_of_any_layout():
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    for view in (image, image[::-1], image[:, ::-1, ::-1], planes, planes[:, ::-1], planes[2:, 1:]):
        out = utils.image_to_tensor(view)
        assert out.is_contiguous()
        np.testing.assert_array_equal(out.numpy(), view.transpose(2, 0, 1))


def test_large_and_small_resizes_equal_pillow():
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width, new_h, new_w = map(int, rng.integers(1, 90, 4))
        image = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
        for method in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            out = T.ResizeTransform(height, width, new_h, new_w, method).apply_image(image[:, :, ::-1])
            expected = np.asarray(Image.fromarray(image).resize((new_w, new_h), method))[:, :, ::-1]
            np.testing.assert_array_equal(out, expected)
