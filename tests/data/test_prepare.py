"""Files derived from downloads for the built-in datasets, on small generated trees."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detlib.data import MetadataCatalog
from detlib.data.datasets import builtin
from detlib.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata
from detlib.data.datasets.cityscapes import load_cityscapes_semantic
from detlib.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from detlib.data.datasets.coco import load_sem_seg
from detlib.data.datasets.lvis import load_lvis_json
from detlib.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES
from detlib.data.prepare import (
    prepare_ade20k,
    prepare_cityscapes,
    prepare_coco_stuff,
    prepare_lvis_cocofied,
)
from detlib.data.prepare.__main__ import main
from detlib.data.prepare.lvis import COCO_SYNSETS

from . import cityscapes_tree

ROOT = Path(__file__).parents[2]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def read(path):
    return np.asarray(Image.open(path))


def make_ade20k(root, count=5):
    base = root / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    maps = {}
    for split in ("training", "validation"):
        for i in range(count):
            maps[split, f"{i}.png"] = rng.integers(0, 151, (6, 9), dtype=np.uint8)
            save(base / "annotations" / split / f"{i}.png", maps[split, f"{i}.png"])
            save(base / "images" / split / f"{i}.jpg", rng.integers(0, 255, (6, 9, 3)))
    return base, maps


@pytest.mark.parametrize("workers", [1, 2])
def test_ade20k_labels_are_shifted(tmp_path, workers):
    base, maps = make_ade20k(tmp_path)
    assert prepare_ade20k(str(tmp_path), workers=workers) == 10
    for (split, name), labels in maps.items():
        found = read(base / "annotations_detectron2" / split / name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[labels > 0], labels[labels > 0] - 1)
        assert (found[labels == 0] == 255).all()
    records = load_sem_seg(
        str(base / "annotations_detectron2" / "validation"), str(base / "images" / "validation")
    )
    assert len(records) == 5
    # Existing files are kept; missing files are written.
    (base / "annotations_detectron2" / "training" / "3.png").unlink()
    assert prepare_ade20k(str(tmp_path), workers=1) == 1
    assert prepare_ade20k(str(tmp_path), workers=1, overwrite=True) == 10


def test_ade20k_refuses_missing_or_malformed_downloads(tmp_path):
    with pytest.raises(FileNotFoundError, match="ADEChallengeData2016.*annotations"):
        prepare_ade20k(str(tmp_path))
    base, _ = make_ade20k(tmp_path, 1)
    save(base / "annotations" / "training" / "0.png", [[3, 151]])
    with pytest.raises(ValueError, match=r"training/0.png is not a label map .*151"):
        prepare_ade20k(str(tmp_path), workers=1)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        prepare_ade20k(str(tmp_path), workers=0)


def make_panoptic(root, name="val2017", count=3):
    """Write images with a person (1), a dog (18), grass (193) and no label; ids have three bytes."""
    annotations, expected = [], {}
    for i in range(count):
        ids = np.zeros((5, 8), dtype=np.int64)
        ids[0], ids[1], ids[2, :4], ids[2, 4:] = 70000 + i, 300, 193, 5
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2)
        save(root / "coco" / f"panoptic_{name}" / f"{i:012d}.png", rgb)
        segments = [(70000 + i, 1), (300, 18), (193, 193), (5, 92)]
        annotations.append(
            {
                "image_id": i,
                "file_name": f"{i:012d}.png",
                "segments_info": [{"id": segment, "category_id": c, "iscrowd": 0} for segment, c in segments],
            }
        )
        want = np.full((5, 8), 255)
        stuff = [c["id"] for c in COCO_CATEGORIES if not c["isthing"]]
        want[:2], want[2, :4], want[2, 4:] = 0, 1 + stuff.index(193), 1 + stuff.index(92)
        expected[f"{i:012d}.png"] = want
    path = root / "coco" / "annotations" / f"panoptic_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": annotations, "categories": []}
    path.write_text(json.dumps(content))
    return path, content, expected


def test_coco_stuff_labels(tmp_path):
    path, content, expected = make_panoptic(tmp_path)
    hundred = {**content, "annotations": content["annotations"][:1]}
    path.with_name("panoptic_val2017_100.json").write_text(json.dumps(hundred))
    assert prepare_coco_stuff(str(tmp_path), workers=1) == 4
    coco = tmp_path / "coco"
    for name, want in expected.items():
        np.testing.assert_array_equal(read(coco / "panoptic_stuff_val2017" / name), want)
    # The images of the small dataset are among those of the full one.
    for folder in ("panoptic_stuff_val2017_100", "panoptic_val2017_100"):
        assert os.listdir(coco / folder) == ["000000000000.png"]
    first = "000000000000.png"
    np.testing.assert_array_equal(read(coco / "panoptic_stuff_val2017_100" / first), expected[first])
    np.testing.assert_array_equal(
        read(coco / "panoptic_val2017_100" / first), read(coco / "panoptic_val2017" / first)
    )
    classes = _get_builtin_metadata("coco_panoptic_separated")["stuff_classes"]
    assert classes[expected[first][2, 0]] == "grass" and classes[0] == "things"


def test_coco_stuff_refuses_missing_or_malformed_downloads(tmp_path):
    with pytest.raises(FileNotFoundError, match="panoptic_train2017.json.*panoptic_val2017_100.json"):
        prepare_coco_stuff(str(tmp_path))
    path, content, _ = make_panoptic(tmp_path, count=1)
    segments = content["annotations"][0]["segments_info"]
    lost = segments.pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has segments \[5\], which its annotation does not list"):
        prepare_coco_stuff(str(tmp_path), workers=1)
    segments.append({**lost, "category_id": 12})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"panoptic_val2017.json: .* category ids \[12\]"):
        prepare_coco_stuff(str(tmp_path), workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_cityscapes_equals_cityscapesscripts(tmp_path, workers):
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    base = tmp_path / "cityscapes"
    image_dir, gt_dir = cityscapes_tree.write(base)
    wanted_maps = {path: read(path) for path in Path(gt_dir).rglob("*_labelTrainIds.png")}
    for path in wanted_maps:
        path.unlink()
    (tmp_path / "theirs").mkdir()
    convert2panoptic(str(base / "gtFine"), str(tmp_path / "theirs"), setNames=["val"])
    assert prepare_cityscapes(str(tmp_path), workers=workers) == 4
    for path, want in wanted_maps.items():
        np.testing.assert_array_equal(read(path), want, strict=True)

    panoptic = base / "gtFine" / "cityscapes_panoptic_val"
    found = json.loads(panoptic.with_suffix(".json").read_text())
    want = json.loads((tmp_path / "theirs" / "cityscapes_panoptic_val.json").read_text())
    for content in (found, want):
        for key in ("images", "annotations"):
            content[key].sort(key=lambda entry: entry.get("image_id", entry.get("id")))
        for annotation in content["annotations"]:
            annotation["segments_info"].sort(key=lambda segment: segment["id"])
    assert found == want
    for annotation in want["annotations"]:
        name = annotation["file_name"]
        theirs = read(tmp_path / "theirs" / "cityscapes_panoptic_val" / name)
        np.testing.assert_array_equal(read(panoptic / name), theirs, strict=True)

    meta = _get_builtin_metadata("cityscapes_panoptic")
    assert len(load_cityscapes_panoptic(image_dir, str(panoptic), f"{panoptic}.json", meta)) == 2
    assert len(load_cityscapes_semantic(image_dir, gt_dir)) == 2
    assert prepare_cityscapes(str(tmp_path), workers=1) == 0
    assert prepare_cityscapes(str(tmp_path), workers=1, overwrite=True) == 4


def test_cityscapes_refuses_missing_or_malformed_downloads(tmp_path):
    with pytest.raises(FileNotFoundError, match="Cityscapes' fine annotations, .*gtFine"):
        prepare_cityscapes(str(tmp_path))
    (tmp_path / "cityscapes" / "gtFine").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="none of the folders train, val and test"):
        prepare_cityscapes(str(tmp_path))
    _, gt_dir = cityscapes_tree.write(tmp_path / "cityscapes")
    stem = f"{gt_dir}/aachen/aachen_000000_000019_gtFine_"
    Image.fromarray(np.full((4, 4), 60000, dtype=np.uint16)).save(stem + "instanceIds.png")
    with pytest.raises(ValueError, match="aachen_000000_000019_gtFine_instanceIds.png: the instance id"):
        prepare_cityscapes(str(tmp_path), workers=1)
    os.remove(stem + "instanceIds.png")
    with pytest.raises(FileNotFoundError, match="instanceIds.png"):
        prepare_cityscapes(str(tmp_path), workers=1)


def test_coco_synsets():
    """Each of COCO's classes has a synset, and LVIS v0.5 has all but two of these."""
    assert sorted(c["id"] for c in COCO_SYNSETS.values()) == [
        c["id"] for c in COCO_CATEGORIES if c["isthing"]
    ]
    known = {category["synset"]: category["name"] for category in LVIS_CATEGORIES}
    lacking = sorted(c["name"] for synset, c in COCO_SYNSETS.items() if synset not in known)
    assert lacking == ["hot dog", "oven"]
    other_names = {c["name"]: known[s] for s, c in COCO_SYNSETS.items() if s in known}
    assert other_names["cow"] == "cow" and other_names["couch"] == "sofa"
    assert other_names["suitcase"] == "suitcase" and other_names["handbag"] == "handbag"


