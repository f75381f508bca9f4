"""Cityscapes' files, compared with those that cityscapesscripts writes from the same polygons."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from detlib.data.datasets.builtin_meta import _get_builtin_metadata
from detlib.data.datasets.cityscapes import (
    load_cityscapes_instances,
    load_cityscapes_semantic,
    write_train_ids,
)
from detlib.data.datasets.cityscapes_labels import CITYSCAPES_LABELS
from detlib.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from detlib.structures import BoxMode
from tests.data import cityscapes_tree as tree

THINGS = _get_builtin_metadata("cityscapes")["thing_classes"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return tree.write(tmp_path_factory.mktemp("cityscapes"))


def instance_ids(record):
    path = record["file_name"].replace("leftImg8bit/val", "gtFine/val")
    return np.asarray(Image.open(path.replace("leftImg8bit", "gtFine_instanceIds")))


def pixels(annotation):
    if isinstance(annotation["segmentation"], dict):
        return mask_utils.decode(annotation["segmentation"]).astype(bool)
    rles = mask_utils.frPyObjects(annotation["segmentation"], tree.HEIGHT, tree.WIDTH)
    return mask_utils.decode(mask_utils.merge(rles)).astype(bool)


def test_labels_are_those_of_cityscapesscripts():
    from cityscapesscripts.helpers.labels import labels

    want = [
        (x.name, x.id, None if x.ignoreInEval else x.trainId, x.category, x.hasInstances, x.color)
        for x in labels
    ]
    found = [(x.name, x.id, x.train_id, x.category, x.has_instances, x.color) for x in CITYSCAPES_LABELS]
    assert sorted(found, key=str) == sorted(want, key=str)


@pytest.mark.parametrize("from_json, to_polygons", [(True, True), (False, True), (False, False)])
def test_instances(split, from_json, to_polygons):
    records = load_cityscapes_instances(*split, from_json, to_polygons)
    assert [r["image_id"] for r in records] == [
        "aachen_000000_000019_leftImg8bit.png",
        "bonn_000001_000020_leftImg8bit.png",
    ]
    record = records[0]
    assert (record["height"], record["width"]) == (tree.HEIGHT, tree.WIDTH)
    assert os.path.isfile(record["file_name"])
    ids = instance_ids(record)
    want = {}
    for i in np.unique(ids).tolist():
        label = {24: "person", 26: "car"}.get(i // 1000 if i >= 1000 else i)
        if label:
            want.setdefault((label, i < 1000), []).append(ids == i)
    assert sorted(want) == [("car", False), ("person", False), ("person", True)]
    found = {}
    for annotation in record["annotations"]:
        key = (THINGS[annotation["category_id"]], bool(annotation["iscrowd"]))
        found.setdefault(key, []).append(annotation)
    assert found.keys() == want.keys()
    for key, masks in want.items():
        assert len(found[key]) == len(masks)
        for mask in masks:
            best = max(found[key], key=lambda a: (pixels(a) & mask).sum())
            wrong = (pixels(best) != mask).sum()
            limit = 0.12 if from_json else 0.3 if to_polygons else 0  # outlines run through pixel centers
            assert wrong <= limit * mask.sum()
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert best["bbox_mode"] is BoxMode.XYXY_ABS
            np.testing.assert_allclose(best["bbox"], box, atol=0.6 if from_json else 0)


def test_polygons_cover_the_outermost_pixels(split):
    """The farther car has 41 by 21 pixels, minus 3 columns of the pole and what the nearer car covers."""
    shapely = pytest.importorskip("shapely")
    (record, _) = load_cityscapes_instances(*split)
    cars = [a for a in record["annotations"] if THINGS[a["category_id"]] == "car"]
    assert [len(a["segmentation"]) for a in cars] == [1, 2]  # from the nearest; the pole cuts the other
    parts = sorted(shapely.Polygon(np.reshape(p, (-1, 2))).area for p in cars[1]["segmentation"])
    assert parts[0] == pytest.approx(10 * 21, abs=0.5)
    assert parts[1] == pytest.approx(28 * 21 - 11 * 6, abs=0.5)
    np.testing.assert_allclose(cars[1]["bbox"], [20, 20, 61, 41], atol=1e-6)


def test_semantic(split):
    records = load_cityscapes_semantic(*split)
    assert records[1] == {
        "file_name": f"{split[0]}/bonn/bonn_000001_000020_leftImg8bit.png",
        "sem_seg_file_name": f"{split[1]}/bonn/bonn_000001_000020_gtFine_labelTrainIds.png",
        "height": tree.HEIGHT,
        "width": tree.WIDTH,
    }


def test_train_ids_are_those_of_cityscapesscripts(tmp_path):
    split = tree.write(tmp_path)
    files = [record["sem_seg_file_name"] for record in load_cityscapes_semantic(*split)]
    want = [np.asarray(Image.open(file)) for file in files]
    for file in files:
        os.remove(file)
    with pytest.raises(FileNotFoundError, match="labelTrainIds.*python -m detlib.data.datasets.cityscapes"):
        load_cityscapes_semantic(*split)
    assert write_train_ids(split[1]) == 2
    assert all((np.asarray(Image.open(file)) == x).all() for file, x in zip(files, want))


def test_panoptic(tmp_path):
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    image_dir, gt_dir = tree.write(tmp_path)
    convert2panoptic(os.path.dirname(gt_dir), setNames=["val"])
    meta = _get_builtin_metadata("cityscapes_panoptic")
    panoptic = os.path.join(os.path.dirname(gt_dir), "cityscapes_panoptic_val")
    first, _ = load_cityscapes_panoptic(image_dir, panoptic, panoptic + ".json", meta)
    assert first["image_id"] == "aachen_000000_000019"
    assert first["sem_seg_file_name"] == f"{gt_dir}/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"
    assert os.path.isfile(first["sem_seg_file_name"]) and os.path.isfile(first["pan_seg_file_name"])
    by_id = {s["id"]: s for s in first["segments_info"]}
    assert (by_id[7]["category_id"], by_id[7]["isthing"]) == (0, False)
    assert (by_id[26000]["category_id"], by_id[26000]["isthing"], by_id[26000]["iscrowd"]) == (13, True, 0)
    assert (by_id[24]["category_id"], by_id[24]["isthing"], by_id[24]["iscrowd"]) == (11, True, 1)

    with open(panoptic + ".json") as file:
        content = json.load(file)
    content["annotations"].pop()
    with open(panoptic + ".json", "w") as file:
        json.dump(content, file)
    with pytest.raises(ValueError, match="bonn_000001_000020.* has no panoptic annotation"):
        load_cityscapes_panoptic(image_dir, panoptic, panoptic + ".json", meta)
    with pytest.raises(FileNotFoundError, match="csCreatePanopticImgs"):
        load_cityscapes_panoptic(image_dir, panoptic, panoptic + "x.json", meta)


class TestErrors:
    def test_folder_without_images(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
            load_cityscapes_instances(str(tmp_path / "nowhere"), str(tmp_path))
        with pytest.raises(FileNotFoundError, match="has no CITY/"):
            load_cityscapes_instances(str(tmp_path), str(tmp_path))

    def test_polygons_cannot_become_rle(self, split):
        with pytest.raises(ValueError, match="set from_json=False"):
            load_cityscapes_instances(*split, to_polygons=False)

    @pytest.mark.parametrize(
        "entry, message",
        [
            ({"label": "carr", "polygon": tree.box(1, 1, 5, 5)}, "unknown label 'carr'"),
            ({"label": "car", "polygon": [[1, 1], [2, 2]]}, "fewer than three points"),
        ],
    )
    def test_malformed_object(self, tmp_path, entry, message):
        image_dir, gt_dir = tree.write(tmp_path)
        path = f"{gt_dir}/bonn/bonn_000001_000020_gtFine_polygons.json"
        with open(path, "w") as file:
            json.dump({"imgHeight": 4, "imgWidth": 4, "objects": [entry]}, file)
        with pytest.raises(ValueError, match=f"bonn_000001_000020.*{message}"):
            load_cityscapes_instances(image_dir, gt_dir)

    def test_error_without_shapely(self, split, monkeypatch):
        monkeypatch.setitem(sys.modules, "shapely", None)
        with pytest.raises(ModuleNotFoundError, match=r"detlib\[cityscapes\].*from_json=False"):
            load_cityscapes_instances(*split)
