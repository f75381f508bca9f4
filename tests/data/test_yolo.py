"""YOLO datasets: paths, conversion of label lines, and errors."""

import json

import pytest
from PIL import Image

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.datasets import load_yolo, register_yolo
from detlib.data.detection_utils import create_keypoint_hflip_indices
from detlib.structures import BoxMode
from tests.data.small_datasets import CLASSES, make_image, write, write_yolo


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in MetadataCatalog.list():
        if name.startswith(("yolo", "dir")):
            MetadataCatalog.remove(name)
    DatasetCatalog.pop("yolo_test", None)


def test_boxes_become_absolute_xyxy(tmp_path):
    uri = write_yolo(tmp_path)
    check_datasets_exist(uri)
    metadata = MetadataCatalog.get(uri)
    assert metadata.thing_classes == CLASSES and metadata.evaluator_type == "coco"
    a, b = DatasetCatalog.get(uri)
    assert a == {
        "file_name": f"{tmp_path}/images/train/a.jpg",
        "image_id": "a",
        "height": 30,
        "width": 40,
        "annotations": [
            {"category_id": 2, "bbox_mode": BoxMode.XYXY_ABS, "bbox": [2.0, 3.0, 10.0, 12.0]},
            {"category_id": 0, "bbox_mode": BoxMode.XYXY_ABS, "bbox": [0.0, 0.0, 40.0, 30.0]},
        ],
    }
    assert b["annotations"] == []


def test_polygons_and_boxes_in_one_file(tmp_path):
    write_yolo(tmp_path, {"a": "1 0.1 0.1 0.5 0.1 0.1 0.4\n1 0.5 0.5 0.2 0.2\n"})
    polygon, box = load_yolo(f"{tmp_path}/data.yaml", "train")[0]["annotations"]
    assert polygon["segmentation"] == [[4, 3, 20, 3, 4, 12]] and polygon["bbox"] == [4, 3, 20, 12]
    assert "segmentation" not in box and box["bbox"] == [16, 12, 24, 18]


def test_poses_have_keypoints_and_flip_pairs(tmp_path):
    uri = write_yolo(
        tmp_path,
        {"a": "0 0.5 0.5 1 1 0.25 0.5 2 0.5 0.5 1 0 0 0\n"},
        kpt_shape=[3, 3],
        flip_idx=[0, 2, 1],
        kpt_names={0: ["beak", "left wing", "right wing"]},
    )
    metadata = MetadataCatalog.get(uri)
    assert metadata.keypoint_flip_map == [("left wing", "right wing")]
    assert create_keypoint_hflip_indices(uri) == [0, 2, 1]
    assert DatasetCatalog.get(uri)[0]["annotations"][0]["keypoints"] == [10, 15, 2, 20, 15, 1, 0, 0, 0]


def test_poses_without_visibility_or_flip_map(tmp_path, log):
    uri = write_yolo(tmp_path, {"a": "0 0.5 0.5 1 1 0.25 0.5 0 0\n"}, kpt_shape=[2, 2])
    assert DatasetCatalog.get(uri)[0]["annotations"][0]["keypoints"] == [10, 15, 2, 0, 0, 0]
    assert MetadataCatalog.get(uri).keypoint_names == ["keypoint_0", "keypoint_1"]
    assert "has no flip_idx" in log.text


def test_sizes_follow_the_exif_rotation(tmp_path):
    write_yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5\n"})
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image().save(tmp_path / "images/train/a.jpg", exif=exif)
    record = load_yolo(f"{tmp_path}/data.yaml", "train")[0]
    assert (record["width"], record["height"]) == (30, 40)
    assert record["annotations"][0]["bbox"] == [7.5, 10, 22.5, 30]


