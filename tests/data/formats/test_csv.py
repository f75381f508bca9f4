"""CSV files of boxes: columns, classes and images, which lines are refused."""

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.structures import BoxMode
from tests.data.small_datasets import SIZE, make_image, write

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax"
OPEN_IMAGES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def write_csv(root, *lines, header=HEADER, file="_annotations.csv", images=("a.jpg",)):
    write(f"{root}/{file}", "\n".join([header, *lines]) + "\n")
    for name in images:
        write(f"{root}/{name}", make_image())
    return f"csv:{root}/{file}"


def load(uri):
    return [(a["category_id"], list(a["bbox"])) for a in DatasetCatalog.get(uri)[0]["annotations"]]


def test_boxes_of_roboflow_and_tensorflow(tmp_path):
    lines = "a.jpg,40,30,wren,2,3,10,12", "b.jpg,40,30,owl,1,1,9,9", '"a.jpg",40,30,"owl, barn",5.5,6,20,25'
    uri = write_csv(tmp_path, *lines, images=("a.jpg", "b.jpg"))
    check_datasets_exist(uri)
    first, second = DatasetCatalog.get(uri)
    assert (first["file_name"], first["image_id"]) == (f"{tmp_path}/a.jpg", "a") and second["image_id"] == "b"
    assert (first["width"], first["height"]) == SIZE
    assert MetadataCatalog.get(uri).thing_classes == ["owl", "owl, barn", "wren"]
    assert load(uri) == [(2, [2, 3, 8, 9]), (1, [5.5, 6, 14.5, 19])]
    assert first["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    for name in (f"dir:{tmp_path}", f"csv:{tmp_path}", f"{uri}@{tmp_path}"):
        assert load(name) == load(uri)
    assert [f.kind for f in check_dataset(uri).findings] == ["duplicate-image"]


def test_columns_in_another_order_with_semicolons_and_a_byte_order_mark(tmp_path):
    header = "\ufeffXMin;YMin;XMax;YMax;Class;FileName"
    assert load(write_csv(tmp_path, "2;3;10;12;wren;a.jpg", header=header)) == [(0, [2, 3, 8, 9])]


def test_lines_with_an_image_only(tmp_path):
    uri = write_csv(tmp_path, "b.jpg,40,30,,,,,", "a.jpg,40,30,owl,1,2,3,4", images=("a.jpg", "b.jpg"))
    assert [len(record["annotations"]) for record in DatasetCatalog.get(uri)] == [0, 1]


def test_open_images(tmp_path):
    lines = "abc,xclick,/m/01,1,0.05,0.25,0.1,0.4,0,0,0,0,0", "abc,xclick,/m/02,1,0.5,1.0,0.5,1.0,0,0,1,0,0"
    uri = write_csv(
        tmp_path, *lines, header=OPEN_IMAGES, file="train-annotations-bbox.csv", images=("abc.jpg",)
    )
    assert MetadataCatalog.get(uri).thing_classes == ["/m/01", "/m/02"]
    write(f"{tmp_path}/class-descriptions-boxable.csv", "/m/01,Wren\n/m/02,Owl\n")
    MetadataCatalog.remove(uri)
    assert MetadataCatalog.get(uri).thing_classes == ["Owl", "Wren"]
    assert load(uri) == [(1, pytest.approx([2, 3, 8, 9])), (0, pytest.approx([20, 15, 20, 15]))]
    assert [a.get("iscrowd") for a in DatasetCatalog.get(uri)[0]["annotations"]] == [None, 1]
    assert load(f"dir:{tmp_path}") == load(uri)


def test_splits_are_folders_and_share_their_classes(tmp_path):
    write_csv(tmp_path / "train", "a.jpg,40,30,wren,2,3,10,12")
    write_csv(tmp_path / "valid", "a.jpg,40,30,owl,2,3,10,12")
    assert MetadataCatalog.get(f"csv:{tmp_path}@train").thing_classes == ["owl", "wren"]
    assert load(f"dir:{tmp_path}@val") == [(0, [2, 3, 8, 9])]
    with pytest.raises(FileNotFoundError, match="no folder 'test'. It has the splits: train, valid"):
        check_datasets_exist(f"csv:{tmp_path}@test")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("a.jpg,40,30,owl,1,2,x,4", "bad-box", "'x'"),
        ("a.jpg,40,30,owl,1,2", "bad-box", "''"),
        ("a.jpg,40,30,,1,2,3,4", "annotation-broken", "has no class"),
        ("a.jpg,40,30,owl,1,2,nan,4", "bad-shape", "numbers up to"),
        ("a.jpg,40,30,owl,1,2,1e300,4", "bad-shape", "numbers up to"),
        ("a.jpg,40,30,owl,9,2,3,4", "box-no-area", "its maximum below its minimum"),
    ],
)
def test_invalid_lines_are_findings_and_errors(tmp_path, line, kind, message):
    uri = write_csv(tmp_path, line, "a.jpg,40,30,owl,1,2,3,4")
    (finding,) = check_dataset(uri).findings
    assert finding.kind == kind and message in finding.detail
    with pytest.raises(ValueError, match=r"_annotations\.csv.*line 2"):
        DatasetCatalog.get(uri)


def test_open_images_in_pixels_are_refused(tmp_path):
    uri = write_csv(tmp_path, "a,x,owl,1,2,9,3,9,0,0,0,0,0", header=OPEN_IMAGES)
    assert "not-normalized" in [f.kind for f in check_dataset(uri).findings]


def test_boxes_without_area_are_an_error_or_dropped(tmp_path):
    uri = write_csv(tmp_path, "a.jpg,40,30,owl,1,2,1,4", "a.jpg,40,30,owl,1,2,3,4")
    with pytest.raises(ValueError, match="line 2 .owl.: the box has no area"):
        DatasetCatalog.get(uri)
    assert len(load(uri + "?empty_boxes=drop")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,c\n1,2,3\n", "must have the columns filename, class, xmin"),
        ("", "must have the columns"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (HEADER + "\n" + "a" * 200_000 + ",1", "not valid CSV"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    write(f"{tmp_path}/x.csv", content)
    with pytest.raises(ValueError, match=rf"x\.csv.*{message}"):
        DatasetCatalog.get(f"csv:{tmp_path}/x.csv")


def test_missing_files_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.csv.*does not exist"):
        check_datasets_exist(f"csv:{tmp_path}/x.csv")
    uri = write_csv(tmp_path, "b.jpg,40,30,owl,1,2,3,4")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg does not exist"):
        DatasetCatalog.get(uri)
