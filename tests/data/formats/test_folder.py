"""Detection of a folder's format, Roboflow's exports, and all formats in an object store."""

import json

import pytest

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detlib.data.build import images_per_epoch
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.datasets import load_roboflow, register_roboflow
from detlib.data.detection_utils import read_image
from tests.data.small_datasets import (
    CLASSES,
    coco_content,
    make_image,
    write,
    write_coco,
    write_roboflow,
    write_voc,
    write_yolo,
)

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "roboflow": write_roboflow}


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    before = MetadataCatalog.list()
    yield
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)
    DatasetCatalog.pop("birds_test", None)


@pytest.mark.parametrize("scheme", WRITERS)
def test_every_format_is_read_from_an_object_store(scheme):
    uri = WRITERS[scheme](f"memory://front/{scheme}")
    check_datasets_exist(uri)
    dicts = DatasetCatalog.get(uri)
    assert len(dicts) == 2 and any(record["annotations"] for record in dicts)
    assert MetadataCatalog.get(uri).thing_classes == CLASSES
    for record in dicts:
        assert record["file_name"].startswith("memory://front/")
        assert read_image(record["file_name"], "RGB").shape == (30, 40, 3)
    found = DatasetCatalog.get(f"dir:memory://front/{scheme}")
    assert found == dicts


@pytest.mark.parametrize("scheme", WRITERS)
def test_dir_detects_every_format(scheme, tmp_path, log):
    uri = WRITERS[scheme](tmp_path / "set")
    name = f"dir:{tmp_path}/set"
    check_datasets_exist(name)
    assert DatasetCatalog.get(name) == DatasetCatalog.get(uri)
    assert f"{name} is read as {uri}: found" in log.text
    assert MetadataCatalog.get(name).thing_classes == CLASSES


def test_roboflow_root_category_is_not_a_class(tmp_path):
    uri = write_roboflow(tmp_path, "valid")
    assert MetadataCatalog.get(uri).thing_dataset_id_to_contiguous_id == {3: 0, 5: 1, 7: 2}
    assert DatasetCatalog.get(f"roboflow:{tmp_path}@val") == DatasetCatalog.get(uri)
    register_roboflow("birds_test", str(tmp_path), "valid")
    assert [a["category_id"] for a in DatasetCatalog.get("birds_test")[0]["annotations"]] == [2, 0, 1]
    file = tmp_path / "valid/_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    with_root = f"roboflow:{tmp_path}@validation"
    assert MetadataCatalog.get(with_root).thing_classes == ["birds", *CLASSES]
    with pytest.raises(FileNotFoundError, match="has the splits: valid"):
        load_roboflow(str(tmp_path), "train")


def test_dir_finds_coco_files_and_images_of_each_split(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"annotations/instances_{split}2017.json", json.dumps(coco_content()))
        write(tmp_path / f"{split}2017/a.jpg", make_image())
    assert DatasetCatalog.get(f"dir:{tmp_path}@val")[0]["file_name"] == f"{tmp_path}/val2017/a.jpg"
    assert DatasetCatalog.get(f"dir:{tmp_path}")[0]["file_name"] == f"{tmp_path}/train2017/a.jpg"


def test_dir_names_coco_files_whose_images_are_missing(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photographs")
    with pytest.raises(
        FileNotFoundError, match="ann.json' is in COCO's format, but its first image, 'a.jpg'"
    ):
        DatasetCatalog.get(f"dir:{tmp_path}")
    (tmp_path / "photographs").rename(tmp_path / "data")
    assert len(DatasetCatalog.get(f"dir:{tmp_path}@ann")) == 2


def test_dir_passes_options_on(tmp_path):
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 1, 0, 4]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="empty_boxes=drop"):
        DatasetCatalog.get(f"dir:{tmp_path}")
    assert len(DatasetCatalog.get(f"dir:{tmp_path}?empty_boxes=drop")[0]["annotations"]) == 2


def test_dir_lists_what_it_searched_for_if_it_finds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder '/nowhere' does not exist"):
        check_datasets_exist("dir:/nowhere")
    write(tmp_path / "labels/a.txt", "0 0.5 0.5 1 1")
    with pytest.raises(FileNotFoundError) as error:
        check_datasets_exist(f"dir:{tmp_path}")
    message = str(error.value)
    for scheme in ("yolo: data.yaml", "roboflow: SPLIT/_annot", "voc: Annotations", "coco: *.json"):
        assert scheme in message
    assert "The folder has: labels." in message


