"""Conversion between formats keeps every box, class and image, and reports what is lost."""

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.convert import convert_dataset, main
from detlib.structures import BoxMode
from tests.data.small_datasets import CLASSES, coco_content, voc_xml, write_coco, write_voc, write_yolo


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    before = MetadataCatalog.list()
    yield
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)


def records(name):
    """Return what all formats share: image, size, and class, box and crowd mark of each object."""
    result = []
    for record in DatasetCatalog.get(name):
        objects = [
            (
                a["category_id"],
                BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS),
                a.get("iscrowd", 0),
            )
            for a in record["annotations"]
        ]
        result.append((record["file_name"].rpartition("/")[2], record["width"], record["height"], objects))
    return result


def awkward_voc(root):
    """Write boxes with fractions and at the edges, and classes not in alphabetical order."""
    text = "<annotation><size><width>40</width><height>30</height></size>"
    for name, box in (("wren", (1 / 3, 0.1, 39.99, 29.7)), ("owl", (0, 0, 40, 30)), ("crow", (7, 8, 8, 9.5))):
        corners = "".join(f"<{k}>{v!r}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    uri = write_voc(root, a=text + "</annotation>")
    (root / "labels.txt").write_text("wren\nowl\ncrow\n")
    return uri


@pytest.mark.parametrize("path", [("coco", "yolo", "voc"), ("yolo", "coco", "voc"), ("voc", "yolo", "coco")])
@pytest.mark.parametrize("link", [False, True])
def test_round_trip_keeps_boxes_classes_and_images(tmp_path, path, link):
    uri = awkward_voc(tmp_path / "start")
    before = records(uri)
    assert [len(objects) for *_, objects in before] == [1, 3]
    for step, to in enumerate(path):
        uri = convert_dataset(uri, to, f"{tmp_path}/{step}", link=link)
        assert uri.startswith(f"{to}:{tmp_path}/{step}")
        assert MetadataCatalog.get(uri).thing_classes == ["wren", "owl", "crow"]
        after = records(uri)
        assert [r[:3] for r in after] == [r[:3] for r in before]
        for (*_, expected), (*_, objects) in zip(before, after):
            assert [o[0] for o in objects] == [o[0] for o in expected]
            for one, other in zip(objects, expected):
                assert one[1] == pytest.approx(other[1], abs=1e-6)
        for record in DatasetCatalog.get(uri):
            original = f"{tmp_path}/start/JPEGImages/{record['file_name'].rpartition('/')[2]}"
            with open(record["file_name"], "rb") as one, open(original, "rb") as other:
                assert one.read() == other.read()


def test_masks_and_crowds_are_kept_or_counted_as_lost(tmp_path, log):
    start = write_coco(tmp_path / "start")
    coco = convert_dataset(start, "coco", f"{tmp_path}/coco")
    first, second = DatasetCatalog.get(start)[0], DatasetCatalog.get(coco)[0]
    assert [a["bbox"] for a in first["annotations"]] == [a["bbox"] for a in second["annotations"]]
    assert second["annotations"][0]["segmentation"] == [[2, 3, 10, 3, 2, 12.5]]
    assert second["annotations"][2]["iscrowd"] == 1

    voc = convert_dataset(start, "voc", f"{tmp_path}/voc")
    assert records(voc) == records(start)
    assert "3 objects lose their segmentation" in log.text

    yolo = convert_dataset(start, "yolo", f"{tmp_path}/yolo")
    assert "1 crowd regions are left out" in log.text
    objects = DatasetCatalog.get(yolo)[0]["annotations"]
    assert [a["segmentation"][0] for a in objects] == [[2, 3, 10, 3, 2, 12.5], [0, 0, 40, 0, 40, 30, 0, 30]]
    assert [a["bbox"] for a in objects] == [[2, 3, 10, 12.5], [0, 0, 40, 30]]


def test_yolo_polygons_change_no_box_by_default(tmp_path, log):
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 1, 12, 12]
    start = write_coco(tmp_path / "start", content)
    boxes = convert_dataset(start, "yolo", f"{tmp_path}/boxes")
    assert DatasetCatalog.get(boxes)[0]["annotations"][0]["bbox"] == [1, 1, 13, 13]
    assert "1 of 2 objects would get another box" in log.text
    polygons = convert_dataset(start, "yolo", f"{tmp_path}/polygons", masks="polygons")
    assert DatasetCatalog.get(polygons)[0]["annotations"][0]["bbox"] == [2, 3, 10, 12.5]


