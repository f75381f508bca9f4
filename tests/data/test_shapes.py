"""The generated shapes: reproducible images, and annotations that match them."""

import hashlib
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.shapes import ShapesParameters, load_shapes
from detlib.structures import BoxMode
from detlib.structures.panoptic import rgb_to_id


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(record, key="file_name"):
    return np.asarray(Image.open(record[key]))


def test_boxes_are_the_extent_of_polygons_and_keypoints_are_inside():
    dicts = DatasetCatalog.get("shapes:train?num=12&size=96&seed=4")
    assert len(dicts) == 12 and len({d["image_id"] for d in dicts}) == 12
    for record in dicts:
        assert pixels(record).shape == (96, 96, 3) == (record["height"], record["width"], 3)
        assert 1 <= len(record["annotations"]) <= 5
        for annotation in record["annotations"]:
            assert annotation["bbox_mode"] is BoxMode.XYXY_ABS and annotation["category_id"] in (0, 1, 2)
            polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            assert len(polygon) == {0: 24, 1: 4, 2: 3}[annotation["category_id"]]
            np.testing.assert_array_equal(annotation["bbox"], [*polygon.min(0), *polygon.max(0)])
            assert polygon.min() >= 0 and polygon.max() <= 96
            keypoints = np.array(annotation["keypoints"]).reshape(5, 3)
            low, high = polygon.min(0) - 0.1, polygon.max(0) + 0.1
            assert ((keypoints[:, :2] >= low) & (keypoints[:, :2] <= high)).all()
            assert set(keypoints[:, 2]) <= {1, 2}
            center, top, left, right, bottom = keypoints[:, :2]
            assert left[0] < center[0] < right[0] and top[1] < center[1] < bottom[1]


def test_images_of_a_seed_do_not_change():
    """A change of the pixels of this seed requires a new version of the cache."""
    digest = hashlib.sha256()
    for record in load_shapes(ShapesParameters("train", num=6, size=64, seed=1)):
        digest.update(pixels(record).tobytes())
        digest.update(pixels(record, "sem_seg_file_name").tobytes())
        digest.update(str(record["annotations"][0]["segmentation"]).encode())
    assert digest.hexdigest() == "b1ebeb3beb3f0748b233e0fc68bf56ccba087bab91152a242c782de20cdb650e"


def test_images_depend_on_seed_and_split_and_not_on_their_number():
    first = load_shapes(ShapesParameters("train", num=3, size=48))
    more = load_shapes(ShapesParameters("train", num=5, size=48))
    for a, b in zip(first, more):
        np.testing.assert_array_equal(pixels(a), pixels(b))
        assert a["annotations"] == b["annotations"]
    others = [ShapesParameters("val", 3, 48), ShapesParameters("train", 3, 48, seed=1)]
    for parameters in others:
        for a, b in zip(first, load_shapes(parameters)):
            assert (pixels(a) != pixels(b)).any()
    assert ShapesParameters("train").num == 1000 and ShapesParameters("val").num == 200


def test_label_maps_match_the_polygons():
    """Pillow's rasterizer treats edges differently, so the IoU is high but not 1."""
    seen = set()
    for record in load_shapes(ShapesParameters("val", num=10, size=128)):
        canvas = Image.new("L", (4 * 128, 4 * 128))
        for annotation in record["annotations"]:
            ImageDraw.Draw(canvas).polygon([4 * v for v in annotation["segmentation"][0]], fill=255)
        drawn = np.asarray(canvas.resize((128, 128), Image.Resampling.BOX)) >= 128
        stuff = pixels(record, "sem_seg_file_name")
        things = stuff == 0
        assert (drawn & things).sum() / (drawn | things).sum() > 0.97
        seen |= set(np.unique(stuff))
        image = pixels(record).astype(int)
        for annotation in record["annotations"]:
            x, y, visibility = annotation["keypoints"][:3]
            if visibility == 2:
                outside = image[~things]
                inside = image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
                assert np.abs(inside.mean(0) - outside.mean(0)).sum() > 60, (
                    "shapes must contrast with the background"
                )
    assert seen == {0, 1, 2, 3}