@pytest.mark.parametrize(
    "keys",
    [
        {"path": "FOLDER"},
        {"path": ".", "names": {0: "crow", 1: "owl", 2: "wren"}, "nc": 3},
        {"path": "elsewhere", "train": "../images/train"},
        {"train": ["images/train"]},
        {"train": "list.txt"},
    ],
)
def test_variants_of_paths_and_names(tmp_path, keys):
    keys = {k: str(tmp_path) if v == "FOLDER" else v for k, v in keys.items()}
    uri = write_yolo(tmp_path, **keys)
    if isinstance(keys.get("names"), dict):  # JSON has no integer keys
        text = "train: images/train\nnames:\n  0: crow\n  1: owl\n  2: wren\nnc: 3\n"
        (tmp_path / "data.yaml").write_text(text)
    (tmp_path / "list.txt").write_text("./images/train/b.jpg\n\nimages/train/a.jpg\n")
    order = ["b", "a"] if keys.get("train") == "list.txt" else ["a", "b"]
    assert [record["image_id"] for record in DatasetCatalog.get(uri)] == order
    assert MetadataCatalog.get(uri).thing_classes == CLASSES


def test_image_ids_are_paths_if_names_repeat(tmp_path):
    write_yolo(tmp_path, train=["images/train", "images/more"])
    write(tmp_path / "images/more/a.jpg", make_image())
    dicts = load_yolo(f"{tmp_path}/data.yaml", "train")
    assert [record["image_id"] for record in dicts] == [
        f"{tmp_path}/images/{name}" for name in ("train/a", "train/b", "more/a")
    ]


def test_labels_are_found_by_relative_paths(tmp_path, monkeypatch):
    write_yolo(tmp_path)
    write(f"{tmp_path}/labels/train/alone.txt", "0 0.5 0.5 0.5 0.5\n")
    monkeypatch.chdir(tmp_path)
    for uri in ("yolo:data.yaml@train", "dir:.@train"):
        assert [len(record["annotations"]) for record in DatasetCatalog.get(uri)] == [2, 0]
    assert "label-without-image" in {f.kind for f in check_dataset("yolo:data.yaml@train").findings}


def test_image_folders_may_have_a_dot(tmp_path):
    write_yolo(tmp_path)
    write(f"{tmp_path}/images/train/take.2/c.jpg", make_image())
    write(f"{tmp_path}/labels/train/take.2/c.txt", "1 0.5 0.5 0.5 0.5\n")
    dicts = load_yolo(f"{tmp_path}/data.yaml", "train")
    assert {record["image_id"]: len(record["annotations"]) for record in dicts} == {"a": 2, "b": 0, "c": 1}


def test_list_file_of_a_windows_editor(tmp_path):
    write_yolo(tmp_path, train="train.txt")
    write(f"{tmp_path}/train.txt", "\ufeffimages/train/b.jpg\r\nimages/train/a.jpg\r\n")
    assert [r["image_id"] for r in load_yolo(f"{tmp_path}/data.yaml", "train")] == ["b", "a"]
    write(f"{tmp_path}/train.txt", "images/train/für.jpg".encode("latin-1"))
    with pytest.raises(ValueError, match="train.txt' is not UTF-8 text"):
        load_yolo(f"{tmp_path}/data.yaml", "train")


def test_labels_next_to_images(tmp_path):
    write(tmp_path / "data.yaml", json.dumps({"train": "pics", "names": CLASSES}))
    write(tmp_path / "pics/a.png", make_image())
    write(tmp_path / "pics/a.txt", "1 0.5 0.5 1 1")
    assert len(load_yolo(f"{tmp_path}/data.yaml", "train")[0]["annotations"]) == 1


def test_yolo_in_an_object_store(tmp_path):
    uri = write_yolo("memory://yolo/set", train="./images/train")
    check_datasets_exist(uri)
    dicts = DatasetCatalog.get(uri)
    assert [len(record["annotations"]) for record in dicts] == [2, 0]
    assert dicts[0]["file_name"] == "memory://yolo/set/images/train/a.jpg"


