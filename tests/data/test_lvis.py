"""LVIS's format: loading, the classes of a dataset, and the built-in datasets."""

import json
from collections import Counter

import pytest
import torch

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.datasets import get_lvis_instances_meta, load_lvis_json, register_lvis_instances
from detlib.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES as V0_5
from detlib.data.datasets.lvis_v1_categories import LVIS_CATEGORIES as V1
from detlib.data.datasets.lvis_v1_category_image_count import LVIS_CATEGORY_IMAGE_COUNT
from detlib.data.detection_utils import get_fed_loss_cls_weights
from detlib.structures import BoxMode

NAME = "lvis_test"


def make_lvis(**changes):
    """Return two images in descending order of ids, and three categories."""
    lvis = {
        "images": [
            {
                "id": 9,
                "coco_url": "http://images.cocodataset.org/val2017/000000000009.jpg",
                "height": 20,
                "width": 30,
                "neg_category_ids": [2],
                "not_exhaustive_category_ids": [3],
            },
            {"id": 4, "file_name": "own.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 9,
                "category_id": 3,
                "bbox": [1.0, 2.0, 10.0, 8.0],
                "area": 80.0,
                "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]],
                "note": "x",
            }
        ],
        "categories": [
            {"id": 3, "name": "zebra", "frequency": "f", "image_count": 30},
            {"id": 1, "name": "acorn", "frequency": "r", "image_count": 2},
            {"id": 2, "name": "boat", "frequency": "c", "image_count": 11},
        ],
    }
    return lvis | changes


