"""VIA JSON: what regions become, where class and images are found, which files are refused."""

import json
import math

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.convert import convert_dataset
from detlib.structures import BoxMode
from tests.data.small_datasets import SIZE, make_image, write


def polygon(*points):
    x, y = zip(*points)
    return {"name": "polygon", "all_points_x": [*x], "all_points_y": [*y]}


def rect(x, y, width, height):
    return {"name": "rect", "x": x, "y": y, "width": width, "height": height}


def region(shape, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


TRIANGLE = polygon((2, 3), (10, 3), (2, 12.5))


def write_via(root, *regions, name="a.jpg", file="via_region_data.json", image=True, **changes):
    entry = {"filename": name, "size": 1234, "regions": [*regions], "file_attributes": {}, **changes}
    write(f"{root}/{file}", json.dumps({f"{name}1234": entry}))
    if image:
        write(f"{root}/{name}", make_image())
    return f"via:{root}"


def load(uri):
    return [
        (a["category_id"], xyxy(a), a.get("segmentation")) for a in DatasetCatalog.get(uri)[0]["annotations"]
    ]


def xyxy(annotation):
    return list(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))


def test_polygons_and_rectangles(tmp_path):
    regions = region(TRIANGLE, bird="wren"), region(rect(5, 6, 15, 19), bird="owl")
    uri = write_via(tmp_path, *regions)
    check_datasets_exist(uri)
    (record,) = DatasetCatalog.get(uri)
    assert (record["file_name"], record["image_id"]) == (f"{tmp_path}/a.jpg", "a")
    assert (record["width"], record["height"]) == SIZE
    assert MetadataCatalog.get(uri).thing_classes == ["owl", "wren"]
    assert load(uri) == [(1, [2, 3, 10, 12.5], [[2, 3, 10, 3, 2, 12.5]]), (0, [5, 6, 20, 25], None)]
    assert load(f"via:{tmp_path}/via_region_data.json") == load(uri)


