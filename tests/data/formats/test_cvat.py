"""CVAT's XML: what shapes become, subsets and classes, which files are refused."""

import numpy as np
import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.datasets.rotated_corners import corners, fit_rotated_box
from detlib.structures import BoxMode
from tests.data.small_datasets import SIZE, make_image, write


def tag(name, label="owl", **attributes):
    values = " ".join(f'{key}="{value}"' for key, value in {"label": label, **attributes}.items())
    return f'<{name} {values} occluded="0" z_order="0"></{name}>'


def box(x0, y0, x1, y1, label="owl", **more):
    return tag("box", label, xtl=x0, ytl=y0, xbr=x1, ybr=y1, **more)


POLYGON = tag("polygon", "wren", points="2.00,3.00;10.00,3.00;2.00,12.50")
LABELS = ("wren", "owl", "jay")


def image(*shapes, name="a.jpg", size=SIZE, subset="", number=0):
    where = f'id="{number}" name="{name}" width="{size[0]}" height="{size[1]}"'
    where += f' subset="{subset}"' if subset else ""
    return f"<image {where}>{''.join(shapes)}</image>"


def write_cvat(root, *images, labels=LABELS, files=("images/a.jpg",)):
    listed = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in labels)
    meta = f"<meta><task><id>1</id><labels>{listed}</labels></task></meta>"
    write(
        f"{root}/annotations.xml", f"<?xml version='1.0'?><annotations>{meta}{''.join(images)}</annotations>"
    )
    for file in files:
        write(f"{root}/{file}", make_image())
    return f"cvat:{root}"


def load(uri):
    return [
        (a["category_id"], list(a["bbox"]), a.get("segmentation"))
        for a in DatasetCatalog.get(uri)[0]["annotations"]
    ]


def test_boxes_and_polygons(tmp_path):
    uri = write_cvat(tmp_path, image(POLYGON, box(5, 6, 20, 25)))
    check_datasets_exist(uri)
    (record,) = DatasetCatalog.get(uri)
    assert (record["file_name"], record["image_id"]) == (f"{tmp_path}/images/a.jpg", "a")
    assert (record["width"], record["height"]) == SIZE
    assert MetadataCatalog.get(uri).thing_classes == [*LABELS]  # in the order of the task, with unused ones
    assert load(uri) == [(0, [2, 3, 8, 9.5], [[2, 3, 10, 3, 2, 12.5]]), (1, [5, 6, 15, 19], None)]
    assert {a["bbox_mode"] for a in record["annotations"]} == {BoxMode.XYWH_ABS}
    assert load(f"cvat:{tmp_path}/annotations.xml") == load(f"dir:{tmp_path}") == load(uri)


def test_masks_run_by_row_inside_their_box(tmp_path):
    from pycocotools import mask as mask_utils

    drawn = tag("mask", rle="1, 2, 2, 1", left=4, top=6, width=3, height=2)
    ((_, bbox, segmentation),) = load(write_cvat(tmp_path, image(drawn)))
    expected = np.zeros(SIZE[::-1], dtype=np.uint8)
    expected[6:8, 4:7] = [[0, 1, 1], [0, 0, 1]]
    assert (mask_utils.decode(segmentation) == expected).all() and bbox == [5, 6, 2, 2]


def test_ellipses_and_cuboids_have_their_extent(tmp_path):
    ellipse = tag("ellipse", cx=20, cy=15, rx=8, ry=4, rotation=90)
    names = [f"{axis}{corner}{face}" for face in "12" for corner in ("tl", "bl", "tr", "br") for axis in "xy"]
    cuboid = tag("cuboid", **dict(zip(names, (5, 6, 5, 12, 9, 6, 9, 12, 11, 5, 11, 9, 14, 5, 14, 9))))
    boxes = [bbox for _, bbox, _ in load(write_cvat(tmp_path, image(ellipse, cuboid)))]
    assert boxes[0] == pytest.approx([16, 7, 8, 16]) and boxes[1] == [5, 5, 9, 7]


def test_rotated_boxes(tmp_path):
    uri = write_cvat(tmp_path, image(box(10, 10, 20, 14, rotation="30.0"), box(1, 2, 5, 6)))
    assert MetadataCatalog.get(uri).evaluator_type == "rotated_coco"
    assert load(uri) == [(1, [15, 12, 10, 4, -30], None), (1, [3, 4, 4, 4, 0], None)]
    assert DatasetCatalog.get(uri)[0]["annotations"][0]["bbox_mode"] == BoxMode.XYWHA_ABS
    assert not check_dataset(uri).num_errors


def test_rotated_boxes_become_polygons_on_request_or_next_to_polygons(tmp_path):
    turned = box(10, 10, 20, 14, rotation="90")
    for uri in (
        write_cvat(tmp_path / "a", image(turned)) + "?boxes=axis-aligned",
        write_cvat(tmp_path / "b", image(turned, POLYGON)),
    ):
        assert MetadataCatalog.get(uri).evaluator_type == "coco"
        _, bbox, segmentation = load(uri)[0]
        # Turned clockwise by 90 degrees, the top left corner is the top right one.
        assert bbox == pytest.approx([13, 7, 4, 10])
        assert segmentation[0] == pytest.approx([17, 7, 17, 17, 13, 17, 13, 7])