def test_register_yolo_drops_empty_boxes_and_duplicates(tmp_path, log):
    write_yolo(tmp_path, {"a": "1 0.5 0.5 0 1\n0 0.5 0.5 1 1\n0 0.5 0.5 1 1\n"})
    register_yolo("yolo_test", f"{tmp_path}/data.yaml", "val", empty_boxes="drop")
    register_yolo("yolo_test", f"{tmp_path}/data.yaml", "val", empty_boxes="drop", overwrite=True)
    assert len(DatasetCatalog.get("yolo_test")[0]["annotations"]) == 1
    assert "left out 1 objects whose box has no area" in log.text
    assert "left out 1 duplicate lines" in log.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 1", "4 values; there must be 5"),
        ("0 0.1 0.1 0.2 0.2 0.3", "6 values; there must be 5"),
        ("0 0.5 0.5 x 1", "could not convert string to float: 'x'"),
        ("crow 0.5 0.5 1 1", "the class 'crow' is not a number"),
        ("3 0.5 0.5 1 1", r"class 3 is not in 0..2, the 3 classes of .*data.yaml"),
        ("1.5 0.5 0.5 1 1", r"class 1.5 is not in 0..2"),
        ("0 20 15 8 8", "20 is outside 0..1; .* not pixels"),
        ("0 0.5 0.5 nan 1", "not finite"),
        ("0 0.5 0.5 0 1", r"no area: 0 0.5 0.5 0 1. .*\?empty_boxes=drop"),
        ("0 0.1 0.1 0.1 0.3 0.1 0.2", "no area"),
    ],
)
def test_error_names_label_file_and_line(tmp_path, line, message):
    write_yolo(tmp_path, {"a": f"0 0.5 0.5 1 1\n\n{line}\n"})
    with pytest.raises(ValueError, match=f"labels/train/a.txt, line 3: .*{message}"):
        load_yolo(f"{tmp_path}/data.yaml", "train")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"names": None}, ValueError, "'names' must list the classes"),
        ({"nc": 4}, ValueError, "'nc' is 4, but 'names' has 3"),
        ({"train": None, "val": None}, ValueError, "none of the keys 'train', 'val' and 'test'"),
        ({"train": 3}, ValueError, "'train' must be a folder"),
        ({"train": "nowhere"}, FileNotFoundError, "'nowhere' was not found. Looked for: .*/nowhere"),
        ({"train": None}, ValueError, "no split 'train', only: val"),
        ({"kpt_shape": [3]}, ValueError, "'kpt_shape' must be"),
        ({"kpt_shape": [3, 3], "flip_idx": [0, 1]}, ValueError, "'flip_idx' must hold each of 0 to 2"),
        ({"kpt_shape": [2, 3], "flip_idx": ["1", "0"]}, ValueError, "'flip_idx' must hold each of 0 to 1"),
        ({"kpt_shape": [3, 3], "flip_idx": [1, 2, 0]}, ValueError, "in pairs: 0 becomes 1, but 1 becomes 2"),
        ({"kpt_shape": [3, 3], "kpt_names": ["a"]}, ValueError, "'kpt_names' must name 3"),
        ({"kpt_shape": [1, 3]}, ValueError, r"a.txt, line 1: 5 values; .* must be 8"),
    ],
)
def test_error_names_the_key_of_data_yaml(tmp_path, keys, error, message):
    uri = write_yolo(tmp_path, **keys)
    with pytest.raises(error, match=message):
        DatasetCatalog.get(uri)


def test_malformed_data_yaml_is_refused(tmp_path):
    for text, message in (("- a\n", "not a list"), ("a: [", "not valid YAML")):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_yolo(f"{tmp_path}/data.yaml", "train")
    with pytest.raises(FileNotFoundError, match=r"no.yaml' does not exist"):
        load_yolo(f"{tmp_path}/no.yaml", "train")
    with pytest.raises(ValueError, match="yolo:DATA.yaml@SPLIT"):
        DatasetCatalog.get("yolo:data.yaml")