def test_dir_refuses_unknown_splits_and_ambiguous_folders(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(ValueError, match="no split 'tarin', only: train. Did you mean 'train'"):
        check_datasets_exist(f"dir:{tmp_path}@tarin")
    write_yolo(tmp_path)
    with pytest.raises(ValueError, match=f"like voc and like yolo; .* voc:{tmp_path}@train or yolo:"):
        check_datasets_exist(f"dir:{tmp_path}")
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    with pytest.raises(ValueError, match="none of the keys 'train', 'val' and 'test'"):
        check_datasets_exist(f"dir:{tmp_path}")


@pytest.mark.parametrize(
    ("filter_empty", "logged"), [(True, "dropped 1 of 2 images"), (False, "kept 1 of 2 images")]
)
def test_images_without_objects_are_counted(tmp_path, filter_empty, logged, log):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (write_coco(tmp_path),)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_detection_train_loader(cfg)
    assert images_per_epoch(loader) == 2 - filter_empty
    assert log.text.count("DATALOADER.FILTER_EMPTY_ANNOTATIONS") == 1 and logged in log.text


def test_dir_one_level_above_or_below_the_dataset(tmp_path):
    write_yolo(tmp_path / "birds")
    expected = DatasetCatalog.get(f"yolo:{tmp_path}/birds/data.yaml@train")
    for path in (tmp_path, tmp_path / "birds/images/train"):
        assert DatasetCatalog.get(f"dir:{path}") == expected
    uri = write_roboflow(tmp_path / "fish", "valid")
    assert DatasetCatalog.get(f"dir:{tmp_path}/fish/valid") == DatasetCatalog.get(uri)


@pytest.mark.parametrize(
    ("annotations", "image"),
    [
        ("annotations/instances_default.json", "images/default/a.jpg"),  # CVAT
        ("annotations/instances_default.json", "images/a.jpg"),
        ("annotations/instances_Train.json", "images/Train/a.jpg"),
        ("annotations/instances_Train.json", "Train/a.jpg"),
        ("_annotations.json", "a.jpg"),
        ("annotations/person_keypoints_val2017.json", "val2017/a.jpg"),
    ],
)
def test_dir_finds_the_images_of_coco_files(tmp_path, annotations, image):
    write(tmp_path / annotations, json.dumps(coco_content()))
    write(tmp_path / image, make_image())
    assert DatasetCatalog.get(f"dir:{tmp_path}")[0]["file_name"] == str(tmp_path / image)


def test_missing_first_image_does_not_hide_a_coco_dataset(tmp_path):
    write_coco(tmp_path, images=("b.jpg",))
    assert [r["file_name"] for r in DatasetCatalog.get(f"dir:{tmp_path}")][1] == f"{tmp_path}/images/b.jpg"


@pytest.mark.parametrize("stated", [r"images\a.jpg", r"C:\data\images\a.jpg", "/content/set/images/a.jpg"])
def test_coco_paths_of_another_machine(tmp_path, stated, log):
    content = coco_content()
    content["images"][0]["file_name"] = stated
    content["images"][1]["file_name"] = stated.replace("a.jpg", "b.jpg")
    write_coco(tmp_path, content)
    expected = [f"{tmp_path}/images/{name}.jpg" for name in "ab"]
    for uri in (f"coco:{tmp_path}/ann.json@{tmp_path}/images", f"dir:{tmp_path}"):
        assert [record["file_name"] for record in DatasetCatalog.get(uri)] == expected
    assert log.text.count("does not exist under this path") == 2  # once for each loading


@pytest.mark.parametrize("name", ["", "/data.yaml"])
def test_plain_paths_are_datasets(tmp_path, name):
    uri = write_yolo(tmp_path)
    check_datasets_exist(f"{tmp_path}{name}")
    assert DatasetCatalog.get(f"{tmp_path}{name}") == DatasetCatalog.get(uri)
    assert MetadataCatalog.get(f"{tmp_path}{name}").thing_classes == CLASSES


def test_plain_path_of_a_coco_file(tmp_path):
    uri = write_coco(tmp_path)
    assert DatasetCatalog.get(f"{tmp_path}/ann.json") == DatasetCatalog.get(uri)
    (tmp_path / "images").rename(tmp_path / "photographs")
    with pytest.raises(
        FileNotFoundError, match=r"none of its first images, such as 'a.jpg'.*ann.json@IMAGE_DIR"
    ):
        DatasetCatalog.get(f"{tmp_path}/./ann.json")


def test_unknown_name_that_is_not_a_path_is_a_key_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    for name in ("birds", "birds_train", "no/such/folder", "no.json"):
        with pytest.raises(KeyError, match="is not registered"):
            DatasetCatalog.get(name)
    assert MetadataCatalog.get("birds").as_dict() == {"name": "birds"}


def crowd_content():
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    return content


def test_objects_that_are_all_crowd_regions_are_reported_and_can_be_used(tmp_path, log):
    uri = write_coco(tmp_path, crowd_content())
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (uri,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    with pytest.raises(ValueError, match=r"all 3 are crowd regions .*\?crowd=objects"):
        build_detection_train_loader(cfg)
    checked = check_dataset(uri)
    assert [f.kind for f in checked.findings if f.severity == "error"] == ["all-crowd"]
    assert [a["iscrowd"] for a in checked.repaired["annotations"]] == [0, 0, 0]
    for name in (f"{uri}?crowd=objects", f"dir:{tmp_path}?crowd=objects"):
        cfg.DATASETS.TRAIN = (name,)
        assert images_per_epoch(build_detection_train_loader(cfg)) == 1
        assert [a["iscrowd"] for a in DatasetCatalog.get(name)[0]["annotations"]] == [0, 0, 0]
    assert "crowd regions (iscrowd 1), which are not trained on" in log.text


def test_options_of_dir_are_those_of_the_format(tmp_path):
    write_voc(tmp_path)
    assert DatasetCatalog.get(f"dir:{tmp_path}?one_based=1")
    with pytest.raises(ValueError, match="no option 'crowd', only one_based, empty_boxes"):
        DatasetCatalog.get(f"dir:{tmp_path}?crowd=objects")
