"""Parsing of dataset URIs, errors of malformed ones, and metadata of COCO files."""

import json

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.formats import FORMATS

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
    "categories": [
        {"id": 2, "name": "dog"},
        {
            "id": 5,
            "name": "cat",
            "keypoints": ["nose", "left_ear", "right_ear"],
            "skeleton": [[1, 2], [1, 3]],
        },
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 3, 3]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1, 1, 0, 3]},
    ],
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "some@folder"
    (folder / "images").mkdir(parents=True)
    (folder / "ann.json").write_text(json.dumps(COCO))
    yield folder
    for name in MetadataCatalog.list():
        if str(tmp_path) in name:
            MetadataCatalog.remove(name)


def test_coco_uri_with_option(folder):
    uri = f"coco:{folder}/ann.json@{folder}/images?empty_boxes=drop"
    check_datasets_exist(uri)
    metadata = MetadataCatalog.get(uri)
    assert metadata.thing_classes == ["dog", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1}
    assert metadata.json_file == f"{folder}/ann.json" and metadata.evaluator_type == "coco"
    assert metadata.keypoint_names == ["nose", "left_ear", "right_ear"]
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_ear"),
        ("nose", "right_ear"),
    ]
    dicts = DatasetCatalog.get(uri)
    assert dicts[0]["file_name"] == f"{folder}/images/a.png"
    assert [a["category_id"] for a in dicts[0]["annotations"]] == [1]


def test_coco_box_without_area_is_an_error_by_default(folder):
    with pytest.raises(ValueError, match=r"ann.json: annotation 2 of image .*a.png.*\?empty_boxes=drop"):
        DatasetCatalog.get(f"coco:{folder}/ann.json@{folder}/images")


def test_coco_uri_expands_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    check_datasets_exist("coco:~/ann.json@~/images")


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("coco:ann.json", ValueError, "'coco:ann.json': it must be coco:ANNOTATIONS.json@IMAGE_DIR"),
        ("coco:ann.json@", ValueError, "file or folder is missing"),
        ("coco:@images", ValueError, "file or folder is missing"),
        (
            "coco:FOLDER/no.json@FOLDER/images",
            FileNotFoundError,
            "the annotation file '.*no.json' does not exist",
        ),
        (
            "coco:FOLDER/ann.json@FOLDER/no",
            FileNotFoundError,
            "the image folder '.*/no' does not exist",
        ),
        (
            "coco:FOLDER/ann.json@FOLDER/images?empty=1",
            ValueError,
            "no option 'empty', only crowd, empty_boxes",
        ),
        ("coco:FOLDER/ann.json@FOLDER/images?empty_boxes=x", ValueError, "'error' or 'drop', not 'x'"),
        ("shapes:train?num", ValueError, "'num' is not of the form key=value"),
        ("shapes:train?nun=3", ValueError, "no option 'nun', only num, size, .* Did you mean 'num'"),
        ("shapes:train?num=many", ValueError, "num='many' is not an integer"),
        ("shapes:train?size=8", ValueError, "size=8 is out of range: 32 to 1024"),
        (
            "shapes:train?task=panoptics",
            ValueError,
            "no task 'panoptics', only instances, panoptic, stuff.*'panoptic'",
        ),
        ("shapes:test", ValueError, "no split 'test', only 'train' and 'val'"),
        ("ftp:x", KeyError, ", ".join(f"{name}:..." for name in sorted(FORMATS))),
    ],
)
def test_error_names_the_invalid_part_of_a_uri(folder, uri, error, message):
    uri = uri.replace("FOLDER", str(folder))
    for use in (check_datasets_exist, DatasetCatalog.get):
        with pytest.raises(error, match=message):
            use(uri)


def keypoint_categories(names, **more):
    return {**COCO, "categories": [{"id": i, "name": f"c{i}", "keypoints": names, **more} for i in (2, 5)]}


def test_keypoint_names_and_skeletons_of_other_tools(tmp_path, log):
    """Names with capitals, connections counted from 0 or null, also in Roboflow's export."""
    content = keypoint_categories(["Left Ear", "nose", "Right Ear"], skeleton=[[0, 1], [1, 2], [2, 7]])
    (tmp_path / "a.json").write_text(json.dumps(content))
    metadata = MetadataCatalog.get(f"coco:{tmp_path}/a.json@{tmp_path}")
    assert metadata.keypoint_flip_map == [("Left Ear", "Right Ear")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [("Left Ear", "nose")]
    assert "left out 2 connections in 'skeleton' that are not pairs of numbers from 1 to 3" in log.text
    assert "swaps no keypoints" not in log.text
    (tmp_path / "train").mkdir()
    content = keypoint_categories(["l", "r"], skeleton=None)
    (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
    metadata = MetadataCatalog.get(f"roboflow:{tmp_path}@train")
    assert (metadata.keypoint_names, metadata.keypoint_flip_map) == (["l", "r"], [])
    assert metadata.keypoint_connection_rules == []
    assert "a horizontal flip swaps no keypoints" in log.text


@pytest.mark.parametrize("names", ["nose", [1, 2], ["nose", "nose"]])
def test_malformed_keypoint_names_are_refused_and_dropped_by_the_checker(tmp_path, names):
    (tmp_path / "a.json").write_text(json.dumps(keypoint_categories(names)))
    with pytest.raises(
        ValueError, match="a.json: category 'c2': the keypoints must be a list of distinct names"
    ):
        MetadataCatalog.get(f"coco:{tmp_path}/a.json@{tmp_path}")
    checked = check_dataset(f"coco:{tmp_path}/a.json@{tmp_path}", images=False)
    assert [f.kind for f in checked.findings].count("category-broken") == 2
    assert not any("keypoints" in category for category in checked.repaired["categories"])


def test_error_for_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"is a zip archive. Unpack it with: unzip .*set.zip -d .*set\nThen read dir:"
    ):
        check_datasets_exist(f"dir:{tmp_path}/set.zip@train")
    with pytest.raises(ValueError, match="is a zip archive"):
        check_datasets_exist(f"{tmp_path}/set.zip")
    (tmp_path / "set.txt").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="set.txt' is a file, not a folder"):
        check_datasets_exist(f"dir:{tmp_path}/set.txt@train")
