"""DOTA's text files: rotated boxes, classes and splits, which lines are refused."""

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.structures import BoxMode
from tests.data.small_datasets import SIZE, make_image, write

HEADER = "imagesource:GoogleEarth\ngsd:0.146343590398\n"
# A square of side 10 around (20, 15), turned by 45 degrees, and an axis-aligned rectangle.
TURNED = "20.0 7.9289322 27.0710678 15.0 20.0 22.0710678 12.9289322 15.0 ship 0"
PLAIN = "5.0 6.0 20.0 6.0 20.0 25.0 5.0 25.0 plane 1"


def write_dota(root, *lines, name="P0001", image=True, labels="labelTxt"):
    write(f"{root}/{labels}/{name}.txt", HEADER + "\n".join(lines) + "\n")
    if image:
        write(f"{root}/images/{name}.png", make_image())
    return f"dota:{root}"


def load(uri):
    return [
        (a["category_id"], list(a["bbox"]), a.get("segmentation"))
        for a in DatasetCatalog.get(uri)[0]["annotations"]
    ]


def test_corners_become_rotated_boxes(tmp_path):
    uri = write_dota(tmp_path, TURNED, PLAIN)
    check_datasets_exist(uri)
    (record,) = DatasetCatalog.get(uri)
    assert (record["file_name"], record["image_id"]) == (f"{tmp_path}/images/P0001.png", "P0001")
    assert (record["width"], record["height"]) == SIZE
    metadata = MetadataCatalog.get(uri)
    assert (metadata.thing_classes, metadata.evaluator_type) == (["plane", "ship"], "rotated_coco")
    turned, plain = record["annotations"]
    # The first side goes down to the right, which is a clockwise turn.
    assert turned["bbox"] == pytest.approx([20, 15, 10, 10, -45], abs=1e-5)
    assert plain["bbox"] == pytest.approx([12.5, 15.5, 15, 19, 0])
    assert turned["bbox_mode"] == BoxMode.XYWHA_ABS and "difficult" not in turned and plain["difficult"] == 1
    assert not check_dataset(uri).num_errors


def test_axis_aligned_boxes_keep_the_outline_as_a_polygon(tmp_path):
    uri = write_dota(tmp_path, TURNED) + "?boxes=axis-aligned"
    ((_, bbox, segmentation),) = load(uri)
    assert bbox == pytest.approx([12.9289322, 7.9289322, 14.1421356, 14.1421356])
    assert segmentation == [[20, 7.9289322, 27.0710678, 15, 20, 22.0710678, 12.9289322, 15]]
    assert MetadataCatalog.get(uri).evaluator_type == "coco"


def test_splits_versions_and_shared_classes(tmp_path):
    write_dota(tmp_path / "train", TURNED, labels="labelTxt-v1.0/labelTxt")
    write_dota(tmp_path / "train", PLAIN, labels="labelTxt-v1.5")
    write_dota(tmp_path / "val", TURNED)
    assert MetadataCatalog.get(f"dir:{tmp_path}@val").thing_classes == ["plane", "ship"]
    assert load(f"dota:{tmp_path}@train")[0][0] == 0  # version 1.5
    with pytest.raises(FileNotFoundError, match="no folder 'test'. It has the splits: train, val"):
        check_datasets_exist(f"dota:{tmp_path}@test")
    with pytest.raises(FileNotFoundError, match="no folder labelTxt. It has the splits: train, val"):
        check_datasets_exist(f"dota:{tmp_path}")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("1 2 3 4 5 6 7 ship 0", "bad-label-line", "does not begin with 8 numbers"),
        ("1 2 3 4 ship", "bad-label-line", "has 5 words"),
        ("1 2 3 4 5 6 7 nan ship 0", "bad-shape", "numbers up to"),
        ("1 2 3 4 5 6 7 1e300 ship 0", "bad-shape", "numbers up to"),
        ("9 9 9 9 9 9 9 9 ship 0", "box-no-area", "[9.0, 9.0, 0.0, 0.0"),
    ],
)
def test_invalid_lines_are_findings_and_errors(tmp_path, line, kind, message):
    uri = write_dota(tmp_path, line, TURNED)
    (finding,) = check_dataset(uri).findings
    assert finding.kind == kind and message in finding.detail
    with pytest.raises(ValueError, match=r"P0001\.txt, line 3"):
        DatasetCatalog.get(uri)


def test_missing_images_and_unlabeled_ones(tmp_path, log):
    write(f"{tmp_path}/images/P0002.png", make_image())
    uri = write_dota(tmp_path, TURNED)
    assert len(DatasetCatalog.get(uri)) == 1 and "left out 1 images without label files" in log.text
    write_dota(tmp_path, TURNED, name="P0003", image=False)
    with pytest.raises(FileNotFoundError, match=r"P0003.*has no image 'P0003'"):
        DatasetCatalog.get(uri)