def test_cocofied_lvis_has_cocos_ids(tmp_path):
    ids = {category["name"]: category["id"] for category in LVIS_CATEGORIES}
    coco = {category["name"]: category["id"] for category in COCO_CATEGORIES}

    def annotation(number, name):
        return {
            "id": number,
            "image_id": 9,
            "category_id": ids[name],
            "bbox": [1.0, 2.0, 10.0, 8.0],
            "area": 80.0,
            "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]],
        }

    lvis = {
        "info": {"year": 2019},
        "images": [
            {
                "id": 9,
                "file_name": "9.jpg",
                "height": 20,
                "width": 30,
                "neg_category_ids": [ids["acorn"], ids["zebra"]],
                "not_exhaustive_category_ids": [ids["sofa"], ids["almond"]],
            },
            {"id": 10, "file_name": "10.jpg", "height": 20, "width": 30},
        ],
        "categories": LVIS_CATEGORIES,
        "annotations": [annotation(1, "cow"), annotation(2, "acorn"), annotation(3, "sofa")],
    }
    path = tmp_path / "lvis" / "lvis_v0.5_val.json"
    path.parent.mkdir()
    path.write_text(json.dumps(lvis))
    assert prepare_lvis_cocofied(str(tmp_path)) == 1
    assert prepare_lvis_cocofied(str(tmp_path)) == 0
    target = tmp_path / "lvis" / "lvis_v0.5_val_cocofied.json"
    made = json.loads(target.read_text())
    assert made["info"] == lvis["info"] and len(made["categories"]) == 78
    names = {category["id"]: category["name"] for category in made["categories"]}
    assert all(coco[name] == i for i, name in names.items())
    assert [(a["id"], a["category_id"]) for a in made["annotations"]] == [
        (1, coco["cow"]),
        (3, coco["couch"]),
    ]
    assert made["images"][0]["neg_category_ids"] == [coco["zebra"]]
    assert made["images"][0]["not_exhaustive_category_ids"] == [coco["couch"]]
    assert made["images"][1] == lvis["images"][1]
    # It matches the metadata of the built-in dataset.
    records = load_lvis_json(str(target), "images", "lvis_v0.5_val_cocofied")
    classes = MetadataCatalog.get("lvis_v0.5_val_cocofied").thing_classes
    assert [classes[a["category_id"]] for a in records[0]["annotations"]] == ["cow", "couch"]


