"""Loading, refusing and writing COCO files, and the error messages."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import convert_to_coco_json, load_coco_json, register_coco_instances
from detlib.data.datasets.builtin_meta import COCO_CATEGORIES
from detlib.data.datasets.coco import read_coco_json
from detlib.structures import BoxMode

NAME = "coco_test"
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 1.0, 7.0]
FULL = {"size": [20, 30], "counts": [0, 600]}


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    caplog.set_level(logging.INFO, "detlib")
    return caplog


@pytest.fixture(autouse=True)
def forget():
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def annotation(**changes):
    base = {
        "id": 1,
        "image_id": 7,
        "category_id": 4,
        "bbox": [1.0, 1.0, 8.0, 6.0],
        "iscrowd": 0,
        "area": 24.0,
    }
    return {**base, "segmentation": [TRIANGLE], **changes}


def content(*annotations, **changes):
    return {
        "images": [
            {"id": 9, "file_name": "nine.png", "height": 20, "width": 30},
            {"id": 7, "file_name": "sub/seven.png", "height": 20, "width": 30},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": list(annotations),
        **changes,
    }


@pytest.fixture
def load(tmp_path):
    def load(coco, **kwargs):
        path = tmp_path / "ann.json"
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return load_coco_json(str(path), "/images", NAME, **kwargs)

    return load


def test_dicts_and_metadata_of_a_coco_file(load, log):
    second = annotation(id=2, category_id=9, segmentation=FULL, iscrowd=1, note="hm", score=3)
    dicts = load(content(annotation(), second), extra_annotation_keys=["note"])
    assert [(d["image_id"], d["file_name"]) for d in dicts] == [
        (7, "/images/sub/seven.png"),
        (9, "/images/nine.png"),
    ]
    assert dicts[0]["height"] == 20 and dicts[0]["width"] == 30 and dicts[1]["annotations"] == []
    first, second = dicts[0]["annotations"]
    assert first == {
        "iscrowd": 0,
        "bbox": [1.0, 1.0, 8.0, 6.0],
        "category_id": 0,
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": [TRIANGLE],
    }
    assert second["category_id"] == 1 and second["iscrowd"] == 1 and second["note"] == "hm"
    assert "score" not in second
    assert mask_utils.decode(second["segmentation"]).all(), "RLE lists are compressed"
    metadata = MetadataCatalog.get(NAME)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    assert "4 -> 0 cat, 9 -> 1 dog" in log.text
    assert not [record for record in log.records if record.levelno > logging.INFO]


def test_category_ids_are_kept_without_a_dataset_name(tmp_path):
    path = tmp_path / "ann.json"
    path.write_text(json.dumps(content(annotation())))
    assert load_coco_json(str(path), "")[0]["annotations"][0]["category_id"] == 4


def test_optional_keys_may_be_missing(load):
    bare = {"image_id": 7, "category_id": 4, "bbox": [1, 1, 8, 6]}
    dicts = load(content(bare, {**bare}))
    assert [a["iscrowd"] for a in dicts[0]["annotations"]] == [0, 0]
    coco = content()
    del coco["annotations"]
    assert [d["annotations"] for d in load(coco)] == [[], []]


def test_keypoints_are_moved_to_pixel_centers(load):
    dicts = load(content(annotation(keypoints=[3, 4, 2, 0, 0, 0], num_keypoints=1)))
    assert dicts[0]["annotations"][0]["keypoints"] == [3.5, 4.5, 2, 0.5, 0.5, 0]


def test_annotations_left_out_are_logged(load, log):
    line = annotation(id=2, segmentation=[[1, 1, 2, 2]])
    partly = annotation(id=3, segmentation=[[1, 1, 2, 2], TRIANGLE])
    dicts = load(content(annotation(), line, partly, annotation(id=4, image_id=1000)))
    assert [a["segmentation"] for a in dicts[0]["annotations"]] == [[TRIANGLE], [TRIANGLE]]
    assert "left out 1 annotations without a polygon" in log.text
    assert "left out 1 annotations of images that the file does not list" in log.text


@pytest.mark.parametrize("box", [[3, 3, 0, 5], [3, 3, 5, 0], [3, 3, -2, 5], [3, 3, float("nan"), 5]])
def test_box_without_area_is_an_error_or_left_out(load, log, box):
    bad = content(annotation(), annotation(id=77, bbox=box))
    with pytest.raises(
        ValueError, match=r"ann.json: annotation 77 of image '/images/sub/seven.png'.*without area"
    ):
        load(bad)
    assert len(load(bad, empty_boxes="drop")[0]["annotations"]) == 1
    assert "left out 1 annotations whose box has no area" in log.text
    with pytest.raises(ValueError, match="empty_boxes must be"):
        load(bad, empty_boxes="ignore")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 5}, "category id 5, which is not in the file's list of 2 categories .ids 4 to 9."),
        ({"category_id": None}, "category id None"),
        ({"category_id": [4]}, r"category id \[4\], which is not"),
        ({"bbox": [1, 2, 3]}, r"the bbox \[1, 2, 3\]"),
        ({"bbox": None}, "the bbox None"),
        ({"segmentation": "abc"}, "neither polygons nor an RLE mask"),
        ({"keypoints": [1, 2]}, "not triples"),
        ({"id": 1}, "same id"),
    ],
)
def test_errors_name_file_image_and_annotation(load, changes, message):
    bad = annotation(**{"id": 77, **changes})
    with pytest.raises(
        ValueError, match=rf"ann.json: annotation {bad['id']} of image '.*seven.png'.*{message}"
    ):
        load(content(annotation(), bad))


@pytest.mark.parametrize(
    ("coco", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object.*list"),
        (content(images=[]), "has no images"),
        (content(categories=[]), "has no categories"),
        (content(images=[{"id": 1, "file_name": "a.png", "width": 3}]), "image 'a.png' has no 'height'"),
        (content(images=[{"id": 1, "width": 3, "height": 3}]), "image 1 has no 'file_name'"),
        (
            content(images=[{"id": 1, "file_name": "a.png", "width": 0, "height": 3}]),
            "'a.png' has width 0 and height 3",
        ),
        (
            content(images=[{"id": 1, "file_name": "a.png", "width": 2.5, "height": 3}]),
            "'a.png' has width 2.5 and height 3; both must be integers above 0",
        ),
        (
            content(images=[{"id": 1, "file_name": f"{i}.png", "width": 3, "height": 3} for i in "ab"]),
            "the id 1",
        ),
        (
            content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
            r"2 categories have the same id 1: \['a', 'b'\]",
        ),
        (content(categories=[{"id": 1}]), "no 'name'"),
    ],
)
def test_malformed_file_is_refused(load, coco, message):
    with pytest.raises(ValueError, match=f"ann.json.*{message}"):
        load(coco)


def test_values_as_other_tools_write_them(load, log):
    """Sizes as floats, null for no keypoints, and ids of types that are not hashable."""
    images = [{"id": 7, "file_name": "a.png", "height": 20.0, "width": 30.0}]
    odd = [annotation(keypoints=None), annotation(id=[2]), annotation(id=3, image_id=[7])]
    (record,) = load(content(*odd, images=images))
    assert (record["height"], record["width"]) == (20, 30) and isinstance(record["height"], int)
    assert [("keypoints" in a) for a in record["annotations"]] == [False, False]
    assert "left out 1 annotations of images that the file does not list" in log.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_the_annotation_file(tmp_path, encoding):
    named = content(annotation(), categories=[{"id": 4, "name": "größe"}])
    (tmp_path / "ann.json").write_bytes(json.dumps(named, ensure_ascii=False).encode(encoding))
    assert read_coco_json(str(tmp_path / "ann.json"))["categories"][0]["name"] == "größe"


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="/nowhere/ann.json"):
        load_coco_json("/nowhere/ann.json", "")


def test_register_coco_instances(tmp_path):
    path = tmp_path / "ann.json"
    path.write_text(json.dumps(content(annotation())))
    register_coco_instances(NAME, {"color": 3}, path, tmp_path)
    metadata = MetadataCatalog.get(NAME)
    assert (metadata.json_file, metadata.evaluator_type, metadata.color) == (str(path), "coco", 3)
    assert len(DatasetCatalog.get(NAME)) == 2 and metadata.thing_classes == ["cat", "dog"]
    with pytest.raises(ValueError, match="overwrite=True"):
        register_coco_instances(NAME, {}, path, tmp_path)
    path.write_text(json.dumps(content(categories=[{"id": 1, "name": "bird"}])))
    register_coco_instances(NAME, {}, path, tmp_path, overwrite=True)
    DatasetCatalog.get(NAME)
    assert MetadataCatalog.get(NAME).thing_classes == ["bird"]
    with pytest.raises(TypeError, match="json_file.*None"):
        register_coco_instances(NAME, {}, None, tmp_path, overwrite=True)


def test_convert_and_read_back(load, tmp_path):
    """Writing restores ids, boxes, masks and keypoints; areas are those of the masks."""
    box_only = annotation(id=2, keypoints=[3, 4, 2, 0, 0, 0])
    del box_only["segmentation"]
    original = content(annotation(), box_only, annotation(id=3, category_id=9, segmentation=FULL, iscrowd=1))
    dicts = load(original)
    DatasetCatalog.register(NAME, lambda: dicts)
    output = tmp_path / "new" / "out.json"
    convert_to_coco_json(NAME, str(output))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(output))
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == {4: "cat", 9: "dog"}
    assert sorted(coco.imgs) == [7, 9]
    polygon, box, crowd = coco.loadAnns([1, 2, 3])
    assert polygon["bbox"] == [1, 1, 8, 6] and polygon["area"] == 24 and polygon["segmentation"] == [TRIANGLE]
    assert box["area"] == 48 and "segmentation" not in box
    assert box["keypoints"] == [3, 4, 2, 0, 0, 0] and box["num_keypoints"] == 1
    assert crowd["area"] == 600 and crowd["iscrowd"] == 1 and crowd["category_id"] == 9
    assert coco.annToMask(crowd).all()
    again = load_coco_json(str(output), "", NAME)
    assert [[a["bbox"] for a in d["annotations"]] for d in again] == [
        [a["bbox"] for a in d["annotations"]] for d in dicts
    ]


def test_convert_replaces_outdated_files(load, tmp_path):
    dicts = load(content(annotation()))
    DatasetCatalog.register(NAME, lambda: dicts)
    output = tmp_path / "out.json"
    convert_to_coco_json(NAME, str(output))
    written = output.stat().st_mtime_ns
    convert_to_coco_json(NAME, str(output))
    assert output.stat().st_mtime_ns == written
    dicts[0]["annotations"].append(dicts[0]["annotations"][0])
    convert_to_coco_json(NAME, str(output))
    assert len(json.loads(output.read_text())["annotations"]) == 2


def test_convert_box_modes_and_errors(tmp_path):
    box = np.array([1, 2, 4, 8])
    record = {
        "file_name": "a.png",
        "height": 9,
        "width": 9,
        "annotations": [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}],
    }
    DatasetCatalog.register(NAME, lambda: [record])
    MetadataCatalog.get(NAME).thing_classes = ["x"]
    output = tmp_path / "out.json"
    convert_to_coco_json(NAME, str(output))
    coco = json.loads(output.read_text())
    assert coco["annotations"][0]["bbox"] == [1, 2, 3, 6] and coco["annotations"][0]["area"] == 18
    assert coco["images"][0]["id"] == 0 and box.tolist() == [1, 2, 4, 8]
    del record["annotations"][0]["bbox_mode"]
    with pytest.raises(ValueError, match="image 'a.png'.*'bbox_mode'"):
        convert_to_coco_json(NAME, str(output))
    del record["height"]
    with pytest.raises(ValueError, match="'a.png' has no height"):
        convert_to_coco_json(NAME, str(output))


def test_builtin_names():
    metadata = MetadataCatalog.get("coco_2017_val")
    assert metadata.json_file.endswith("coco/annotations/instances_val2017.json")
    assert metadata.image_root.endswith("coco/val2017")
    assert len(metadata.thing_classes) == 80 == len(set(metadata.thing_classes))
    ids = metadata.thing_dataset_id_to_contiguous_id
    assert (ids[1], ids[13], ids[90]) == (0, 11, 79) and 12 not in ids
    assert metadata.thing_classes[11] == "stop sign" and metadata.thing_colors[0] == [220, 20, 60]
    assert len(COCO_CATEGORIES) == 133
    person = MetadataCatalog.get("keypoints_coco_2017_val_100")
    assert len(person.keypoint_names) == 17 and len(person.keypoint_flip_map) == 8
    assert ("left_knee", "right_knee") in person.keypoint_flip_map
    assert len(person.keypoint_connection_rules) == 14
    voc = MetadataCatalog.get("voc_2007_test")
    assert (voc.year, voc.split, len(voc.thing_classes), voc.evaluator_type) == (
        2007,
        "test",
        20,
        "pascal_voc",
    )


@pytest.mark.parametrize("name", ["coco_2017_val", "keypoints_coco_2014_train", "voc_2012_val"])
def test_error_for_missing_builtin_data_names_file_and_variable(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from detlib.data.catalog import check_datasets_exist

    for use in (DatasetCatalog.get, check_datasets_exist):
        with pytest.raises(
            FileNotFoundError, match=rf"{name}.*(instances_val2017|person_key|val.txt).*DETLIB_DATASETS"
        ):
            use(name)
