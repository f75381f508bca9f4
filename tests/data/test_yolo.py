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


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("train/a.jpg", "train/a.txt"),
        ("images/train/a.jpg", "images/train/a.txt"),
        ("Images/train/a.jpg", "Labels/train/a.txt"),
        ("img/a.jpg", "labels/a.txt"),
        ("images/a.jpg", "labels/a.TXT"),
        ("train/imgs/a.jpg", "train/Label/a.txt"),
        ("train/a.jpg", "labels/train/a.txt"),
        ("train/a.jpg", "train/labels/a.txt"),
    ],
)
def test_labels_are_found_in_other_folders(tmp_path, image, label, log):
    write(f"{tmp_path}/{image}", make_image())
    write(f"{tmp_path}/{label}", "0 0.5 0.5 0.5 0.5\n")
    write(f"{tmp_path}/data.yaml", f"train: {image.rpartition('/')[0]}\nnames: [owl]\n")
    uri = f"yolo:{tmp_path}/data.yaml@train"
    assert [a["bbox"] for a in DatasetCatalog.get(uri)[0]["annotations"]] == [[10, 7.5, 30, 22.5]]
    assert not check_dataset(uri).num_errors
    if label != "train/a.txt":
        assert f"{tmp_path}/{label}" in log.text


def test_images_without_labels_are_counted_and_none_with_labels_is_an_error(tmp_path, log):
    uri = write_yolo(tmp_path)
    write(f"{tmp_path}/images/train/c.jpg", make_image())
    assert len(DatasetCatalog.get(uri)) == 3
    assert "labels were found for 1 of 3 images" in log.text and "labels/train/b.txt" in log.text
    (tmp_path / "labels/train/a.txt").unlink()
    with pytest.raises(
        ValueError, match=r"none of the 3 images has a label file. Looked for: .*labels/train/a.txt"
    ):
        DatasetCatalog.get(uri)
    assert "no-labels" in {f.kind for f in check_dataset(uri).findings}


OBB = "0 0.25 0.1 0.75 0.1 0.75 0.5 0.25 0.5\n"


def test_lines_with_four_points_are_oriented_boxes(tmp_path):
    uri = write_yolo(tmp_path, {"a": OBB})
    (annotation,) = DatasetCatalog.get(uri)[0]["annotations"]
    assert annotation == {"category_id": 0, "bbox": [20, 9, 20, 12, 0], "bbox_mode": BoxMode.XYWHA_ABS}
    assert MetadataCatalog.get(uri).evaluator_type == "rotated_coco"
    assert not check_dataset(uri).num_errors
    as_polygons = f"{uri}?boxes=axis-aligned"
    (annotation,) = DatasetCatalog.get(as_polygons)[0]["annotations"]
    assert annotation["segmentation"] == [[10, 3, 30, 3, 30, 15, 10, 15]] and annotation["bbox"] == [
        10,
        3,
        30,
        15,
    ]
    assert MetadataCatalog.get(as_polygons).evaluator_type == "coco"


def test_oriented_boxes_among_other_lines_are_polygons_with_a_warning(tmp_path, log):
    uri = write_yolo(tmp_path, {"a": OBB + "0 0.5 0.5 0.2 0.2\n"})
    assert ["segmentation" in a for a in DatasetCatalog.get(uri)[0]["annotations"]] == [True, False]
    assert (
        "1 lines are boxes and 1 are polygons" in log.text
        and "oriented boxes are recognized only if" in log.text
    )
    assert MetadataCatalog.get(uri).evaluator_type == "coco"


def test_darknet_files_of_cvat(tmp_path):
    write(
        f"{tmp_path}/obj.data",
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
    )
    write(f"{tmp_path}/obj.names", "owl\nwren\n")
    write(f"{tmp_path}/train.txt", "data/obj_train_data/b.jpg\ndata/obj_train_data/a.jpg\n")
    for name in "ab":
        write(f"{tmp_path}/obj_train_data/{name}.jpg", make_image())
    write(f"{tmp_path}/obj_train_data/a.txt", "1 0.5 0.5 0.5 0.5\n")
    for uri in (f"yolo:{tmp_path}/obj.data@train", f"dir:{tmp_path}"):
        assert [(r["image_id"], len(r["annotations"])) for r in DatasetCatalog.get(uri)] == [
            ("b", 0),
            ("a", 1),
        ]
        assert MetadataCatalog.get(uri).thing_classes == ["owl", "wren"]
    with pytest.raises(ValueError, match="no split 'val', only: train"):
        DatasetCatalog.get(f"yolo:{tmp_path}/obj.data@val")