@pytest.mark.parametrize("angle", [-180, -90, -30, 0, 0.5, 45, 90, 179])
def test_rotated_box_of_its_own_corners_is_itself(angle):
    box = (20.0, 15.0, 8.0, 3.0, float(angle))
    assert fit_rotated_box(corners(box)) == pytest.approx(box)


def test_subsets_of_a_project(tmp_path):
    images = image(box(1, 2, 9, 9), subset="Train"), image(POLYGON, name="b.jpg", subset="Val", number=1)
    uri = write_cvat(tmp_path, *images, files=("images/Train/a.jpg", "images/Val/b.jpg"))
    assert [r["file_name"] for r in DatasetCatalog.get(f"{uri}@Val")] == [f"{tmp_path}/images/Val/b.jpg"]
    assert [r["image_id"] for r in DatasetCatalog.get(f"dir:{tmp_path}")] == ["a"]
    assert len(DatasetCatalog.get(uri)) == 2
    with pytest.raises(FileNotFoundError, match="has no subset 'test'. It has: Train, Val"):
        check_datasets_exist(f"{uri}@test")


def test_splits_in_folders(tmp_path):
    write_cvat(tmp_path / "train", image(POLYGON))
    write_cvat(tmp_path / "val", image(box(1, 2, 9, 9)))
    assert load(f"dir:{tmp_path}@val") == [(1, [1, 2, 8, 7], None)]
    with pytest.raises(FileNotFoundError, match="no folder 'test'. It has the splits: train, val"):
        check_datasets_exist(f"cvat:{tmp_path}@test")


def test_classes_without_labels_of_a_task_are_those_of_the_objects(tmp_path):
    uri = write_cvat(tmp_path, image(POLYGON, box(1, 2, 9, 9)), labels=())
    assert MetadataCatalog.get(uri).thing_classes == ["owl", "wren"]


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        (tag("points", points="1,2;3,4"), "shape-without-area", "is a set of points"),
        (tag("polyline", points="1,2;3,4"), "shape-without-area", "is a polyline"),
        (tag("skeleton"), "shape-without-area", "export keypoints as COCO Keypoints"),
        (tag("polygon", points="1,2;3,4"), "polygon-too-short", "polygon of 2 points"),
        (tag("polygon", points="1,2;3;5,6"), "bad-shape", "numbers up to"),
        (tag("polygon", points="1,2;3,x;5,6"), "bad-shape", "not x,y;x,y"),
        (tag("polygon", points="1,2;3,1e999;5,6"), "bad-shape", "numbers up to"),
        (box(1, 2, "nan", 4), "bad-shape", "numbers up to"),
        (box(1, 2, "1e300", 4), "bad-shape", "numbers up to"),
        (tag("mask", rle="1, 2", left=4, top=6, width=3, height=2), "bad-shape", "do not add up to 3 x 2"),
        (tag("mask", rle="-1, 7", left=4, top=6, width=3, height=2), "bad-shape", "do not add up"),
        (
            tag("mask", rle="6", left=4, top=6, width=10**9, height=10**9),
            "bad-shape",
            "is a mask of 1000000000",
        ),
        (tag("mask", rle="9" * 30, left=4, top=6, width=3, height=2), "bad-shape", "cannot be read"),
        (tag("mask", rle="0, 6", left=38, top=6, width=3, height=2), "bad-shape", "not inside the image"),
        (box(1, 2, 9, 9, label=""), "annotation-broken", "has no label"),
    ],
)
def test_invalid_shapes_are_findings_and_errors(tmp_path, shape, kind, message, log):
    uri = write_cvat(tmp_path, image(shape, POLYGON))
    findings = [f for f in check_dataset(uri).findings if f.kind != "unused-category"]
    assert [f.kind for f in findings] == [kind] and message in findings[0].detail
    if findings[0].severity == "error":
        with pytest.raises(ValueError, match=r"annotations\.xml.*a\.jpg"):
            DatasetCatalog.get(uri)
    else:
        assert len(load(uri)) == 1 and "left out 1 points and lines" in log.text


def test_unknown_labels_missing_images_and_bad_sizes_are_errors(tmp_path):
    uri = write_cvat(tmp_path / "a", image(box(1, 2, 9, 9, label="emu")))
    with pytest.raises(ValueError, match="'emu' is not in the list of labels in the annotations"):
        DatasetCatalog.get(uri)
    assert "unknown-category" in [f.kind for f in check_dataset(uri).findings]
    with pytest.raises(FileNotFoundError, match=r"b\.jpg is not in .*images"):
        DatasetCatalog.get(write_cvat(tmp_path / "b", image(POLYGON, name="b.jpg")))
    with pytest.raises(ValueError, match="width 'x', height '30'"):
        DatasetCatalog.get(write_cvat(tmp_path / "c", image(POLYGON, size=("x", 30))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotations", "not valid XML"),
        ("<annotation></annotation>", "is not CVAT's: its root is <annotation>"),
        (
            '<annotations><track id="0" label="owl"></track></annotations>',
            "'CVAT for video', which has no images",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    write(f"{tmp_path}/x.xml", text)
    with pytest.raises(ValueError, match=rf"x\.xml.*{message}"):
        DatasetCatalog.get(f"cvat:{tmp_path}/x.xml")
    with pytest.raises(FileNotFoundError, match=r"has no annotations\.xml"):
        check_datasets_exist(f"cvat:{tmp_path}")
