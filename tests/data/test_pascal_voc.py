"""Pascal VOC folders, registered and by dataset URI."""

import logging

import pytest
from PIL import Image

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import check_datasets_exist
from detlib.data.check import check_dataset
from detlib.data.datasets import load_voc_instances, register_pascal_voc
from detlib.data.datasets.voc_layout import find_voc_class_names
from detlib.structures import BoxMode


def xml(*objects, size="<size><width>40</width><height>30</height></size>"):
    written = ""
    for name, box in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        written += (
            f"<object><name>{name}</name><part><name>head</name></part><bndbox>{corners}</bndbox></object>"
        )
    return f"<annotation>{size}{written}</annotation>"


@pytest.fixture
def folder(tmp_path):
    """Write two images for train, one for val; the class "owl" is in val only."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / part).mkdir(parents=True)
    for name, suffix in (("b", "jpg"), ("a", "png"), ("c", "jpg")):
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.{suffix}")
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\na  1\n\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\n")
    (tmp_path / "Annotations/a.xml").write_text(xml(("wren", (2, 3, 10, 12.5)), ("crow", (1, 1, 40, 30))))
    (tmp_path / "Annotations/b.xml").write_text(xml(size=""))
    (tmp_path / "Annotations/c.xml").write_text(xml(("owl", (5, 6, 7, 8))))
    yield tmp_path
    for split in ("train", "val", "none"):
        MetadataCatalog.pop(f"voc:{tmp_path}@{split}", None)


CLASSES = ["crow", "owl", "wren"]


def test_boxes_are_one_based_by_default(folder):
    b, a = load_voc_instances(str(folder), "train", CLASSES)
    assert b == {
        "file_name": str(folder / "JPEGImages/b.jpg"),
        "image_id": "b",
        "height": 30,
        "width": 40,
        "annotations": [],
    }
    assert a["file_name"].endswith("a.png")
    assert a["annotations"] == [
        {"category_id": 2, "bbox": [1.0, 2.0, 10.0, 12.5], "bbox_mode": BoxMode.XYXY_ABS},
        {"category_id": 0, "bbox": [0.0, 0.0, 40.0, 30.0], "bbox_mode": BoxMode.XYXY_ABS},
    ]


def test_uri_reads_boxes_as_written_and_classes_of_all_splits(folder):
    uri = f"voc:{folder}@train"
    check_datasets_exist(uri)
    dicts = DatasetCatalog.get(uri)
    assert [a["bbox"] for a in dicts[1]["annotations"]] == [[2, 3, 10, 12.5], [1, 1, 40, 30]]
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"voc:{folder}@{split}")
        assert metadata.thing_classes == CLASSES and metadata.evaluator_type == "coco"
    assert DatasetCatalog.get(f"voc:{folder}@val")[0]["annotations"][0]["category_id"] == 1


def test_register_pascal_voc(folder):
    name = "voc_test_birds"
    try:
        register_pascal_voc(name, str(folder), "train", 2012, CLASSES)
        assert DatasetCatalog.get(name)[1]["annotations"][0]["bbox"] == [1.0, 2.0, 10.0, 12.5]
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "pascal_voc" and metadata.year == 2012
        register_pascal_voc(name, str(folder), "val", 2012, CLASSES, one_based=False, overwrite=True)
        assert DatasetCatalog.get(name)[0]["annotations"][0]["bbox"] == [5, 6, 7, 8]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_box_of_one_pixel_has_an_area_if_one_based(folder, caplog, monkeypatch):
    """One-based boxes include their maximum, so such a box has an area; otherwise it has none."""
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    (folder / "Annotations/c.xml").write_text(xml(("owl", (5, 6, 5, 8)), ("owl", (1, 1, 4, 4))))
    with caplog.at_level(logging.WARNING, logger="detlib"):
        boxes = [a["bbox"] for a in load_voc_instances(str(folder), "val", CLASSES)[0]["annotations"]]
    assert boxes == [[4, 5, 5, 8], [0, 0, 4, 4]] and not caplog.records
    boxes = [a["bbox"] for a in DatasetCatalog.get(f"voc:{folder}@val")[0]["annotations"]]
    assert boxes == [[1, 1, 4, 4]]
    assert "c.xml: left out an object 'owl' whose box has no area: ['5', '6', '5', '8']" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            xml(("owll", (1, 1, 4, 4))),
            "'owll' of an object is not one of the 3 classes: crow, owl, wren. Did you mean 'owl'",
        ),
        (xml(("owl", (5, 1, 4, 4))), "'owl' has a box without area"),
        (xml(("owl", (1, "x", 4, 4))), "'owl' has the box .*'x'"),
        ("<annotation><object><name>owl</name></object></annotation>", "'owl' has the box .*None"),
        (xml(size="<size><width>inf</width><height>3</height></size>"), "the size is"),
        (xml(size="<size><width>1e308</width><height>3</height></size>"), "must be at most 1000000"),
        (xml(size="<size><width>4px</width><height>3</height></size>"), "the size is"),
        ("<annotation>", "not valid XML"),
    ],
)
def test_error_names_the_file(folder, text, message):
    (folder / "Annotations/c.xml").write_text(text)
    with pytest.raises(ValueError, match=f"c.xml.*{message}"):
        load_voc_instances(str(folder), "val", CLASSES)


def test_error_for_missing_lists_annotations_and_images(folder):
    with pytest.raises(FileNotFoundError, match="none.txt' does not exist.*train, val"):
        check_datasets_exist(f"voc:{folder}@none")
    with pytest.raises(FileNotFoundError, match="the folder '/nowhere' does not exist"):
        check_datasets_exist("voc:/nowhere@train")
    with pytest.raises(ValueError, match="has the splits: train, val. Specify which is meant"):
        check_datasets_exist(f"voc:{folder}")
    (folder / "ImageSets/Main/train.txt").write_text("b\nz\n")
    with pytest.raises(FileNotFoundError, match="no image 'z'.*train.txt"):
        load_voc_instances(str(folder), "train", CLASSES)
    (folder / "Annotations/c.xml").unlink()
    with pytest.raises(FileNotFoundError, match="c.xml"):
        load_voc_instances(str(folder), "val", CLASSES)
    (folder / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="val.txt' lists no images"):
        load_voc_instances(str(folder), "val", CLASSES)


@pytest.mark.parametrize("encoding", ["gbk", "gb2312", "big5", "shift_jis", "utf-16", "iso-8859-1"])
def test_encodings_of_the_annotations(folder, encoding):
    name = "böse" if encoding == "iso-8859-1" else "中"
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + xml((name, (5, 6, 7, 8)))
    (folder / "Annotations/c.xml").write_bytes(text.encode(encoding))
    assert find_voc_class_names(str(folder)) == sorted(["crow", "wren", name])
    assert not check_dataset(f"voc:{folder}@val", images=False).num_errors


def test_error_for_an_unknown_encoding_names_the_file(folder):
    text = '<?xml version="1.0" encoding="nonsense"?>' + xml()
    (folder / "Annotations/c.xml").write_text(text)
    with pytest.raises(ValueError, match="c.xml' is not valid XML: unknown encoding: nonsense"):
        load_voc_instances(str(folder), "val", CLASSES)
    assert "bad-file" in {f.kind for f in check_dataset(f"voc:{folder}@val", images=False).findings}


def test_lists_of_a_windows_editor(folder):
    (folder / "ImageSets/Main/train.txt").write_bytes("\ufeffa\r\nb\r\n".encode())
    (folder / "labels.txt").write_bytes("\ufeffwren\r\nowl\r\ncrow\r\n".encode())
    assert find_voc_class_names(str(folder)) == ["wren", "owl", "crow"]
    assert [r["image_id"] for r in DatasetCatalog.get(f"voc:{folder}@train")] == ["a", "b"]
    (folder / "labels.txt").write_bytes("größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.txt' is not UTF-8 text"):
        find_voc_class_names(str(folder))
    assert "bad-file" in {f.kind for f in check_dataset(f"voc:{folder}@train").findings}


def test_image_names_with_spaces(folder):
    for part, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (folder / f"{part}/c.{suffix}").rename(folder / f"{part}/my bird 1.{suffix}")
    (folder / "ImageSets/Main/val.txt").write_text("my bird 1\na  -1\n")
    assert [r["image_id"] for r in load_voc_instances(str(folder), "val", CLASSES)] == ["my bird 1", "a"]
    (folder / "ImageSets/Main/val.txt").write_text("my fish\n")
    with pytest.raises(FileNotFoundError, match="no image 'my fish'"):
        load_voc_instances(str(folder), "val", CLASSES)


def test_duplicates_in_lists_are_read_once(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    (folder / "ImageSets/Main/train.txt").write_text("b\na\nb\n")
    assert [r["image_id"] for r in load_voc_instances(str(folder), "train", CLASSES)] == ["b", "a"]
    assert "lists 1 images again: left out" in caplog.text
    (folder / "labels.txt").write_text("owl\ncrow\nowl\nwren\n")
    assert find_voc_class_names(str(folder)) == ["owl", "crow", "wren"]
    assert "lists ['owl'] more than once" in caplog.text
    kinds = {f.kind for f in check_dataset(f"voc:{folder}@train").findings}
    assert {"duplicate-file-name", "duplicate-category-name"} <= kinds


def write_images(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)


def write_xml(root, *names, filename=""):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = f"<filename>{filename}</filename>" if filename else ""
        path.write_text(xml(("wren", (2, 3, 10, 12))).replace("<annotation>", f"<annotation>{stated}"))


@pytest.mark.parametrize(
    ("xml_file", "image"),
    [
        ("annotations/a.xml", "images/a.png"),
        ("annots/a.xml", "JPEGImages/a.jpg"),
        ("Annotations/a.xml", "a.jpg"),
        ("labels/a.xml", "Images/a.jpeg"),
        ("a.xml", "a.JPG"),
        ("a.xml", "images/a.jpg"),
    ],
)
def test_layouts_without_lists_are_one_split(tmp_path, xml_file, image):
    write_xml(tmp_path, xml_file)
    write_images(tmp_path, image)
    for uri in (f"voc:{tmp_path}", f"voc:{tmp_path}@all", f"dir:{tmp_path}"):
        check_datasets_exist(uri)
        assert [r["file_name"] for r in DatasetCatalog.get(uri)] == [str(tmp_path / image)]
        assert not check_dataset(uri).num_errors
    with pytest.raises(FileNotFoundError, match="neither a list ImageSets/Main/val.txt nor a folder 'val'"):
        check_datasets_exist(f"voc:{tmp_path}@val")


@pytest.mark.parametrize(
    ("xml_file", "image"),
    [
        ("{}/a.xml", "{}/a.jpg"),  # Roboflow
        ("{}/annotations/a.xml", "{}/images/a.jpg"),
        ("annotations/{}/a.xml", "images/{}/a.jpg"),
    ],
)
def test_splits_may_be_folders(tmp_path, xml_file, image):
    for split in ("train", "valid"):
        write_xml(tmp_path, xml_file.format(split))
        write_images(tmp_path, image.format(split))
    for uri in (f"voc:{tmp_path}@val", f"dir:{tmp_path}@val"):
        assert [r["file_name"] for r in DatasetCatalog.get(uri)] == [str(tmp_path / image.format("valid"))]
        assert MetadataCatalog.get(uri).thing_classes == ["wren"]
    with pytest.raises(FileNotFoundError, match="no folder 'test'.* has the splits: train, valid"):
        check_datasets_exist(f"voc:{tmp_path}@test")
    with pytest.raises(ValueError, match="has the splits train, valid; specify which is meant"):
        check_datasets_exist(f"voc:{tmp_path}")


def test_lists_may_be_in_imagesets_itself(tmp_path):
    write_xml(tmp_path, "Annotations/a.xml", "Annotations/b.xml")
    write_images(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/train.txt").write_text("b\n")
    assert [r["image_id"] for r in DatasetCatalog.get(f"voc:{tmp_path}@train")] == ["b"]


def test_image_of_another_name_is_found_by_the_filename_in_the_xml(tmp_path):
    write_xml(tmp_path, "annotations/a.xml", filename=r"C:\data\photo 1.png")
    write_images(tmp_path, "images/photo 1.png")
    assert DatasetCatalog.get(f"voc:{tmp_path}")[0]["file_name"] == str(tmp_path / "images/photo 1.png")
    (tmp_path / "images/photo 1.png").unlink()
    with pytest.raises(FileNotFoundError, match="images has no image 'a'"):
        DatasetCatalog.get(f"voc:{tmp_path}@all")


def test_folders_without_xml_name_what_was_searched(tmp_path):
    write_images(tmp_path, "images/a.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/a.xml").write_text("<annotations></annotations>")
    with pytest.raises(FileNotFoundError, match="no XML files of VOC, here or in a folder annotations, "):
        check_datasets_exist(f"voc:{tmp_path}@train")


def test_files_of_macos_are_passed_over(tmp_path):
    write_xml(tmp_path, "annotations/a.xml")
    (tmp_path / "annotations/._a.xml").write_bytes(b"\0\5\x16\7")
    write_images(tmp_path, "images/a.jpg")
    assert len(DatasetCatalog.get(f"voc:{tmp_path}")) == 1