def test_lvis_refuses_files_without_coco_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match="lvis_v0.5_train.json.*lvis_v0.5_val.json"):
        prepare_lvis_cocofied(str(tmp_path))
    path = tmp_path / "lvis" / "lvis_v0.5_train.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": LVIS_CATEGORIES[:1]}))
    with pytest.raises(ValueError, match="lvis_v0.5_train.json: none of the file's categories"):
        prepare_lvis_cocofied(str(tmp_path))


def test_command_writes_files_or_exits_with_2(tmp_path, capsys):
    make_ade20k(tmp_path, 1)
    assert main(["ade20k", "--root", str(tmp_path), "--workers", "1"]) == 0
    assert "ade20k: 2 files written below" in capsys.readouterr().out
    assert main(["coco-stuff", "--root", str(tmp_path)]) == 2
    assert "error: None of COCO's panoptic annotations exists" in capsys.readouterr().err
    tool = runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))
    with pytest.raises(SystemExit, match="0"):
        tool["main"](["--help"])
    assert "lvis-cocofied" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, command",
    [
        ("ade20k_sem_seg_train", "ade20k"),
        ("coco_2017_val_panoptic_separated", "coco-stuff"),
        ("coco_2017_train_panoptic_stuffonly", "coco-stuff"),
        ("cityscapes_fine_panoptic_val", "cityscapes"),
        ("lvis_v0.5_val_cocofied", "lvis-cocofied"),
    ],
)
def test_error_for_missing_files_names_the_command(name, command):
    with pytest.raises(FileNotFoundError, match=f"python -m detlib.data.prepare {command}`"):
        builtin.DatasetCatalog.get(name)