def test_class_lists_of_label_studio_and_labelimg(tmp_path):
    write(f"{tmp_path}/classes.txt", "owl\nwren\n")
    write(f"{tmp_path}/images/a.jpg", make_image())
    write(f"{tmp_path}/labels/a.txt", "1 0.5 0.5 0.5 0.5\n")
    for uri in (f"yolo:{tmp_path}", f"dir:{tmp_path}"):
        assert [a["category_id"] for a in DatasetCatalog.get(uri)[0]["annotations"]] == [1]
    write(f"{tmp_path}/flat/classes.txt", "owl\n")
    write(f"{tmp_path}/flat/a.jpg", make_image())
    write(f"{tmp_path}/flat/a.txt", "0 0.5 0.5 0.5 0.5\n")
    assert len(DatasetCatalog.get(f"dir:{tmp_path}/flat")[0]["annotations"]) == 1


def test_darknet_labels_of_roboflow(tmp_path):
    for split in ("train", "valid"):
        write(f"{tmp_path}/{split}/_darknet.labels", "owl\nwren\n")
        write(f"{tmp_path}/{split}/a.jpg", make_image())
        write(f"{tmp_path}/{split}/a.txt", "1 0.5 0.5 0.5 0.5\n")
    for uri in (f"yolo:{tmp_path}@val", f"dir:{tmp_path}@val"):
        (record,) = DatasetCatalog.get(uri)
        assert record["file_name"] == f"{tmp_path}/valid/a.jpg" and len(record["annotations"]) == 1


@pytest.mark.parametrize(
    "line", [r"C:\data\images\train\a.jpg", "/content/set/images/train/a.jpg", r"images\train\a.jpg"]
)
def test_lists_of_another_machine(tmp_path, line):
    uri = write_yolo(tmp_path, train="list.txt")
    (tmp_path / "list.txt").write_text(f"{line}\n{line.replace('a.jpg', 'b.jpg')}\n")
    assert [r["file_name"] for r in DatasetCatalog.get(uri)] == [
        f"{tmp_path}/images/train/{n}.jpg" for n in "ab"
    ]


def test_class_names_are_read_as_written(tmp_path):
    uri = write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [yes, no, 007, 1.0, null, 2024-01-01]\n")
    assert MetadataCatalog.get(uri).thing_classes == ["yes", "no", "007", "1.0", "null", "2024-01-01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\nnc: 99999999999\n", "'nc' must be from 1 to 100000"),
        ("train: images/train\nnames: [a]\nkpt_shape: [99999999999, 3]\n", "'kpt_shape' must be"),
        ("train: images/train\nnames: {0: [a, b]}\n", "'names' must list the classes"),
        ("train: images/train\nnames: &a [*a]\n", "'names' must list the classes|not valid YAML"),
        (
            "a: &a [x]\nb: &b [*a, *a]\nnames: [*b, *b]\ntrain: x\n",
            "'names' must list the classes, got a list",
        ),
        ("names: [a]\ntrain: " + "[" * 2000, "not valid YAML"),
        (
            "a0: &a0 [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
            + "names: [a]\ntrain: *a19\n",
            "not valid YAML.*aliases would expand",
        ),
    ],
)
def test_hostile_data_yaml_is_refused_quickly(tmp_path, text, message):
    uri = write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.yaml.*({message})"):
        DatasetCatalog.get(uri)


def test_hidden_files_of_macos_are_not_images(tmp_path):
    uri = write_yolo(tmp_path)
    write(f"{tmp_path}/images/train/._a.jpg", b"\0\5\x16\7")
    assert len(DatasetCatalog.get(uri)) == 2
