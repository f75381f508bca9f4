"""labelme's files: what shapes become, which are refused, and round trips."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.convert import convert_dataset
from detlib.data.detection_utils import read_image
from detlib.structures import BoxMode
from tests.data.small_datasets import CLASSES, SIZE, coco_content, make_image, write, write_coco, write_voc


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    before = MetadataCatalog.list()
    yield
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def content(*shapes, **changes):
    return {
        "version": "5.0.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "a.jpg",
        "imageData": None,
        "imageHeight": SIZE[1],
        "imageWidth": SIZE[0],
        **changes,
    }


TRIANGLE = shape("wren", [[2, 3], [10, 3], [2, 12.5]])
BOX = shape("owl", [[20, 25], [5, 6]], "rectangle")


def write_labelme(root, *shapes, name="a", **changes):
    write(f"{root}/{name}.json", json.dumps(content(*shapes, **changes)))
    write(f"{root}/{name}.jpg", make_image())
    return f"labelme:{root}"


def annotations(uri):
    return DatasetCatalog.get(uri)[0]["annotations"]


def xyxy(annotation):
    return list(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_polygons_and_rectangles(tmp_path):
    uri = write_labelme(tmp_path, TRIANGLE, BOX)
    check_datasets_exist(uri)
    (record,) = DatasetCatalog.get(uri)
    assert (record["file_name"], record["image_id"]) == (f"{tmp_path}/a.jpg", "a")
    assert (record["width"], record["height"]) == SIZE
    assert MetadataCatalog.get(uri).thing_classes == ["owl", "wren"]
    polygon, box = record["annotations"]
    assert polygon["category_id"] == 1 and xyxy(polygon) == [2, 3, 10, 12.5]
    assert polygon["segmentation"] == [[2, 3, 10, 3, 2, 12.5]]
    assert box["category_id"] == 0 and xyxy(box) == [5, 6, 20, 25] and "segmentation" not in box
    assert [f.kind for f in check_dataset(uri).findings] == ["mixed-masks"]


def test_circle_has_its_exact_box_and_nearly_its_area(tmp_path):
    (circle,) = annotations(write_labelme(tmp_path, shape("owl", [[20, 15], [23, 19]], "circle")))
    assert xyxy(circle) == pytest.approx([15, 10, 25, 20])
    x, y = circle["segmentation"][0][0::2], circle["segmentation"][0][1::2]
    area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    assert area == pytest.approx(math.pi * 25, rel=0.002)


def test_shapes_of_a_group_are_one_object(tmp_path):
    first, second = (shape("owl", [[x, 1], [x + 4, 1], [x, 5]], group_id=7) for x in (1, 20))
    corner = shape("owl", [[30, 20], [35, 25]], "rectangle", group_id=7)
    other = shape("wren", [[x, 9] for x in (1, 2)] + [[1, 12]], group_id=7)
    owl, wren = annotations(write_labelme(tmp_path, first, other, second, corner))
    assert owl["segmentation"] == [
        [1, 1, 5, 1, 1, 5],
        [20, 1, 24, 1, 20, 5],
        [30, 20, 35, 20, 35, 25, 30, 25],
    ]
    assert xyxy(owl) == [1, 1, 35, 25] and xyxy(wren) == [1, 9, 2, 12]


def test_mask_is_pasted_at_its_corner(tmp_path):
    from pycocotools import mask as mask_utils

    mask = np.array([[0, 1, 1], [1, 1, 0]])
    drawn = shape("owl", [[4, 6], [6, 7]], "mask", mask=png(mask), group_id=1)
    more = shape("owl", [[30, 20], [34, 20], [34, 24], [30, 24]], group_id=1)
    (annotation,) = annotations(write_labelme(tmp_path, drawn))
    expected = np.zeros(SIZE[::-1], dtype=np.uint8)
    expected[6:8, 4:7] = mask
    assert (mask_utils.decode(annotation["segmentation"]) == expected).all()
    assert xyxy(annotation) == [4, 6, 7, 8]
    (annotation,) = annotations(write_labelme(tmp_path / "both", drawn, more))
    expected[20:24, 30:34] = 1
    assert (mask_utils.decode(annotation["segmentation"]) == expected).all()
    assert not check_dataset(f"labelme:{tmp_path}/both").num_errors


def test_points_and_lines_are_left_out_with_a_warning(tmp_path, log):
    shapes = [
        shape("beak", [[1, 2]], "point"),
        shape("branch", [[1, 2], [5, 6]], "line"),
        shape("branch", [[1, 2], [5, 6], [7, 7]], "linestrip"),
    ]
    uri = write_labelme(tmp_path, BOX, *shapes)
    assert len(annotations(uri)) == 1 and MetadataCatalog.get(uri).thing_classes == ["owl"]
    assert "left out 3 points and lines, which have no area" in log.text
    checked = check_dataset(uri)
    assert [f.kind for f in checked.findings] == ["shape-without-area"] * 3 and not checked.num_errors


def test_flags_mark_crowds_and_difficult_objects(tmp_path):
    marked = {**BOX, "flags": {"iscrowd": True, "difficult": True, "occluded": True}}
    first, second = annotations(write_labelme(tmp_path, marked, TRIANGLE))
    assert (first["iscrowd"], first["difficult"]) == (1, 1)
    assert "iscrowd" not in second and "difficult" not in second


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"imagePath": "..\\photos\\b.jpg"}, "photos/b.jpg"),
        ({"imagePath": "C:\\Users\\me\\a.jpg"}, "json/a.jpg"),
        ({"imagePath": "http://host/a.jpg"}, "json/a.jpg"),
        ({"imagePath": "gone.jpg"}, "json/a.jpg"),
        ({"imagePath": None}, "json/a.jpg"),
    ],
)
def test_image_is_found(tmp_path, changes, path):
    uri = write_labelme(tmp_path / "json", BOX, **changes)
    write(tmp_path / "photos/b.jpg", make_image())
    assert DatasetCatalog.get(uri)[0]["file_name"] == f"{tmp_path}/{path}"


def test_image_data_is_decoded_only_without_an_image_file(tmp_path):
    buffer = io.BytesIO()
    make_image(color=(200, 10, 10)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    uri = write_labelme(tmp_path / "with", BOX, imageData=data)
    assert DatasetCatalog.get(uri)[0]["file_name"] == f"{tmp_path}/with/a.jpg"
    uri = write_labelme(tmp_path / "without", BOX, imageData=data, imagePath="x.jpg", imageHeight=None)
    (tmp_path / "without/a.jpg").unlink()
    with pytest.raises(ValueError, match="a.json' has imageWidth 40 and imageHeight None"):
        DatasetCatalog.get(uri)
    uri = write_labelme(
        tmp_path / "without", BOX, imageData=data, imagePath="x.jpg", imageHeight=None, imageWidth=None
    )
    (tmp_path / "without/a.jpg").unlink()
    (record,) = DatasetCatalog.get(uri)
    assert (
        record["file_name"].startswith(f"{tmp_path}/cache/") and (record["width"], record["height"]) == SIZE
    )
    assert read_image(record["file_name"], "RGB")[0, 0].tolist() == [200, 10, 10]
    assert not check_dataset(uri).num_errors


def test_missing_image_is_an_error_that_names_the_file(tmp_path):
    uri = write_labelme(tmp_path, BOX)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="a.json: the image 'a.jpg' does not exist"):
        DatasetCatalog.get(uri)
    assert "missing-image" in {f.kind for f in check_dataset(uri).findings}


NAN, LARGE = float("nan"), 10**400

FAULTS = [
    ("annotation-broken", [3], "shape 1.*is a int, not an object"),
    ("annotation-broken", [shape("", [[1, 2]])], "shape 1.*has the label ''"),
    ("annotation-broken", [shape(None, [[1, 2]])], "has the label None"),
    ("polygon-too-short", [shape("owl", [[1, 2], [3, 4]])], r"shape 1 \(owl\).*a polygon of 2 points"),
    ("bad-shape", [shape("owl", [[1, 2]] * 3, "rectangle")], "a rectangle of 3 points"),
    ("bad-shape", [shape("owl", [[1, 2]], "circle")], "a circle of 1 points"),
    ("bad-shape", [shape("owl", [[1, 2]], "ellipse")], "unknown shape_type 'ellipse'"),
    ("bad-shape", [shape("owl", [[1, 2]], ["polygon"])], "unknown shape_type"),
    ("bad-shape", [shape("owl", None)], "needs points"),
    ("bad-shape", [shape("owl", [])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], [3], [4, 5]])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], ["3", 4], [4, 5]])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], [NAN, 4], [4, 5]])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], [LARGE, 4], [4, 5]])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], [1e8, 4], [4, 5]])], "needs points"),
    ("bad-shape", [shape("owl", [[1, 2], [3, 4]], "mask", mask="no")], "mask that cannot be decoded"),
    ("bad-shape", [shape("owl", [[1, 2], [3, 4]], "mask")], "mask that cannot be decoded"),
    (
        "bad-shape",
        [shape("owl", [[38, 2], [40, 4]], "mask", mask=png(np.ones((3, 3))))],
        r"mask of 3 x 3 pixels at \(38, 2\), which is not inside the image",
    ),
]


@pytest.mark.parametrize(("kind", "shapes", "message"), FAULTS)
def test_invalid_shape_is_refused_and_reported(tmp_path, kind, shapes, message):
    write_labelme(tmp_path, BOX, name="valid")
    uri = write_labelme(tmp_path, *shapes)
    (tmp_path / "labels.txt").write_text("__ignore__\nowl\n")
    with pytest.raises(ValueError, match=f"a.json, .*{message}"):
        DatasetCatalog.get(uri)
    checked = check_dataset(uri)
    assert kind in {f.kind for f in checked.findings} and checked.num_errors == 1
    assert len(checked.repaired["annotations"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json' is not valid JSON"),
        ("[" * 10**5, "a.json' is not valid JSON"),
        ("[1]", "a.json' is not in labelme's format"),
        ('{"imagePath": "a.jpg"}', "no list 'shapes'"),
        (json.dumps(content(BOX, imageWidth=10**9)), "a.json' has imageWidth 1000000000"),
        (json.dumps(content(BOX, imageWidth="40")), "integers from 1 to"),
        (json.dumps(content(BOX, imagePath="x.png", imageData="AAAA")), "imageData is not an image"),
    ],
)
def test_malformed_file_is_named(tmp_path, text, message):
    write(tmp_path / "a.json", text)
    if "imageData" not in message:
        write(tmp_path / "a.jpg", make_image())
    for use in (DatasetCatalog.get, MetadataCatalog.get) if "labelme" in message else (DatasetCatalog.get,):
        with pytest.raises(ValueError, match=message):
            use(f"labelme:{tmp_path}")
    assert [f.kind for f in check_dataset(f"labelme:{tmp_path}").findings][0] == "bad-file"


def test_size_of_the_image_file_is_used_if_none_is_stated(tmp_path):
    uri = write_labelme(tmp_path, BOX, imageWidth=None, imageHeight=None)
    assert DatasetCatalog.get(uri)[0]["width"] == 40
    assert not check_dataset(uri).findings


def test_box_without_area_is_an_error_or_left_out(tmp_path, log):
    uri = write_labelme(tmp_path, BOX, shape("owl", [[5, 6], [5, 9]], "rectangle"))
    with pytest.raises(ValueError, match=r"a.json, shape 2 \(owl\): the box has no area.*empty_boxes=drop"):
        DatasetCatalog.get(uri)
    assert len(annotations(f"{uri}?empty_boxes=drop")) == 1
    assert "left out 1 objects whose box has no area" in log.text
    assert "box-no-area" in {f.kind for f in check_dataset(uri).findings}


def test_splits_are_folders_and_share_their_classes(tmp_path):
    write_labelme(tmp_path / "train", BOX, name="b")
    write_labelme(tmp_path / "train", BOX, name="a")
    write_labelme(tmp_path / "valid", TRIANGLE)
    train = DatasetCatalog.get(f"labelme:{tmp_path}@train")
    assert [record["image_id"] for record in train] == ["a", "b"]
    assert MetadataCatalog.get(f"labelme:{tmp_path}@train").thing_classes == ["owl", "wren"]
    assert len(DatasetCatalog.get(f"labelme:{tmp_path}@val")) == 1
    both = DatasetCatalog.get(f"labelme:{tmp_path}")
    assert [record["image_id"] for record in both] == ["train/a", "train/b", "valid/a"]
    with pytest.raises(FileNotFoundError, match="no folder 'test'. It has the splits: train, valid"):
        check_datasets_exist(f"labelme:{tmp_path}@test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no annotation files"):
        check_datasets_exist(f"labelme:{tmp_path}/empty")


def test_labels_file_sets_the_order_of_the_classes(tmp_path):
    uri = write_labelme(tmp_path, BOX, TRIANGLE)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nwren\nowl\n")
    assert MetadataCatalog.get(uri).thing_classes == ["wren", "owl"]
    (tmp_path / "labels.txt").write_text("wren\n")
    with pytest.raises(ValueError, match=r"shape 1 \(owl\): the label 'owl' is not in .*labels.txt"):
        DatasetCatalog.get(f"labelme:{tmp_path}?empty_boxes=drop")
    assert "unknown-category" in {f.kind for f in check_dataset(uri).findings}


def test_folder_is_detected(tmp_path, log):
    write_labelme(tmp_path / "flat", BOX)
    assert len(DatasetCatalog.get(f"dir:{tmp_path}/flat")) == 1
    assert f"is read as labelme:{tmp_path}/flat: found JSON files with shapes" in log.text
    for split in ("train", "val"):
        write_labelme(tmp_path / "split" / split, BOX)
    assert DatasetCatalog.get(f"dir:{tmp_path}/split@val")[0]["file_name"].startswith(
        f"{tmp_path}/split/val/"
    )


def test_other_formats_do_not_read_its_files(tmp_path, monkeypatch):
    """A folder may have thousands of these files, with embedded images."""
    write_labelme(tmp_path, BOX)
    monkeypatch.setattr(
        "detlib.data.formats.coco.read_coco_json", lambda path: pytest.fail(f"{path} was read")
    )
    check_datasets_exist(f"dir:{tmp_path}")


@pytest.mark.parametrize("root", ["memory://labelme", "LOCAL"])
def test_conversion_keeps_boxes_polygons_masks_and_marks(tmp_path, root, log):
    root = f"{tmp_path}/out" if root == "LOCAL" else f"{root}/set"
    data = coco_content()
    data["annotations"][2]["bbox"] = [20, 10, 1, 5]  # the extent of its mask
    data["annotations"].append(
        {
            "id": 4,
            "image_id": 1,
            "category_id": 5,
            "bbox": [1, 1, 20, 9],
            "segmentation": [[1, 1, 5, 1, 1, 5], [11, 1, 21, 1, 21, 10]],
        }
    )
    start = write_coco(tmp_path / "start", data)
    uri = convert_dataset(start, "labelme", root)
    assert uri == f"labelme:{root}@train"
    before, after = DatasetCatalog.get(start), DatasetCatalog.get(uri)
    assert MetadataCatalog.get(uri).thing_classes == CLASSES
    assert [len(record["annotations"]) for record in after] == [4, 0]
    for one, other in zip(before[0]["annotations"], after[0]["annotations"]):
        assert one["category_id"] == other["category_id"] and xyxy(one) == xyxy(other)
        assert one["iscrowd"] == other.get("iscrowd", 0)
        if isinstance(one["segmentation"], list):
            assert one["segmentation"] == other["segmentation"]
    from pycocotools import mask as mask_utils

    one, other = (
        mask_utils.decode(records[0]["annotations"][2]["segmentation"]) for records in (before, after)
    )
    assert (one == other).all() and one.sum() == 5
    assert "cannot hold" not in log.text
    assert len(DatasetCatalog.get(f"dir:{root}")) == 2
    assert not check_dataset(uri).num_errors


def test_conversion_writes_a_rectangle_where_a_polygon_would_change_the_box(tmp_path, log):
    data = coco_content()
    data["annotations"][0]["bbox"] = [1, 1, 12, 12]
    start = write_coco(tmp_path / "start", data)
    uri = convert_dataset(start, "labelme", f"{tmp_path}/auto")
    first, second, _ = annotations(uri)
    assert xyxy(first) == [1, 1, 13, 13] and "segmentation" not in first and "segmentation" in second
    assert "objects lose their segmentation" in log.text
    uri = convert_dataset(start, "labelme", f"{tmp_path}/polygons", masks="polygons")
    assert xyxy(annotations(uri)[0]) == [2, 3, 10, 12.5]
    uri = convert_dataset(start, "labelme", f"{tmp_path}/boxes", masks="boxes")
    assert not any("segmentation" in annotation for annotation in annotations(uri))


def test_converted_splits_must_have_the_same_classes(tmp_path):
    start = write_voc(tmp_path / "start")
    for split in ("train", "val"):
        convert_dataset(start, "labelme", f"{tmp_path}/out", split=split)
    other = write_coco(
        tmp_path / "other", coco_content(categories=[{"id": i, "name": f"c{i}"} for i in (3, 5, 7)])
    )
    with pytest.raises(ValueError, match="other classes .*another folder"):
        convert_dataset(other, "labelme", f"{tmp_path}/out", split="test")