@pytest.fixture
def write(tmp_path):
    def write(lvis):
        (tmp_path / "lvis.json").write_text(json.dumps(lvis))
        return str(tmp_path / "lvis.json")

    yield write
    for name in (NAME, "lvis_v1_test", "lvis_v0.5_test_of_mine"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_dicts_have_negative_categories_and_paths(write):
    path = write(make_lvis())
    without, with_one = load_lvis_json(path, "/images", extra_annotation_keys=["note"])
    assert without == {
        "file_name": "/images/own.jpg",
        "height": 20,
        "width": 30,
        "image_id": 4,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
        "annotations": [],
    }
    assert with_one["file_name"] == "/images/val2017/000000000009.jpg"
    assert (with_one["neg_category_ids"], with_one["not_exhaustive_category_ids"]) == ([2], [3])
    assert with_one["annotations"] == [
        {
            "iscrowd": 0,
            "bbox": [1.0, 2.0, 10.0, 8.0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 2,
            "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]],
            "note": "x",
        }
    ]


def test_checker_finds_images_by_their_coco_url(write, tmp_path):
    lvis = make_lvis()
    lvis["images"][1].update(neg_category_ids=None, not_exhaustive_category_ids=None)
    register_lvis_instances(NAME, {}, write(lvis), str(tmp_path))
    assert [r["neg_category_ids"] for r in DatasetCatalog.get(NAME)] == [[], [2]]
    checked = check_dataset(NAME, images=False)
    assert not checked.num_errors
    assert checked.repaired["images"][0]["file_name"] == "val2017/000000000009.jpg"


def test_dataset_without_metadata_gets_the_classes_of_the_file(write):
    register_lvis_instances(NAME, {}, write(make_lvis()), "/images")
    assert DatasetCatalog.get(NAME)[1]["annotations"][0]["category_id"] == 2
    metadata = MetadataCatalog.get(NAME)
    assert metadata.evaluator_type == "lvis" and metadata.thing_classes == ["acorn", "boat", "zebra"]
    assert metadata.get("thing_dataset_id_to_contiguous_id") is None
    torch.testing.assert_close(get_fed_loss_cls_weights(NAME, 1.0), torch.tensor([2.0, 11.0, 30.0]))
    DatasetCatalog.get(NAME)  # reads the same again


def test_category_ids_with_gaps_are_mapped(write):
    lvis = make_lvis()
    lvis["categories"][0]["id"] = lvis["annotations"][0]["category_id"] = 70
    register_lvis_instances(NAME, {}, write(lvis), "/images")
    assert DatasetCatalog.get(NAME)[1]["annotations"][0]["category_id"] == 2
    assert MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 70: 2}


def test_classes_of_the_metadata_are_kept(write):
    path = write(make_lvis())
    register_lvis_instances(NAME, {"thing_classes": ["a", "b", "c"]}, path, "/images")
    assert DatasetCatalog.get(NAME)[1]["annotations"][0]["category_id"] == 2
    register_lvis_instances(NAME, {"thing_classes": ["a", "b"]}, path, "/images", overwrite=True)
    with pytest.raises(
        ValueError, match=r"lvis\.json: category ids \[3\] are not among the 2 classes .*'lvis_test'"
    ):
        DatasetCatalog.get(NAME)


def test_dataset_name_selects_the_classes_of_a_version(write):
    names = [{"id": c["id"], "name": c["name"]} for c in V0_5]
    register_lvis_instances("lvis_v0.5_test_of_mine", {}, write(make_lvis(categories=names)), "/images")
    DatasetCatalog.get("lvis_v0.5_test_of_mine")
    assert MetadataCatalog.get("lvis_v0.5_test_of_mine").thing_classes[2] == "air_conditioner"
    # The name stands for 1203 classes, the file has three.
    register_lvis_instances("lvis_v1_test", {}, write(make_lvis()), "/images")
    DatasetCatalog.get("lvis_v1_test")
    assert len(MetadataCatalog.get("lvis_v1_test").thing_classes) == 3


def test_malformed_lvis_file_is_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_lvis_json(str(tmp_path / "none.json"), "/images")
    lvis = make_lvis()
    lvis["annotations"][0]["category_id"] = 7
    with pytest.raises(
        ValueError, match=r"annotation 1 of image '/images/val2017/0+9\.jpg' .* category id 7"
    ):
        load_lvis_json(write(lvis), "/images", NAME)
    lvis = make_lvis()
    del lvis["images"][1]["file_name"]
    with pytest.raises(ValueError, match="has no 'file_name'"):
        load_lvis_json(write(lvis), "/images")
    lvis = make_lvis()
    lvis["annotations"][0]["bbox"] = [1, 2, 0, 8]
    with pytest.raises(ValueError, match="box without area"):
        load_lvis_json(write(lvis), "/images")
    assert load_lvis_json(write(lvis), "/images", empty_boxes="drop")[1]["annotations"] == []
    with pytest.raises(ValueError, match="empty_boxes must be"):
        load_lvis_json(write(lvis), "/images", empty_boxes="keep")
    with pytest.raises(TypeError, match="register_lvis_instances: json_file"):
        register_lvis_instances(NAME, {}, None, "/images")
    with pytest.raises(ValueError, match="no built-in LVIS metadata for dataset 'lvis_v2'"):
        get_lvis_instances_meta("lvis_v2")


def test_tables_of_lvis_categories():
    for table, num_classes, frequencies in (
        (V1, 1203, {"r": 337, "c": 461, "f": 405}),
        (V0_5, 1230, {"r": 454, "c": 461, "f": 315}),
    ):
        assert [c["id"] for c in table] == list(range(1, num_classes + 1))
        assert len({c["name"] for c in table}) == num_classes
        assert Counter(c["frequency"] for c in table) == frequencies
    assert V1[0] == {
        "id": 1,
        "name": "aerosol_can",
        "synset": "aerosol.n.02",
        "frequency": "c",
        "image_count": 64,
    }
    assert V1[-1]["name"] == "zucchini" and V1[1]["synset"] == "air_conditioner.n.01"
    assert V0_5[0] == {"id": 1, "name": "acorn", "synset": "acorn.n.01", "frequency": "r"}
    # Rare: up to 10 training images; common: up to 100; frequent: more.
    for c in V1:
        assert c["frequency"] == ("r" if c["image_count"] <= 10 else "c" if c["image_count"] <= 100 else "f")
    assert LVIS_CATEGORY_IMAGE_COUNT[1] == {"id": 2, "image_count": 364}


def test_builtin_lvis_datasets(tmp_path):
    names = [name for name in DatasetCatalog.list() if name.startswith("lvis_v")]
    assert set(names) >= {
        *(f"lvis_v1_{split}" for split in ("train", "val", "test_dev", "test_challenge")),
        *(f"lvis_v0.5_{split}" for split in ("train", "val", "val_rand_100", "test")),
        *("lvis_v0.5_train_cocofied", "lvis_v0.5_val_cocofied"),
    }
    metadata = MetadataCatalog.get("lvis_v1_test_dev")
    assert metadata.evaluator_type == "lvis" and len(metadata.thing_classes) == 1203
    assert metadata.json_file.endswith("lvis/lvis_v1_image_info_test_dev.json")
    assert metadata.image_root.endswith("coco/")
    assert len(MetadataCatalog.get("lvis_v0.5_val").thing_classes) == 1230
    assert MetadataCatalog.get("lvis_v0.5_val_cocofied").thing_dataset_id_to_contiguous_id[90] == 79
    weights = get_fed_loss_cls_weights("lvis_v1_train", 0.5)
    assert weights.shape == (1203,) and weights[0] == 8
    with pytest.raises(
        FileNotFoundError, match=r"'lvis_v1_train' needs .*lvis_v1_train\.json.*DETLIB_DATASETS"
    ):
        check_datasets_exist(["lvis_v1_train"])
