"""Panoptic and semantic datasets: loading, merging, registering and refusing."""

import json

import numpy as np
import pytest
from PIL import Image

from detlib.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detlib.data import transforms as T  # noqa: N812
from detlib.data.catalog import check_datasets_exist
from detlib.data.datasets import load_sem_seg, register_coco_panoptic, register_coco_panoptic_separated
from detlib.data.datasets.coco_panoptic import load_coco_panoptic_json, merge_to_panoptic
from detlib.structures.panoptic import id_to_rgb

META = {
    "thing_dataset_id_to_contiguous_id": {7: 0, 9: 1},
    "stuff_dataset_id_to_contiguous_id": {20: 1, 30: 2, 0: 0},
    "thing_classes": ["cat", "dog"],
    "stuff_classes": ["things", "grass", "sky"],
}
NAME = "coco_panoptic_test"


@pytest.fixture
def folder(tmp_path):
    """Write two images with instances, segments and stuff, in COCO's layout."""
    for name in ("images", "panoptic", "stuff"):
        (tmp_path / name).mkdir()
    images, segments, instances = [], [], []
    for i, name in enumerate(("b", "a")):
        Image.fromarray(np.full((20, 30, 3), 50 * i, np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
        ids = np.full((20, 30), 5)
        ids[5:10, 5:15] = 300
        Image.fromarray(id_to_rgb(ids)).save(tmp_path / "panoptic" / f"{name}.png")
        stuff = np.where(ids == 5, 2, 0).astype(np.uint8)
        stuff[-2:] = 255
        Image.fromarray(stuff).save(tmp_path / "stuff" / f"{name}.png")
        images.append({"id": i + 1, "file_name": f"{name}.jpg", "height": 20, "width": 30})
        parts = [{"id": 5, "category_id": 30, "iscrowd": 0, "area": 550}]
        parts.append({"id": 300, "category_id": 9, "iscrowd": 1, "area": 50})
        segments.append({"image_id": i + 1, "file_name": f"{name}.png", "segments_info": parts})
        box = {"id": i, "image_id": i + 1, "category_id": 9, "bbox": [5, 5, 10, 5], "iscrowd": 0}
        instances.append({**box, "segmentation": [[5, 5, 15, 5, 15, 10, 5, 10]]})
    things = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "dog", "isthing": 1}]
    stuff = [{"id": 20, "name": "grass", "isthing": 0}, {"id": 30, "name": "sky", "isthing": 0}]
    panoptic = {"images": images, "annotations": segments, "categories": things + stuff}
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic))
    coco = {"images": images, "annotations": instances, "categories": things}
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    yield tmp_path
    for name in (NAME, NAME + "_separated", NAME + "_stuffonly"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_panoptic_dicts(folder):
    paths = [str(folder / x) for x in ("images", "panoptic", "panoptic.json", "instances.json")]
    register_coco_panoptic(NAME, META, *paths)
    first, second = DatasetCatalog.get(NAME)
    assert first == {
        "file_name": str(folder / "images" / "b.jpg"),
        "image_id": 1,
        "height": 20,
        "width": 30,
        "pan_seg_file_name": str(folder / "panoptic" / "b.png"),
        "segments_info": [
            {"id": 5, "category_id": 2, "isthing": False, "iscrowd": 0, "area": 550},
            {"id": 300, "category_id": 1, "isthing": True, "iscrowd": 1, "area": 50},
        ],
    }
    assert second["image_id"] == 2
    metadata = MetadataCatalog.get(NAME)
    assert metadata.evaluator_type == "coco_panoptic_seg" and metadata.ignore_label == 255
    assert metadata.label_divisor == 1000 and metadata.json_file == paths[3]
    assert (metadata.image_root, metadata.panoptic_root, metadata.panoptic_json) == tuple(paths[:3])
    with pytest.raises(ValueError, match="already registered"):
        register_coco_panoptic(NAME, META, *paths)
    register_coco_panoptic(NAME, META, *paths[:3], overwrite=True)
    assert MetadataCatalog.get(NAME).json_file is None


def test_images_without_file_name_are_jpg(folder):
    coco = json.loads((folder / "panoptic.json").read_text())
    for image in coco["images"]:
        del image["file_name"], image["height"]
    (folder / "panoptic.json").write_text(json.dumps(coco))
    first, _ = load_coco_panoptic_json(str(folder / "panoptic.json"), "img", "pan", META)
    assert first["file_name"] == "img/b.jpg" and "height" not in first and first["width"] == 30


def test_separated_dicts(folder):
    paths = [str(folder / x) for x in ("images", "panoptic", "panoptic.json", "stuff", "instances.json")]
    register_coco_panoptic_separated(NAME, META, *paths)
    records = DatasetCatalog.get(NAME + "_separated")
    assert [r["file_name"] for r in records] == [str(folder / "images" / f"{x}.jpg") for x in "ba"]
    assert [r["sem_seg_file_name"] for r in records] == [str(folder / "stuff" / f"{x}.png") for x in "ba"]
    assert [r["annotations"][0]["category_id"] for r in records] == [1, 1]
    stuff = DatasetCatalog.get(NAME + "_stuffonly")
    assert [r["sem_seg_file_name"] for r in stuff] == [str(folder / "stuff" / f"{x}.png") for x in "ab"]
    assert all("annotations" not in r for r in stuff) and NAME not in DatasetCatalog
    separated = MetadataCatalog.get(NAME + "_separated")
    assert separated.evaluator_type == "coco_panoptic_seg" and separated.ignore_label == 255
    assert separated.json_file == paths[4] and separated.panoptic_json == paths[2]
    only = MetadataCatalog.get(NAME + "_stuffonly")
    assert (
        only.evaluator_type == "sem_seg" and only.sem_seg_root == paths[3] and only.get("json_file") is None
    )
    assert only.stuff_classes == META["stuff_classes"]


def test_mapper_transforms_the_label_map_as_the_image(folder):
    record = load_sem_seg(str(folder / "stuff"), str(folder / "images"))[0]
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    augmentations = [T.ResizeTransform(20, 30, 40, 60), T.HFlipTransform(60)]
    augmentations.append(T.PadTransform(2, 3, 4, 5, 60, 40, 0, 255))
    mapper = DatasetMapper(True, augmentations=augmentations, image_format="RGB")
    out = mapper(record)
    want = labels.repeat(2, axis=0).repeat(2, axis=1)[:, ::-1]
    want = np.pad(want, ((3, 5), (2, 4)), constant_values=255)
    assert out["image"].shape[1:] == out["sem_seg"].shape == (48, 66)
    np.testing.assert_array_equal(out["sem_seg"].numpy(), want)
    assert "sem_seg_file_name" not in out and out["height"] == 20 and out["width"] == 30


class TestLoadSemSeg:
    def test_pairs_by_name(self, folder, log):
        (folder / "images" / "lonely.jpg").write_bytes(b"")
        (folder / "images" / "a.txt").write_bytes(b"")
        records = load_sem_seg(str(folder / "stuff"), str(folder / "images"))
        assert [r["file_name"][-5:] for r in records] == ["a.jpg", "b.jpg"]
        assert "1 files in" in log.text and "2 pairs" in log.text

    def test_extensions(self, folder):
        for path in (folder / "images").iterdir():
            path.rename(path.with_suffix(".JPEG"))
        records = load_sem_seg(str(folder / "stuff"), str(folder / "images"), "png", ".JPEG")
        assert [r["file_name"][-6:] for r in records] == ["a.JPEG", "b.JPEG"]

    def test_errors(self, folder):
        stuff, images = str(folder / "stuff"), str(folder / "images")
        with pytest.raises(FileNotFoundError, match=r"nowhere' \(gt_root\) does not exist"):
            load_sem_seg(str(folder / "nowhere"), images)
        with pytest.raises(FileNotFoundError, match=r"images' \(image_root\) has no .bmp files"):
            load_sem_seg(stuff, images, image_ext="bmp")
        for path in (folder / "images").iterdir():
            path.rename(path.with_stem("x" + path.stem))
        with pytest.raises(ValueError, match="the first names are 'a' and 'xa'"):
            load_sem_seg(stuff, images)


def test_merge_refuses_images_without_label_map():
    with pytest.raises(ValueError, match="1 of 2 images have no label map, for example 'b'"):
        merge_to_panoptic([{"file_name": "a"}, {"file_name": "b"}], [{"file_name": "a"}])
    with pytest.raises(ValueError, match="sem_seg_dicts is empty"):
        merge_to_panoptic([], [])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x["annotations"][0].update(image_id=77), "'b.png' belongs to image id 77"),
        (
            lambda x: x["annotations"][1]["segments_info"][0].update(category_id=8),
            "'a.png' has the category id 8",
        ),
        (
            lambda x: x["annotations"][1]["segments_info"][0].pop("category_id"),
            "'a.png' has the category id None",
        ),
        (lambda x: x["annotations"][1].pop("segments_info"), "annotation number 1 has no segments_info"),
        (lambda x: x["annotations"][0].pop("file_name"), "annotation number 0 has no file_name"),
        (lambda x: x.update(annotations=[]), "has no annotations"),
    ],
)
def test_malformed_panoptic_file_is_refused(folder, change, message):
    coco = json.loads((folder / "panoptic.json").read_text())
    change(coco)
    (folder / "panoptic.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=message):
        load_coco_panoptic_json(str(folder / "panoptic.json"), "img", "pan", META)


def test_images_without_segments_are_left_out_with_a_warning(folder, log):
    coco = json.loads((folder / "panoptic.json").read_text())
    del coco["annotations"][0]
    (folder / "panoptic.json").write_text(json.dumps(coco))
    assert len(load_coco_panoptic_json(str(folder / "panoptic.json"), "img", "pan", META)) == 1
    assert "left out 1 of 2 images, which have no annotation" in log.text


def test_builtin_names():
    for split, folder in (("train", "train2017"), ("val", "val2017"), ("val_100", "val2017_100")):
        for suffix in ("", "_separated", "_stuffonly"):
            name = f"coco_2017_{split}_panoptic{suffix}"
            metadata = MetadataCatalog.get(name)
            assert name in DatasetCatalog and metadata.ignore_label == 255
            assert metadata.image_root.endswith("coco/" + folder.removesuffix("_100"))
            assert (metadata.get("label_divisor") == 1000) == (suffix == "")
            if suffix:
                assert metadata.sem_seg_root.endswith(f"coco/panoptic_stuff_{folder}")
            if suffix != "_stuffonly":
                assert metadata.panoptic_root.endswith(f"coco/panoptic_{folder}")
                assert metadata.panoptic_json.endswith(f"coco/annotations/panoptic_{folder}.json")
                assert metadata.json_file.endswith(f"coco/annotations/instances_{folder}.json")


def test_builtin_metadata():
    separated = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    assert len(separated.thing_classes) == 80 and len(separated.stuff_classes) == 54
    assert separated.stuff_classes[:2] == ["things", "banner"] and separated.stuff_classes[-1] == "rug"
    ids = separated.stuff_dataset_id_to_contiguous_id
    assert (ids[92], ids[200], ids[0], len(ids)) == (1, 53, 0, 54)
    assert separated.stuff_colors[0] == [82, 18, 128]
    standard = MetadataCatalog.get("coco_2017_val_panoptic")
    assert standard.thing_classes == standard.stuff_classes and len(standard.stuff_classes) == 133
    assert standard.stuff_classes[-1] == "rug-merged"
    assert len(standard.thing_dataset_id_to_contiguous_id) == 80
    assert standard.thing_dataset_id_to_contiguous_id[90] == 79
    ids = standard.stuff_dataset_id_to_contiguous_id
    assert (ids[92], ids[200], len(ids)) == (80, 132, 53)


@pytest.mark.parametrize("suffix", ["", "_separated", "_stuffonly"])
def test_error_for_missing_builtin_data_names_file_and_variable(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"coco_2017_val_panoptic{suffix}"
    for use in (DatasetCatalog.get, check_datasets_exist):
        with pytest.raises(FileNotFoundError, match=f"{name}.*panoptic_.*val2017.*DETLIB_DATASETS"):
            use(name)