def test_yolo_polygon_joined_from_two_parts_keeps_its_area(tmp_path):
    from pycocotools import mask as mask_utils

    content = coco_content()
    parts = [[2, 2, 12, 2, 12, 10, 2, 10], [20, 15, 30, 15, 30, 25, 20, 25]]
    content["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 2, 28, 23], "segmentation": parts}
    ]
    uri = convert_dataset(write_coco(tmp_path / "start", content), "yolo", f"{tmp_path}/yolo")
    (polygon,) = DatasetCatalog.get(uri)[0]["annotations"][0]["segmentation"]
    joined, apart = (mask_utils.merge(mask_utils.frPyObjects(p, 30, 40)) for p in ([polygon], parts))
    assert mask_utils.area(apart) == 180 and mask_utils.iou([joined], [apart], [0])[0, 0] > 0.9


def test_poses_survive_conversion(tmp_path):
    start = write_yolo(
        tmp_path / "start",
        {"a": "1 0.5 0.5 1 1 0.25 0.5 2 0.5 0.5 1 0 0 0\n"},
        kpt_shape=[3, 3],
        flip_idx=[0, 2, 1],
        kpt_names={0: ["beak", "left wing", "right wing"]},
    )
    uri = start
    for to in ("coco", "yolo"):
        uri = convert_dataset(uri, to, f"{tmp_path}/{to}")
        one, other = (DatasetCatalog.get(name)[0]["annotations"][0] for name in (start, uri))
        assert other["keypoints"][:6] == one["keypoints"][:6] and other["keypoints"][8] == 0
        metadata = MetadataCatalog.get(uri)
        assert metadata.keypoint_names == ["beak", "left wing", "right wing"]
        assert metadata.keypoint_flip_map == [("left wing", "right wing")]


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
def test_splits_share_a_folder_in_an_object_store(tmp_path, to):
    start = write_voc(tmp_path / "start")
    out = f"memory://convert/{to}"
    for split in ("train", "val"):
        convert_dataset(start, to, out, split=split)
        assert sorted(records(f"dir:{out}@{split}")) == sorted(records(start))
    other = write_yolo(tmp_path / "other", names=["a", "b", "c"])
    if to != "coco":
        with pytest.raises(ValueError, match="other classes .*another folder"):
            convert_dataset(other, to, out, split="test")


def test_images_with_equal_names_get_distinct_names(tmp_path):
    content = coco_content()
    content["images"][1]["file_name"] = "more/a.jpg"
    start = write_coco(tmp_path / "start", content, ("a.jpg", "more/a.jpg"))
    uri = convert_dataset(start, "voc", f"{tmp_path}/voc")
    assert [name for name, *_ in records(uri)] == ["a.jpg", "more_a.jpg"]


def test_invalid_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="to must be one of coco, .*yolo, not 'csv'"):
        convert_dataset("shapes:train", "csv", "out")
    with pytest.raises(ValueError, match="masks must be"):
        convert_dataset("shapes:train", "yolo", "out", masks="some")
    with pytest.raises(ValueError, match="rotated boxes; only --to coco"):
        convert_dataset("shapes:train?num=2&size=32&rotated=1", "voc", f"{tmp_path}/out")


def test_command_prints_the_uri(tmp_path, capsys):
    start = write_voc(tmp_path / "start")
    assert main([start, "--to", "yolo", f"{tmp_path}/out", "--link"]) == 0
    uri = capsys.readouterr().out.strip()
    assert records(uri) == records(start) and MetadataCatalog.get(uri).thing_classes == CLASSES
    assert main(["voc:/nowhere@train", "--to", "yolo", f"{tmp_path}/out"]) == 2
    assert "error: Dataset URI 'voc:/nowhere@train'" in capsys.readouterr().err


def test_difficult_marks_are_kept_or_counted_as_lost(tmp_path, log):
    text = voc_xml(("owl", (5, 6, 7, 8)), ("crow", (1, 2, 3, 4)))
    start = write_voc(tmp_path / "start", a=text.replace("<name>owl", "<difficult>1</difficult><name>owl"))
    again = convert_dataset(start, "voc", f"{tmp_path}/voc")
    marks = [[a.get("difficult") for a in r["annotations"]] for r in DatasetCatalog.get(again)]
    assert marks == [[None], [1, None]] and "cannot hold" not in log.text
    for to in ("coco", "yolo"):
        convert_dataset(start, to, f"{tmp_path}/{to}")
        assert f"{to} cannot hold everything: 1 objects are no longer marked as difficult" in log.text


