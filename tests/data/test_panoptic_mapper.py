"""PanopticDatasetMapper against the label maps and segments that the generated set was drawn with."""

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, DatasetMapper, PanopticDatasetMapper
from detlib.data import transforms as T

NAME = "shapes:val?num=6&size=64&task=panoptic"


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    return DatasetCatalog.get(NAME)


def make(augmentations=(), is_train=True, **kwargs):
    options = {"augmentations": list(augmentations), "image_format": "RGB", "use_instance_mask": True}
    return PanopticDatasetMapper(is_train, **options, **kwargs)


def segment_ids(record):
    rgb = np.asarray(Image.open(record["pan_seg_file_name"])).astype(int)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


@pytest.mark.parametrize("flip", [False, True])
def test_instances_and_labels(records, flip):
    mapper = make([T.HFlipTransform(64)] if flip else [])
    for record in records:
        before = dict(record)
        out = mapper(record)
        assert record == before
        turn = (lambda x: x[..., ::-1]) if flip else (lambda x: x)
        np.testing.assert_array_equal(
            out["sem_seg"], turn(np.asarray(Image.open(record["sem_seg_file_name"])))
        )
        ids, instances = turn(segment_ids(record)), out["instances"]
        things = [s for s in record["segments_info"] if s["isthing"]]
        assert instances.gt_classes.tolist() == [s["category_id"] for s in things]
        for mask, box, segment in zip(instances.gt_masks.tensor, instances.gt_boxes, things):
            np.testing.assert_array_equal(mask, ids == segment["id"])
            rows, columns = np.nonzero(ids == segment["id"])
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert not {"annotations", "segments_info", "pan_seg_file_name", "sem_seg_file_name"} & set(out)
        assert out["image"].shape == (3, 64, 64)


def test_own_labels_of_things(records):
    record = records[0]
    out, ids = make(things_label=None)(record), segment_ids(record)
    for segment in record["segments_info"]:
        assert (out["sem_seg"][torch.from_numpy(ids == segment["id"])] == segment["category_id"]).all()


def test_padding_and_cropping(records):
    """Padding has no label, and objects that are cut off entirely are not instances."""
    out = make([T.PadTransform(0, 0, 10, 20)])(records[0])
    assert (out["sem_seg"][64:] == 255).all() and (out["sem_seg"][:, 64:] == 255).all()
    assert not out["instances"].gt_masks.tensor[:, :, 64:].any()
    record = records[0]
    ids = segment_ids(record)[:20, :20]
    cut = make([T.CropTransform(0, 0, 20, 20)])(record)
    left = [s["category_id"] for s in record["segments_info"] if s["isthing"] and (ids == s["id"]).any()]
    assert cut["instances"].gt_classes.tolist() == left


def test_many_segments_crowds_and_unlabeled_pixels(tmp_path):
    """More segments than a byte holds; 255 stays what is not labeled."""
    ids = np.arange(1, 301).reshape(15, 20)
    ids[0, 0] = 0
    rgb = np.stack([ids % 256, ids // 256, ids * 0], axis=2).astype(np.uint8)
    for name in ("a", "b"):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png")
    segments = [
        {"id": i, "category_id": i % 7, "isthing": i > 280, "iscrowd": int(i > 295)} for i in range(2, 301)
    ]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "pan_seg_file_name": str(tmp_path / "b.png"),
        "segments_info": segments,
    }
    out = make([T.PadTransform(0, 0, 1, 0)])(record)
    want = np.where(ids > 280, 0, ids % 7)
    want[0, 0] = 255
    np.testing.assert_array_equal(out["sem_seg"][:, :20], want)
    assert (out["sem_seg"][:, 20] == 255).all()
    assert out["instances"].gt_classes.tolist() == [i % 7 for i in range(281, 296)]


def test_images_without_things_have_empty_instances(records):
    record = {**records[0]}
    record["segments_info"] = [{**s, "isthing": False} for s in record["segments_info"]]
    assert len(make()(record)["instances"]) == 0


def test_by_config_and_for_testing(records):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    out = PanopticDatasetMapper(cfg, True)(records[0])
    assert out["sem_seg"].shape == out["image"].shape[1:] == (96, 96)
    assert out["instances"].gt_masks.tensor.shape[1:] == (96, 96)
    plain = DatasetMapper(cfg, False)(records[0])
    tested = PanopticDatasetMapper(cfg, False)(records[0])
    assert "instances" not in tested and torch.equal(tested["image"], plain["image"])


def test_errors(records):
    with pytest.raises(ValueError, match="instance_mask_format .* must be 'bitmask', got 'polygon'"):
        make(instance_mask_format="polygon")
    with pytest.raises(ValueError, match=r"lacks \['segments_info'\]"):
        make()({k: v for k, v in records[0].items() if k != "segments_info"})
    with pytest.raises(ValueError, match="which segments_info does not list"):
        make()({**records[0], "segments_info": records[0]["segments_info"][:1]})
    cfg = get_cfg()
    cfg.INPUT.MOSAIC.PROB = 0.5
    with pytest.raises(ValueError, match="do not support panoptic data"):
        PanopticDatasetMapper(cfg, True)