def test_circles_and_ellipses_have_their_exact_extent(tmp_path):
    circle = region({"name": "circle", "cx": 20, "cy": 15, "r": 5}, bird="owl")
    ellipse = region({"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4, "theta": 0}, bird="owl")
    turned = region(
        {"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4, "theta": math.pi / 2}, bird="owl"
    )
    boxes = [box for _, box, _ in load(write_via(tmp_path, circle, ellipse, turned))]
    assert boxes[0] == pytest.approx([15, 10, 25, 20])
    assert boxes[1] == pytest.approx([12, 11, 28, 19])
    assert boxes[2] == pytest.approx([16, 7, 24, 23])


def test_ellipses_are_turned_clockwise(tmp_path):
    shape = {"name": "ellipse", "cx": 20, "cy": 15, "rx": 10, "ry": 0.01, "theta": math.pi / 6}
    ((_, _, (points,)),) = load(write_via(tmp_path, region(shape, bird="owl")))
    # The y axis points down: the right end of the long axis is lower.
    assert points[:2] == pytest.approx([20 + 10 * math.cos(math.pi / 6), 15 + 5])


def test_version_1_has_regions_by_number_and_repeats_the_first_point(tmp_path):
    closed = polygon((2, 3), (10, 3), (2, 12.5), (2, 3))
    uri = write_via(tmp_path, regions={"0": region(closed, name="wren")}, fileref="", base64_img_data="")
    assert load(uri) == [(0, [2, 3, 10, 12.5], [[2, 3, 10, 3, 2, 12.5]])]


def test_project_files_are_read(tmp_path):
    entry = {"filename": "a.jpg", "size": 9, "regions": [region(TRIANGLE, bird="owl")], "file_attributes": {}}
    project = {"_via_settings": {}, "_via_img_metadata": {"a.jpg9": entry}, "_via_attributes": {}}
    write(f"{tmp_path}/project.json", json.dumps(project))
    write(f"{tmp_path}/images/a.jpg", make_image())
    assert DatasetCatalog.get(f"dir:{tmp_path}")[0]["file_name"] == f"{tmp_path}/images/a.jpg"
    assert len(load(f"via:{tmp_path}/project.json")) == 1


def test_regions_without_any_attribute_are_of_one_class(tmp_path):
    uri = write_via(tmp_path, region(TRIANGLE))
    assert MetadataCatalog.get(uri).thing_classes == ["object"] and load(uri)[0][0] == 0


def test_class_is_the_usual_attribute_or_the_chosen_one(tmp_path):
    uri = write_via(tmp_path, region(TRIANGLE, color="red", label="wren"))
    assert MetadataCatalog.get(uri).thing_classes == ["wren"]
    assert MetadataCatalog.get(uri + "?attribute=color").thing_classes == ["red"]
    with pytest.raises(ValueError, match="no region has the attribute 'colr', only 'color', 'label'"):
        DatasetCatalog.get(uri + "?attribute=colr")
    uri = write_via(tmp_path / "b", region(TRIANGLE, color="red", size="big"))
    with pytest.raises(ValueError, match=r"attributes 'color', 'size'; specify .* \?attribute=color"):
        MetadataCatalog.get(uri)


def test_check_boxes_with_one_mark_are_a_class(tmp_path):
    uri = write_via(tmp_path, region(TRIANGLE, bird={"owl": True, "wren": False}))
    assert MetadataCatalog.get(uri).thing_classes == ["owl"]
    uri = write_via(
        tmp_path / "b", region(TRIANGLE, bird={"owl": True, "wren": True}), region(TRIANGLE, bird="owl")
    )
    assert [f.kind for f in check_dataset(uri, images=False).findings] == ["annotation-broken"]
    with pytest.raises(ValueError, match=r"via_region_data.json.*region 1.*no single class in 'bird'"):
        DatasetCatalog.get(uri)


def test_splits_are_folders_and_share_their_classes(tmp_path):
    write_via(tmp_path / "train", region(TRIANGLE, bird="wren"))
    write_via(tmp_path / "val", region(TRIANGLE, bird="owl"))
    assert MetadataCatalog.get(f"dir:{tmp_path}@val").thing_classes == ["owl", "wren"]
    assert load(f"via:{tmp_path}@train")[0][0] == 1 and load(f"via:{tmp_path}@valid")[0][0] == 0
    with pytest.raises(FileNotFoundError, match="has no folder 'test'. It has the splits: train, val"):
        check_datasets_exist(f"via:{tmp_path}@test")
    write(f"{tmp_path}/labels.txt", "wren\nowl\njay\n")
    MetadataCatalog.remove(f"dir:{tmp_path}@val")
    assert MetadataCatalog.get(f"dir:{tmp_path}@val").thing_classes == ["wren", "owl", "jay"]


def test_paths_of_another_machine_are_found(tmp_path, log):
    write(f"{tmp_path}/images/a.jpg", make_image())
    for stated in (r"C:\data\images\a.jpg", "/content/set/images/a.jpg", "https://host/x/a.jpg?size=9"):
        uri = write_via(tmp_path, region(TRIANGLE), name=stated, image=False)
        assert DatasetCatalog.get(uri)[0]["file_name"] == f"{tmp_path}/images/a.jpg"
    assert "does not exist under this path" in log.text


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ({"name": "point", "cx": 3, "cy": 4}, "shape-without-area", "is a point"),
        (
            {"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]},
            "shape-without-area",
            "polyline",
        ),
        (polygon((1, 2), (3, 4)), "polygon-too-short", "polygon of 2 points"),
        ({"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2]}, "bad-shape", "same length"),
        (polygon((1, 2), (3, 1e308), (5, 6)), "bad-shape", "numbers up to"),
        (polygon((1, 2), (3, 10**400), (5, 6)), "bad-shape", "numbers up to"),
        (polygon((1, 2), (3, math.nan), (5, 6)), "bad-shape", "numbers up to"),
        (rect(1, 2, "3", 4), "bad-shape", "rect with width = '3'"),
        ({"name": "circle", "cx": 1, "cy": 2, "r": -1}, "bad-shape", "radii -1"),
        ({"name": "star"}, "bad-shape", "unknown shape 'star'"),
        (None, "bad-shape", "unknown shape None"),
    ],
)
def test_invalid_shapes_are_findings_and_errors(tmp_path, shape, kind, message, log):
    uri = write_via(tmp_path, region(shape, bird="owl"), region(TRIANGLE, bird="owl"))
    findings = [f for f in check_dataset(uri).findings if f.kind != "mixed-masks"]
    assert [f.kind for f in findings] == [kind] and message in findings[0].detail
    if findings[0].severity == "error":
        with pytest.raises(ValueError, match="region 1"):
            DatasetCatalog.get(uri)
    else:
        assert len(load(uri)) == 1 and "left out 1 points and lines" in log.text


def test_boxes_without_area_are_an_error_or_dropped(tmp_path):
    uri = write_via(tmp_path, region(rect(3, 4, 0, 5), bird="owl"), region(TRIANGLE, bird="owl"))
    with pytest.raises(ValueError, match="region 1 .owl.: the box has no area"):
        DatasetCatalog.get(uri)
    assert len(load(uri + "?empty_boxes=drop")) == 1


def test_missing_and_broken_images_are_named(tmp_path):
    uri = write_via(tmp_path, region(TRIANGLE), image=False)
    with pytest.raises(FileNotFoundError, match=r"via_region_data.json.*a.jpg does not exist"):
        DatasetCatalog.get(uri)
    write(f"{tmp_path}/a.jpg", b"no image")
    assert check_dataset(uri).findings[0].kind == "unreadable-image"


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', '{"a": {"filename": 3, "regions": []}}', "[" * 10**5]
)
def test_other_files_are_refused(tmp_path, text):
    write(f"{tmp_path}/a.json", text)
    with pytest.raises(ValueError, match=r"a\.json"):
        DatasetCatalog.get(f"via:{tmp_path}/a.json")
    with pytest.raises(FileNotFoundError, match="has no JSON file of VIA"):
        check_datasets_exist(f"via:{tmp_path}")


def test_conversion_to_coco_keeps_the_objects(tmp_path):
    uri = write_via(
        tmp_path / "in", region(TRIANGLE, bird="wren"), region(polygon((5, 6), (9, 6), (9, 9)), bird="owl")
    )
    before = load(uri)
    assert load(convert_dataset(uri, "coco", f"{tmp_path}/out")) == before


def test_regions_that_are_not_objects_are_named_in_a_dataset_with_one_class(tmp_path):
    uri = write_via(tmp_path, region(TRIANGLE), "region", [1])
    found = [f for f in check_dataset(uri).findings if f.kind == "annotation-broken"]
    assert [f.annotation for f in found] == ["a.jpg, region 2 (object)", "a.jpg, region 3 (object)"]
    with pytest.raises(ValueError, match="via_region_data.json.*region 2.*is a str"):
        DatasetCatalog.get(uri)


def test_class_attribute_is_that_of_all_splits(tmp_path):
    write_via(tmp_path / "train", region(TRIANGLE, bird="wren"))
    write_via(tmp_path / "val", region(TRIANGLE))
    with pytest.raises(ValueError, match="region 1.*no single class in 'bird'"):
        DatasetCatalog.get(f"via:{tmp_path}@val")