@pytest.mark.parametrize(
    "names", [["owl", "owl", "crow"], ["", "a", "b"], [" a", "b", "c"], ["a\nb", "c", "d"]]
)
def test_voc_refuses_ambiguous_class_names(tmp_path, names):
    content = coco_content(categories=[{"id": i, "name": n} for i, n in zip((3, 5, 7), names)])
    with pytest.raises(ValueError, match="classes that labels.txt cannot tell apart"):
        convert_dataset(write_coco(tmp_path / "start", content), "voc", f"{tmp_path}/voc")
    assert not (tmp_path / "voc").exists()


def test_voc_refuses_image_names_it_cannot_hold(tmp_path):
    content = coco_content()
    content["images"][1]["file_name"] = "b.gif"
    start = write_coco(tmp_path / "start", content, ("a.jpg", "b.gif"))
    assert records(convert_dataset(start, "voc", f"{tmp_path}/voc"))[1][0] == "b.gif"
    for name, message in (("b.ppm", r"images that end in \['.ppm'\]"), ("b 1.jpg", "spaces")):
        content["images"][1]["file_name"] = name
        start = write_coco(tmp_path / name, content, ("a.jpg", name))
        with pytest.raises(ValueError, match=message):
            convert_dataset(start, "voc", f"{tmp_path}/other")
    assert not (tmp_path / "other").exists()


def test_yolo_refuses_a_wrong_image_size(tmp_path):
    start = write_voc(tmp_path / "start", a=voc_xml(("owl", (5, 6, 7, 8)), size=(30, 40)))
    with pytest.raises(
        ValueError, match="a.jpg.* has width 40 and height 30, .* states width 30 and height 40"
    ):
        convert_dataset(start, "yolo", f"{tmp_path}/yolo")


def test_coco_counts_keypoint_pairs_lost_with_the_flip_map(tmp_path, log):
    labels = {"a": "1 0.5 0.5 1 1 0.25 0.5 2 0.5 0.5 1\n"}
    start = write_yolo(tmp_path / "start", labels, kpt_shape=[2, 3], flip_idx=[1, 0])
    convert_dataset(start, "yolo", f"{tmp_path}/yolo")
    assert "cannot hold" not in log.text
    convert_dataset(start, "coco", f"{tmp_path}/coco")
    assert "1 pairs of keypoints are no longer known to swap under a horizontal flip" in log.text


def test_objects_with_different_numbers_of_keypoints(tmp_path):
    content = coco_content()
    content["categories"][2]["keypoints"] = ["left eye", "right eye"]
    content["annotations"][0]["keypoints"] = [1, 1, 2, 3, 3, 2]
    content["annotations"][1]["keypoints"] = []
    start = write_coco(tmp_path / "start", content)
    record = DatasetCatalog.get(convert_dataset(start, "yolo", f"{tmp_path}/yolo"))[0]
    assert [a["keypoints"] for a in record["annotations"]] == [[1.5, 1.5, 2, 3.5, 3.5, 2], [0] * 6]
    content["categories"][0]["keypoints"] = ["a", "b", "c"]
    content["annotations"][1]["keypoints"] = [1, 1, 2] * 3
    start = write_coco(tmp_path / "two", content)
    for to in ("yolo", "coco"):
        with pytest.raises(ValueError, match="a.jpg has 2 keypoints, but the metadata names 3"):
            convert_dataset(start, to, f"{tmp_path}/{to}2")


@pytest.mark.parametrize("to", ["yolo", "labelme"])
def test_boxes_within_a_pixel_of_their_polygons_do_not_cost_the_polygons(tmp_path, log, to):
    content = coco_content()
    content["annotations"][0]["bbox"] = [2.9, 3, 7.1, 9.5]
    uri = convert_dataset(write_coco(tmp_path / "start", content), to, f"{tmp_path}/out")
    first = DatasetCatalog.get(uri)[0]["annotations"][0]
    assert first["segmentation"] == [[2, 3, 10, 3, 2, 12.5]]
    assert "1 boxes become the extent of their masks" in log.text