def test_segments_agree_with_labels_and_annotations():
    for record in load_shapes(ShapesParameters("val", num=8, size=96)):
        ids = rgb_to_id(pixels(record, "pan_seg_file_name"))
        stuff = pixels(record, "sem_seg_file_name")
        infos = {x["id"]: x for x in record["segments_info"]}
        assert set(np.unique(ids).tolist()) == infos.keys() and 0 not in infos
        table = np.zeros(ids.max() + 1, int)
        for i, x in infos.items():
            table[i] = 0 if x["isthing"] else x["category_id"]
        np.testing.assert_array_equal(stuff, table[ids])
        things = [x for x in infos.values() if x["isthing"]]
        assert [x["category_id"] for x in things] == [a["category_id"] for a in record["annotations"]]
        for x, annotation in zip(things, record["annotations"]):
            rows, columns = (ids == x["id"]).nonzero()
            x0, y0, x1, y1 = annotation["bbox"]
            assert x0 - 1 <= columns.min() and columns.max() < x1 + 1
            assert y0 - 1 <= rows.min() and rows.max() < y1 + 1


def test_hidden_keypoints_have_visibility_1():
    """A keypoint that a later shape covers has visibility 1."""
    hidden = 0
    for record in load_shapes(ShapesParameters("train", num=100, size=64)):
        for i, annotation in enumerate(record["annotations"]):
            for x, y, v in np.array(annotation["keypoints"]).reshape(-1, 3):
                canvas = Image.new("L", (64, 64))
                for later in record["annotations"][i + 1 :]:
                    ImageDraw.Draw(canvas).polygon(later["segmentation"][0], fill=255)
                near = np.asarray(canvas)[max(int(y) - 2, 0) : int(y) + 3, max(int(x) - 2, 0) : int(x) + 3]
                if v == 1:
                    hidden += 1
                    assert near.any()
                else:
                    assert not near.all()
    assert hidden > 3


def test_metadata():
    metadata = MetadataCatalog.get("shapes:val?num=7")
    assert metadata.thing_classes == ["circle", "square", "triangle"]
    assert metadata.stuff_classes == ["things", "grass", "sand", "water"]
    assert metadata.evaluator_type == "coco" and metadata.ignore_label == 255
    assert MetadataCatalog.get("shapes:val?num=7&task=panoptic").evaluator_type == "coco_panoptic_seg"
    assert MetadataCatalog.get("shapes:val?task=stuff").evaluator_type == "sem_seg"
    names = metadata.keypoint_names
    assert len(names) == 5 and {n for pair in metadata.keypoint_flip_map for n in pair} <= set(names)
    assert {n for rule in metadata.keypoint_connection_rules for n in rule[:2]} <= set(names)


def test_cache_is_reused_and_repaired(cache):
    parameters = ShapesParameters("train", num=2, size=32)
    dicts = load_shapes(parameters)
    written = os.stat(dicts[0]["file_name"]).st_mtime_ns
    assert load_shapes(parameters) == dicts
    assert os.stat(dicts[0]["file_name"]).st_mtime_ns == written
    expected = pixels(dicts[1])
    os.remove(dicts[1]["file_name"])
    np.testing.assert_array_equal(pixels(load_shapes(parameters)[1]), expected)
    assert len(os.listdir(cache / "shapes")) == 1, "no temporary folder stays"
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="DETLIB_CACHE"):
        load_shapes(parameters)


class TestRectangles:
    def test_rotated_boxes_match_the_polygons(self):
        angles = []
        for record in DatasetCatalog.get("shapes:val?rotated=1&num=30&size=96"):
            for annotation in record["annotations"]:
                assert annotation["bbox_mode"] is BoxMode.XYWHA_ABS and "keypoints" not in annotation
                x, y, w, h, angle = annotation["bbox"]
                assert w / h == pytest.approx({0: 2, 1: 5}[annotation["category_id"]], rel=0.05)
                c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
                corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 @ [[c, -s], [s, c]] + [x, y]
                polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
                np.testing.assert_allclose(polygon, corners, atol=0.1)
                assert polygon.min() >= 0 and polygon.max() <= 96
                angles.append(angle)
        assert min(angles) < -70 and max(angles) > 70 and -90 <= min(angles) and max(angles) < 90

    def test_metadata(self):
        metadata = MetadataCatalog.get("shapes:train?rotated=1")
        assert metadata.thing_classes == ["brick", "plank"] and metadata.get("keypoint_names") is None
        with pytest.raises(ValueError, match="rotated=2 is out of range: 0 to 1"):
            MetadataCatalog.get("shapes:train?rotated=2")

    def test_images_of_a_seed_do_not_change(self):
        digest = hashlib.sha256()
        for record in load_shapes(ShapesParameters("train", num=6, size=64, seed=1, rotated=1)):
            digest.update(pixels(record).tobytes())
            digest.update(str([a["bbox"] for a in record["annotations"]]).encode())
        assert digest.hexdigest() == "0693d8db0514de5698ebe275e81a5b3a8e478935c2f56f8146ecf9b12fd10132"
