"""One broken dataset for each kind of fault: what the checker reports, and what loaders do (docs/data.md)."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.check import FINDING_KINDS, check_dataset
from detlib.data.check.__main__ import main
from detlib.data.datasets import register_coco_instances
from detlib.data.detection_utils import check_image_size, read_image
from tests.data.small_datasets import (
    coco_content,
    make_image,
    voc_xml,
    write_coco,
    write_roboflow,
    write_voc,
    write_yolo,
)

NAN = float("nan")


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    before = MetadataCatalog.list()
    yield
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)
    DatasetCatalog.pop("check_test", None)


def change(path, value):
    """Return a change of valid content: `annotations.0.bbox` becomes `value`; None deletes it."""

    def apply(content):
        *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for part in way:
            content = content[part]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


def append(part, **entry):
    return lambda content: content[part].append(entry)


def box(*values):
    return change("annotations.0.bbox", list(values))


def polygon(*values):
    return change("annotations.0.segmentation", [list(values)])


def rle(size, counts):
    return change("annotations.2.segmentation", {"size": size, "counts": counts})


def keypoints(*values, **more):
    def apply(content):
        content["categories"][2]["keypoints"] = ["beak", "tail"]
        content["annotations"][0].update(keypoints=list(values), **more)

    return apply


# Kind, change, part of the reported location, and what loaders do: part of their error, "left out" (with a
# warning) or "kept".
COCO = [
    ("missing-part", change("categories", []), "ann.json", "has no categories"),
    ("missing-part", change("annotations", {"a": 1}), "ann.json", "must be a list of JSON objects"),
    ("category-broken", change("categories.0.name", None), "ann.json", "no 'id' or no 'name'"),
    ("category-broken", change("categories.0.id", "3"), "ann.json", "an integer as 'id'"),
    ("duplicate-category-id", change("categories.0.id", 5), "ann.json", "2 categories have the same id 5"),
    ("duplicate-category-name", change("categories.0.name", "owl"), "ann.json", "kept"),
    ("unused-category", append("categories", id=9, name="gull"), "ann.json", "kept"),
    ("image-broken", change("images.1.file_name", None), "ann.json", "has no 'file_name'"),
    ("image-broken", change("images.1.file_name", ""), "ann.json", "has no 'file_name'"),
    ("image-broken", change("images.1.width", None), "'b.jpg'", "has no 'width'"),
    ("image-wrong-type", change("images.1.id", 2.5), "'b.jpg'", "must be all integers"),
    ("image-wrong-type", change("images.1.width", "40"), "'b.jpg'", "must be integers above 0"),
    ("image-size-not-positive", change("images.1.height", 0), "'b.jpg'", "must be integers above 0"),
    ("duplicate-image-id", change("images.1.id", 1), "'b.jpg'", "two images have the id 1"),
    ("mixed-image-ids", change("images.1.id", "two"), "ann.json", "int and str"),
    ("duplicate-file-name", change("images.1.file_name", "a.jpg"), "'a.jpg'", "kept"),
    ("empty-image", change("annotations", []), "'b.jpg'", "kept"),
    ("size-mismatch", change("images.1.width", 40.5), "'b.jpg'", "must be integers above 0"),
    ("size-mismatch", change("images.1.width", 41), "'b.jpg'", "states width 41"),
    ("size-mismatch", lambda c: c["images"][1].update(width=30, height=40), "'b.jpg'", "states width 30"),
    ("missing-image", change("images.1.file_name", "c.jpg"), "'c.jpg'", "image file not found"),
    ("annotation-broken", append("annotations"), "annotation 'number 3'", "left out"),
    ("annotation-broken", change("annotations.0.category_id", None), "annotation 1", "has category id None"),
    ("annotation-broken", change("annotations.0.bbox", None), "annotation 1", "has the bbox None"),
    ("annotation-broken", change("annotations.0", "box"), "ann.json", "must be a list of JSON objects"),
    ("unknown-image", change("annotations.0.image_id", 77), "annotation 1", "left out"),
    ("unknown-category", change("annotations.0.category_id", 4), "annotation 1", "has category id 4"),
    ("duplicate-annotation-id", change("annotations.1.id", 1), "annotation 1", "has the same id"),
    (
        "duplicate-annotation",
        append("annotations", id=4, image_id=1, category_id=3, bbox=[0, 0, 40, 30]),
        "annotation 4",
        "kept",
    ),
    ("bad-iscrowd", change("annotations.0.iscrowd", "0"), "annotation 1", "has iscrowd '0'"),
    ("mostly-crowd", change("annotations.0.iscrowd", 1), "ann.json", "kept"),
    ("bad-area", change("annotations.0.area", -3), "annotation 1", "kept"),
    ("bad-area", change("annotations.0.area", 10**400), "annotation 1", "kept"),
    ("category-broken", change("categories.0.id", 10**400), "ann.json", "integer as 'id'"),
    ("image-wrong-type", change("images.1.id", 10**400), "'b.jpg'", "integer of up to 64 bits"),
    ("size-mismatch", change("images.1.width", 10**400), "'b.jpg'", "above 0, up to 1000000"),
    ("bad-box", box(1, 2, 3), "annotation 1", r"has the bbox \[1, 2, 3\]"),
    ("bad-box", box(1, 2, "3", 4), "annotation 1", "has the bbox"),
    ("box-not-finite", box(NAN, 2, 3, 4), "annotation 1", "has a box that is not of finite"),
    ("box-not-finite", box(1e9, 2, 3, 4), "annotation 1", "finite numbers up to 10000000"),
    ("box-not-finite", box(10**400, 2, 3, 4), "annotation 1", "finite numbers up to 10000000"),
    ("box-not-finite", box(1, 2, 1e308, 1e308), "annotation 1", "finite numbers up to 10000000"),
    ("box-no-area", box(1, 2, 0, 4), "annotation 1", "has a box without area"),
    ("box-no-area", box(9, 2, -4, 4), "annotation 1", "has a box without area"),
    ("box-outside", box(50, 2, 4, 4), "annotation 1", "kept"),
    ("box-sticks-out", box(30, 2, 14, 4), "annotation 1", "kept"),
    ("box-below-one-pixel", box(3, 2, 0.5, 4), "annotation 1", "kept"),
    (
        "bad-segmentation",
        change("annotations.0.segmentation", "mask"),
        "annotation 1",
        "neither polygons nor",
    ),
    ("polygon-too-short", polygon(1, 1, 5, 5), "annotation 1", "left out"),
    ("polygon-odd", polygon(1, 1, 5, 5, 1, 5, 2), "annotation 1", "left out"),
    (
        "polygon-not-finite",
        polygon(1, NAN, 5, 5, 1, 5),
        "annotation 1",
        "polygon with values that are not finite",
    ),
    ("polygon-not-finite", polygon(1e9, 1e9, 5, 5, -1e9, 5), "annotation 1", "polygon with values that"),
    ("polygon-not-finite", polygon(1, 1, 5, 5, 10**400, 5), "annotation 1", "polygon with values that"),
    ("polygon-no-area", polygon(1, 1, 5, 1, 9, 1), "annotation 1", "left out"),
    ("polygon-sticks-out", polygon(2, 3, 10, 3, 2, 39), "annotation 1", "kept"),
    ("rle-broken", rle([30, 40], [610, 5, 580]), "annotation 3", "broken RLE mask: the runs cover 1195"),
    ("rle-broken", rle([30, 40], "~~~"), "annotation 3", "broken RLE mask"),
    ("rle-broken", rle([30, 40], [10**400, 5]), "annotation 3", "broken RLE mask: a run is"),
    ("rle-broken", rle([10**6, 10**6], [10**12]), "annotation 3", "broken RLE mask: the size is"),
    ("rle-wrong-size", rle([40, 30], [610, 5, 585]), "annotation 3", r"RLE mask of \[height, width\]"),
    ("rle-empty", rle([30, 40], [1200]), "annotation 3", "kept"),
    ("mask-box-mismatch", box(2, 3, 30, 20), "annotation 1", "kept"),
    ("mixed-masks", change("annotations.0.segmentation", None), "'a.jpg'", "kept"),
    ("keypoint-length", keypoints(1, 2, 2), "annotation 1", "has 1 keypoints, but its category names 2"),
    ("keypoint-length", keypoints(1, 2, 2, 4), "annotation 1", "not triples"),
    ("keypoint-not-finite", keypoints(1, NAN, 2, 0, 0, 0), "annotation 1", "not finite numbers"),
    ("keypoint-not-finite", keypoints(1, 10**400, 2, 0, 0, 0), "annotation 1", "not finite numbers"),
    ("keypoint-visibility", keypoints(1, 2, 3, 0, 0, 0), "annotation 1", "kept"),
    ("keypoint-outside", keypoints(1, 2, 2, 90, 9, 2), "annotation 1", "kept"),
    ("keypoint-count", keypoints(1, 2, 2, 3, 3, 2, num_keypoints=1), "annotation 1", "kept"),
    ("mixed-keypoints", keypoints(1, 2, 2, 3, 3, 2), "'a.jpg'", "kept"),
]

VOC = [
    ("bad-file", "<annotation>", "Annotations/a.xml", "not valid XML"),
    ("image-without-size", voc_xml(("owl", (1, 1, 4, 4)), size=None), "a.xml", "kept"),
    ("image-wrong-type", voc_xml(size=("4px", 3)), "a.xml", "the size is"),
    ("size-mismatch", voc_xml(size=(30, 40)), "'a.jpg'", "states width 30"),
    ("annotation-broken", voc_xml(("", (1, 1, 4, 4))), "a.xml, object 1", "the class '' of an object"),
    ("annotation-broken", voc_xml(("owl", (1, 1, 4))), "a.xml, object 1", "not four numbers"),
    ("bad-box", voc_xml(("owl", (1, "x", 4, 4))), "a.xml, object 1 (owl)", "not four numbers"),
    ("box-not-finite", voc_xml(("owl", (1, "nan", 4, 4))), "a.xml, object 1 (owl)", "not finite"),
    ("box-no-area", voc_xml(("owl", (5, 1, 4, 4))), "a.xml, object 1 (owl)", "without area"),
    ("box-no-area", voc_xml(("owl", (5, 1, 5, 4))), "a.xml, object 1 (owl)", "left out"),
    ("box-outside", voc_xml(("owl", (50, 1, 60, 4))), "a.xml, object 1 (owl)", "kept"),
]

YOLO = [
    ("bad-label-line", "0 0.5 0.5 1", "a.txt, line 1", "4 values"),
    ("bad-label-line", "0 0.5 0.5 1 x", "a.txt, line 1", "could not convert"),
    ("unknown-category", "3 0.5 0.5 1 1", "a.txt, line 1", "class 3 is not in 0..2"),
    ("box-not-finite", "0 0.5 0.5 1 inf", "a.txt", "not finite"),
    ("polygon-not-finite", "0 0.5 0.5 1 inf 0.1 0.1", "a.txt", "not finite"),
    ("not-normalized", "0 20 15 4 4", "a.txt", "not pixels"),
    ("box-no-area", "0 0.5 0.5 0 1", "a.txt, line 1", "no area"),
    ("polygon-no-area", "0 0.1 0.1 0.3 0.3 0.5 0.5", "a.txt, line 1", "kept"),
    ("duplicate-annotation", "0 0.5 0.5 1 1\n0 0.5 0.5 1 1", "a.txt, line 2", "left out"),
    ("box-sticks-out", "0 0 0.5 0.5 0.5", "a.txt, line 1", "kept"),
]


def find(uri, kind, location):
    """Check a dataset and return the result; the fault must be reported at its location."""
    checked = check_dataset(uri)
    found = [finding for finding in checked.findings if finding.kind == kind]
    assert any(location in finding.location or location in finding.detail for finding in found), (
        checked.findings
    )
    assert all(finding.severity == FINDING_KINDS[kind][0] for finding in found)
    assert all(str(finding).startswith(f"{finding.severity}: {kind}: ") for finding in found)
    return checked


def use(uri):
    """Load as a training run does, and compare the sizes of the images."""
    dicts = DatasetCatalog.get(uri)
    for record in dicts:
        check_image_size(record, read_image(record["file_name"]))
    return dicts


def load_as(uri, outcome, log):
    if outcome in ("kept", "left out"):
        use(uri)
        assert ("left out" in log.text) == (outcome == "left out"), log.text
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=outcome):
            use(uri)


def check_repaired(checked, tmp_path):
    """Check that the repaired dataset loads and has no errors, unless it is empty."""
    content = checked.repaired
    if not content.get("images") or not content.get("categories"):
        return
    file = tmp_path / "fixed.json"
    file.write_text(json.dumps(content))
    uri = f"coco:{file}@{checked.image_root}"
    use(uri)
    again = check_dataset(uri)
    assert not again.num_errors, again.findings


@pytest.mark.parametrize(
    ("kind", "apply", "location", "outcome"),
    COCO,
    ids=lambda value: "" if callable(value) else str(value)[:30],
)
def test_coco_fault_is_found_and_treated_as_documented(tmp_path, kind, apply, location, outcome, log):
    content = coco_content()
    apply(content)
    uri = write_coco(tmp_path, content)
    checked = find(uri, kind, location)
    load_as(uri, outcome, log)
    check_repaired(checked, tmp_path)


@pytest.mark.parametrize(("kind", "text", "location", "outcome"), VOC, ids=lambda value: str(value)[:30])
def test_voc_fault_is_found_and_treated_as_documented(tmp_path, kind, text, location, outcome, log):
    uri = write_voc(tmp_path, a=text)
    checked = find(uri, kind, location)
    load_as(uri, outcome, log)
    check_repaired(checked, tmp_path)


@pytest.mark.parametrize(("kind", "line", "location", "outcome"), YOLO, ids=lambda value: str(value)[:30])
def test_yolo_fault_is_found_and_treated_as_documented(tmp_path, kind, line, location, outcome, log):
    uri = write_yolo(tmp_path, {"a": line, "b": "1 0.5 0.5 0.5 0.5\n"})
    checked = find(uri, kind, location)
    load_as(uri, outcome, log)
    check_repaired(checked, tmp_path)


def test_faults_of_yolo_label_files_and_data_yaml(tmp_path, log):
    uri = write_yolo(tmp_path, {"a": "0 0.5 0.5 1 1 0.5 0.5\n"}, kpt_shape=[1, 3])
    find(uri, "keypoint-length", "line 1")
    load_as(uri, "7 values", log)
    (tmp_path / "labels/train/x.txt").write_text("0 0.5 0.5 1 1\n")
    find(uri, "label-without-image", "x.txt")
    (tmp_path / "labels/train/a.txt").write_bytes(b"\xff\xfe0")
    find(uri, "bad-file", "labels/train/a.txt")
    load_as(uri, "is not text", log)
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    find(uri, "bad-file", "data.yaml")


def test_faults_of_voc_lists_and_missing_files(tmp_path, log):
    uri = write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\na\nc\n")
    (tmp_path / "Annotations/b.xml").unlink()
    find(uri, "duplicate-file-name", "'a'")
    find(uri, "missing-annotation-file", "'b.jpg'")
    find(uri, "missing-image", "'c.jpg'")
    load_as(uri, "b.xml' does not exist", log)
    (tmp_path / "labels.txt").write_text("crow\n")
    find(uri, "unknown-category", "object 1 (wren)")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_malformed_coco_file_is_found(tmp_path, text, log):
    uri = write_coco(tmp_path)
    (tmp_path / "ann.json").write_text(text)
    find(uri, "bad-file", "ann.json")
    load_as(uri, "is not valid JSON|must hold a JSON object", log)


def test_faults_of_image_files_are_found(tmp_path, log):
    uri = write_coco(tmp_path)
    file = tmp_path / "images/b.jpg"
    Image.effect_noise((40, 30), 90).convert("RGB").save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 + 300])
    find(uri, "truncated-image", "'b.jpg'")
    load_as(uri, "b.jpg is broken or cannot be read", log)
    file.write_text("not an image")
    find(uri, "unreadable-image", "'b.jpg'")
    load_as(uri, "b.jpg is broken or cannot be read", log)
    file.write_bytes((tmp_path / "images/a.jpg").read_bytes())
    find(uri, "duplicate-image", "'b.jpg'")
    load_as(uri, "kept", log)
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image().save(file, exif=exif)
    checked = find(uri, "size-mismatch-exif", "'b.jpg'")
    load_as(uri, "rotated by its EXIF", log)
    check_repaired(checked, tmp_path)


@pytest.mark.parametrize("writer", [write_coco, write_voc, write_yolo, write_roboflow])
def test_valid_dataset_has_no_errors(tmp_path, writer, capsys):
    uri = writer(tmp_path)
    assert main([uri]) == 0
    printed = capsys.readouterr().out
    assert "\n0 errors" in printed and "error:" not in printed
    assert main([f"dir:{tmp_path}", "--no-images"]) == 0
    assert f"dir:{tmp_path} is read as {uri}: found" in capsys.readouterr().out


def test_float_sizes_and_self_crossing_polygons_are_not_errors(tmp_path):
    content = coco_content()
    content["images"][1].update(width=40.0, height=30.0)
    content["annotations"][0]["segmentation"] = [[2, 3, 10, 12.5, 10, 3, 2, 12.5]]  # a bow tie: its area is 0
    checked = check_dataset(write_coco(tmp_path, content))
    assert [finding.kind for finding in checked.findings] == ["mostly-crowd", "empty-image"]
    assert [image["width"] for image in checked.repaired["images"]] == [40, 40]
    assert len(checked.repaired["annotations"]) == 3


def test_registered_and_generated_datasets_can_be_checked(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 1, 0, 3]
    write_coco(tmp_path, content)
    register_coco_instances("check_test", {}, f"{tmp_path}/ann.json", f"{tmp_path}/images")
    assert main(["check_test"]) == 1
    assert "error: box-no-area" in capsys.readouterr().out
    assert main(["shapes:val?num=3&size=32"]) == 0
    assert main(["no_such_set"]) == 2
    assert "error: Dataset 'no_such_set' is not registered" in capsys.readouterr().err


def test_dataset_in_an_object_store_is_checked_and_fixed(capsys):
    content = coco_content()
    content["images"][1]["file_name"] = "c.jpg"
    uri = write_coco("memory://check/coco", content)
    assert main([uri, "--fix", "memory://check/fixed.json"]) == 1
    assert "missing-image" in capsys.readouterr().out
    assert main(["coco:memory://check/fixed.json@memory://check/coco/images"]) == 0


def test_command_prints_findings_tables_and_repairs(tmp_path, capsys):
    content = coco_content()
    content["annotations"] += [
        {"id": 10 + i, "image_id": 1, "category_id": 3, "bbox": [i, 2, 50, 9]} for i in range(25)
    ]
    content["annotations"].append({"id": 50, "image_id": 2, "category_id": 5, "bbox": [1, 2, 0, 9]})
    uri = write_coco(tmp_path, content)
    assert main([uri, "--fix", str(tmp_path / "fixed.json")]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("error: box-no-area:") and printed.count("warning: box-sticks-out: ") == 21
    assert "box-sticks-out: and 5 more (--all shows them)" in printed
    assert re.search(r"crow +1 +26 +0 +\d+ +\d+ +0", printed)
    assert re.search(r"owl +1 +1 +1 +0 +0 +0", printed)
    assert "annotation 50: annotation dropped (box-no-area)" in printed
    assert "kept 2 of 2 images and 28 of 29 annotations" in printed
    fixed = json.loads((tmp_path / "fixed.json").read_text())
    assert fixed["annotations"][4]["bbox"] == [1, 2, 39, 9]
    assert main([f"coco:{tmp_path}/fixed.json@{tmp_path}/images", "--all"]) == 0


def test_exit_code_2_if_the_fixed_file_cannot_be_written(tmp_path, capsys):
    uri = write_coco(tmp_path)
    assert main([uri, "--fix", f"{tmp_path}/ann.json/fixed.json"]) == 2
    assert "ann.json/fixed.json cannot be written" in capsys.readouterr().err


def test_command_runs_as_a_module(tmp_path):
    uri = write_yolo(tmp_path)
    command = [sys.executable, "-m", "detlib.data.check", uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "2 images, 2 annotations" in done.stdout and not done.stderr


def test_deep_json_is_a_finding_and_an_error_of_the_loader(tmp_path):
    uri = write_coco(tmp_path)
    (tmp_path / "ann.json").write_text("[" * 100000 + "]" * 100000)
    checked = check_dataset(uri)
    assert [f.kind for f in checked.findings] == ["bad-file"] and "nested too deeply" in str(
        checked.findings[0]
    )
    with pytest.raises(ValueError, match="ann.json.*nested too deeply"):
        DatasetCatalog.get(uri)


def test_sizes_beyond_every_image_are_found_without_reading_images(tmp_path):
    for size in (10**400, 1e308, float("inf"), float("nan")):
        content = coco_content()
        content["images"][1]["width"] = size
        checked = check_dataset(write_coco(tmp_path, content), images=False)
        assert "image-wrong-type" in {f.kind for f in checked.findings}
        assert [image["file_name"] for image in checked.repaired["images"]] == ["a.jpg"]


def test_names_that_the_terminal_cannot_show_are_printed_escaped(tmp_path, monkeypatch):
    content = coco_content()
    content["categories"][0]["name"] = "owl \udcff"
    uri = write_coco(tmp_path, content)
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main([uri]) == 0
    stream.flush()
    assert b"owl \\udcff" in stream.buffer.getvalue()


def test_null_characters_in_file_names_are_missing_images(tmp_path):
    content = coco_content()
    content["images"][1]["file_name"] = "b\0.jpg"
    uri = write_coco(tmp_path, content)
    assert "missing-image" in {f.kind for f in check_dataset(uri).findings}
    with pytest.raises(ValueError, match="b.*jpg.*must be a path"):
        use(uri)


TRIANGLE = [2.0, 3.0, 10.0, 3.0, 2.0, 12.5]
RLE = {"size": [30, 40], "counts": [610, 5, 585]}


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        (box(2, 3, 0, 0), "box-no-area", {"bbox": [2, 3, 8, 9.5]}),
        (box(2, NAN, 4, 4), "box-not-finite", {"bbox": [2, 3, 8, 9.5]}),
        (box("2", "3", "8", "9.5"), "bad-box", {"bbox": [2, 3, 8, 9.5]}),
        (change("annotations.0.bbox", None), "annotation-broken", {"bbox": [2, 3, 8, 9.5]}),
        (change("annotations.0.bbox", []), "bad-box", {"bbox": [2, 3, 8, 9.5]}),
        (change("annotations.0.image_id", "1"), "unknown-image", {"image_id": 1}),
        (change("annotations.0.category_id", "7"), "unknown-category", {"category_id": 7}),
        (change("annotations.0.segmentation", TRIANGLE), "bad-segmentation", {"segmentation": [TRIANGLE]}),
        (
            change("annotations.0.segmentation", [[2.0, 3.0], [10.0, 3.0], [2.0, 12.5]]),
            "bad-segmentation",
            {"segmentation": [TRIANGLE]},
        ),
        (
            change("annotations.0.segmentation", [[[2.0, 3.0], [10.0, 3.0], [2.0, 12.5]]]),
            "bad-segmentation",
            {"segmentation": [TRIANGLE]},
        ),
        (polygon(*map(str, TRIANGLE)), "bad-segmentation", {"segmentation": [TRIANGLE]}),
    ],
)
def test_fix_repairs_what_is_certain(tmp_path, change, kind, expected):
    content = coco_content()
    change(content)
    checked = check_dataset(write_coco(tmp_path, content))
    assert kind in {f.kind for f in checked.findings}
    assert len(checked.repaired["annotations"]) == 3
    first = checked.repaired["annotations"][0]
    assert {key: first[key] for key in expected} == expected


def test_fix_takes_the_box_from_an_rle_mask(tmp_path):
    content = coco_content()
    content["annotations"][2]["bbox"] = None
    checked = check_dataset(write_coco(tmp_path, content))
    # The runs are in column order: pixels 610 to 614 are column 20, rows 10 to 14.
    assert checked.repaired["annotations"][2]["bbox"] == [20, 10, 1, 5]


def test_fix_reads_ids_and_sizes_that_are_texts(tmp_path):
    content = coco_content()
    for category in content["categories"]:
        category["id"] = str(category["id"])
    content["images"][0].update(width="40", height="30")
    checked = check_dataset(write_coco(tmp_path, content), images=False)
    assert {"category-broken", "image-wrong-type"} <= {f.kind for f in checked.findings}
    assert [category["id"] for category in checked.repaired["categories"]] == [3, 5, 7]
    assert checked.repaired["images"][0]["width"] == 40 and len(checked.repaired["annotations"]) == 3


def test_fix_changes_paths_of_another_machine(tmp_path):
    content = coco_content()
    content["images"][0]["file_name"] = r"C:\data\images\a.jpg"
    checked = check_dataset(write_coco(tmp_path, content))
    assert "image-path" in {f.kind for f in checked.findings} and not checked.num_errors
    assert [image["file_name"] for image in checked.repaired["images"]] == ["a.jpg", "b.jpg"]


def test_boxes_that_state_their_center_are_one_error_of_the_dataset(tmp_path):
    content = coco_content()
    corners = [(x, 2.0 * i, 8.0, 6.0) for i, x in enumerate((3.0, 6.0, 9.0, 12.0, 15.0))]
    content["annotations"] = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 7,
            "bbox": [x + w / 2, y + h / 2, w, h],
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i, (x, y, w, h) in enumerate(corners)
    ]
    checked = check_dataset(write_coco(tmp_path, content))
    assert [f.kind for f in checked.findings if f.severity == "error"] == ["center-boxes"]
    assert "mask-box-mismatch" not in {f.kind for f in checked.findings}
    assert [tuple(a["bbox"]) for a in checked.repaired["annotations"]] == corners
    for annotation, box in zip(content["annotations"], corners):
        annotation["bbox"] = list(box)
    assert not check_dataset(write_coco(tmp_path, content)).num_errors
