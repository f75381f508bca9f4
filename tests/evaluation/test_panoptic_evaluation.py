"""Tests of panoptic quality against a slow computation with sets of pixels, for both ground truth formats."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import register_coco_panoptic
from detlib.evaluation import COCOPanopticEvaluator
from detlib.evaluation.panoptic_quality import PanopticStats, Segments
from detlib.structures.panoptic import id_to_rgb, rgb_to_id
from detlib.utils import comm

NAME = "panoptic_evaluation_test"
# Contiguous ids of things 0, 1, 2 and of stuff 1, 2.
THINGS, STUFF = {3: 0, 5: 1, 6: 2}, {40: 1, 41: 2}
HEIGHT, WIDTH = 48, 64


def random_panoptic_image(random) -> tuple[np.ndarray, dict[int, tuple[int, bool]]]:
    """Return segment ids of stuff, rectangles and an unlabeled strip, and (category, crowd) by id."""
    ids = np.full((HEIGHT, WIDTH), 70_000, np.int64)
    ids[:, random.randint(20, 40) :] = 300
    info = {70_000: (40, False), 300: (41, False)}
    for k in range(6):
        y, x = random.randint(0, HEIGHT - 12), random.randint(0, WIDTH - 12)
        h, w = random.randint(6, 24, 2)
        ids[y : y + h, x : x + w] = 1000 + k
        info[1000 + k] = (int(random.choice([3, 5])), bool(random.rand() < 0.3))
    ids[:, :4] = 0
    return ids, {i: info[i] for i in np.unique(ids).tolist() if i}


def guess(random, ids, info) -> tuple[np.ndarray, list[dict]]:
    """Return shifted segments with ids from 1, some of them missing, misclassified or spurious."""
    moved = np.roll(ids, (random.randint(0, 3), random.randint(0, 3)), axis=(0, 1))
    out, segments = np.zeros_like(ids), []
    for i in info:
        if random.rand() < 0.15 or not (moved == i).any():
            continue
        category = info[i][0] if random.rand() < 0.8 else 3
        isthing = category in THINGS
        segments.append({"id": len(segments) + 1, "isthing": isthing})
        segments[-1]["category_id"] = (THINGS if isthing else STUFF)[category]
        out[moved == i] = len(segments)
    out[30:40, :20] = len(segments) + 1
    segments.append({"id": len(segments) + 1, "isthing": True, "category_id": 0, "score": 0.5})
    present = set(np.unique(out).tolist())
    return out.astype(np.int32), [x for x in segments if x["id"] in present]


def dataset_id(segment) -> int:
    ids = THINGS if segment["isthing"] else STUFF
    return next(k for k, v in ids.items() if v == segment["category_id"])


def slow_quality(images) -> dict[int, tuple[float, float, float]]:
    """Return PQ, SQ and RQ of each category that occurs, from sets of pixels."""
    sums = {}
    for (ids, info), (pred_ids, segments) in images:

        def pixels(array, i):
            return set(map(tuple, np.argwhere(array == i).tolist()))

        void = pixels(ids, 0)
        gt = {i: (*info[i], pixels(ids, i)) for i in info}
        pred = {x["id"]: (dataset_id(x), pixels(pred_ids, x["id"])) for x in segments}
        found, used = set(), set()
        for i, (category, crowd, mine) in gt.items():
            for j, (other, theirs) in pred.items():
                iou = len(mine & theirs) / len(mine | (theirs - void))
                if category == other and not crowd and iou > 0.5:
                    found.add(i)
                    used.add(j)
                    sums.setdefault(category, [0.0, 0, 0, 0])
                    sums[category][0] += iou
                    sums[category][1] += 1
        for i, (category, crowd, _) in gt.items():
            if i not in found and not crowd:
                sums.setdefault(category, [0.0, 0, 0, 0])[2] += 1
        for j, (category, theirs) in pred.items():
            excused = void.union(*(mine for other, crowd, mine in gt.values() if crowd and other == category))
            if j not in used and len(theirs & excused) <= len(theirs) / 2:
                sums.setdefault(category, [0.0, 0, 0, 0])[3] += 1
    return {
        k: (iou / (tp + fn / 2 + fp / 2), iou / tp if tp else 0.0, tp / (tp + fn / 2 + fp / 2))
        for k, (iou, tp, fn, fp) in sums.items()
    }


METADATA = {
    "thing_classes": ["a", "b", "c"],
    "stuff_classes": ["things", "grass", "sky"],
    "thing_dataset_id_to_contiguous_id": THINGS,
    "stuff_dataset_id_to_contiguous_id": STUFF,
}


@pytest.fixture
def images():
    random = np.random.RandomState(1)
    ground_truth = [random_panoptic_image(random) for _ in range(8)]
    return [(gt, guess(random, *gt)) for gt in ground_truth]


@pytest.fixture
def data(tmp_path, images):
    """The images as a registered dataset in COCO's panoptic format."""
    root = tmp_path / "panoptic"
    root.mkdir()
    annotations, records = [], []
    for i, ((ids, info), _) in enumerate(images):
        Image.fromarray(id_to_rgb(ids)).save(root / f"{i:03d}.png")
        segments = [{"id": k, "category_id": c, "iscrowd": int(crowd)} for k, (c, crowd) in info.items()]
        annotations.append({"image_id": 7 * i, "file_name": f"{i:03d}.png", "segments_info": segments})
        records.append({"id": 7 * i, "file_name": f"{i:03d}.jpg", "height": HEIGHT, "width": WIDTH})
    names = dict(zip([*THINGS, *STUFF], "abcde"))
    categories = [{"id": k, "name": names[k], "isthing": int(k in THINGS)} for k in names]
    coco = {"info": {}, "images": records, "annotations": annotations, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(coco))
    register_coco_panoptic(NAME, METADATA, str(tmp_path / "img"), str(root), str(tmp_path / "panoptic.json"))
    yield tmp_path
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)


def process(evaluator, images):
    evaluator.reset()
    for i, (_, (ids, segments)) in enumerate(images):
        image = {"image_id": 7 * i, "file_name": f"img/{i:03d}.jpg"}
        evaluator.process([image], [{"panoptic_seg": (torch.from_numpy(ids), segments)}])


def check(results, images):
    quality = slow_quality(images)
    assert set(quality) == {3, 5, 40, 41}
    for suffix, categories in (
        ("", quality),
        ("_th", quality.keys() & THINGS),
        ("_st", quality.keys() & STUFF),
    ):
        for k, name in enumerate(("PQ", "SQ", "RQ")):
            want = 100 * np.mean([quality[category][k] for category in categories])
            assert results[name + suffix] == pytest.approx(want), name + suffix
    assert 10 < results["PQ"] < 90 and len(results) == 9


def test_quality_equals_slow_computation(data, images):
    evaluator = COCOPanopticEvaluator(NAME)
    process(evaluator, images)
    results = evaluator.evaluate()
    check(results["panoptic_seg"], images)
    process(evaluator, images)
    assert evaluator.evaluate() == results


def test_counts_of_all_processes_are_added(data, images, monkeypatch):
    full, first, second = (COCOPanopticEvaluator(NAME) for _ in range(3))
    process(full, images)
    process(first, images[:3])
    process(second, images)
    second.reset()
    for i in range(3, len(images)):
        ids, segments = images[i][1]
        image = {"image_id": 7 * i, "file_name": f"{i:03d}.jpg"}
        second.process([image], [{"panoptic_seg": (torch.from_numpy(ids), segments)}])
    want = full.evaluate()["panoptic_seg"]
    other = (second._stats, second._predictions)
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, other])
    assert first.evaluate()["panoptic_seg"] == pytest.approx(want)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert first.evaluate() is None


def test_ground_truth_from_dataset_dicts(data, images):
    """Results are the same without `panoptic_json` and without category id mappings."""
    records = DatasetCatalog.get(NAME)
    name = NAME + "_dicts"
    DatasetCatalog.register(name, lambda: records)
    classes = {key: METADATA[key] for key in ("thing_classes", "stuff_classes")}
    MetadataCatalog.get(name).set(**classes)
    try:
        evaluator = COCOPanopticEvaluator(name, str(data / "out"))
        process(evaluator, images)
        check(evaluator.evaluate()["panoptic_seg"], images)
        written = json.loads((data / "out" / "predictions.json").read_text())
        assert [c["id"] for c in written["categories"]] == [1, 2, 3, 4, 5, 6]
        assert [c["isthing"] for c in written["categories"]] == [1, 1, 1, 0, 0, 0]
        del records[0]["segments_info"]
        with pytest.raises(ValueError, match="no panoptic_json, and its dicts lack"):
            process(COCOPanopticEvaluator(name), images)
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_written_files_have_the_predicted_segments(data, images):
    evaluator = COCOPanopticEvaluator(NAME, str(data / "out"))
    process(evaluator, images)
    evaluator.evaluate()
    written = json.loads((data / "out" / "predictions.json").read_text())
    gt = json.loads((data / "panoptic.json").read_text())
    assert written["images"] == gt["images"] and written["categories"] == gt["categories"]
    assert len(written["annotations"]) == len(images)
    for annotation, (_, (ids, segments)) in zip(written["annotations"], images):
        png = np.asarray(Image.open(data / "out" / "predictions" / annotation["file_name"]))
        np.testing.assert_array_equal(rgb_to_id(png), ids)
        want = [{"id": x["id"], "category_id": dataset_id(x)} for x in segments]
        assert annotation["segments_info"] == want


def test_segment_ids_encode_the_category(data, images):
    """Predictions without a list of segments have the ids category * label_divisor + number, or -1."""
    evaluator = COCOPanopticEvaluator(NAME)
    MetadataCatalog.get(NAME).set(overwrite=True, stuff_dataset_id_to_contiguous_id={40: 10, 41: 11})
    evaluator = COCOPanopticEvaluator(NAME)
    for i, (_, (ids, segments)) in enumerate(images):
        out = np.full(ids.shape, -1, np.int64)
        for x in segments:
            category = x["category_id"] + (0 if x["isthing"] else 9)
            out[ids == x["id"]] = 1000 * category + x["id"]
        image = {"image_id": 7 * i, "file_name": f"{i:03d}.jpg"}
        evaluator.process([image], [{"panoptic_seg": (torch.from_numpy(out), None)}])
    check(evaluator.evaluate()["panoptic_seg"], images)


def test_images_without_prediction_count_as_missed(data, images, log):
    evaluator = COCOPanopticEvaluator(NAME)
    process(evaluator, images[:5])
    results = evaluator.evaluate()["panoptic_seg"]
    assert "3 of 8 images" in log.text
    nothing = np.zeros((HEIGHT, WIDTH), np.int32), []
    check(results, images[:5] + [(gt, nothing) for gt, _ in images[5:]])
    evaluator.reset()
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 0


def test_perfect_predictions_and_absent_categories(data, images):
    evaluator = COCOPanopticEvaluator(NAME)
    perfect = []
    for (ids, info), _ in images:
        segments = [
            {"id": i, "isthing": c in THINGS, "category_id": (THINGS | STUFF)[c]}
            for i, (c, crowd) in info.items()
        ]
        perfect.append(((ids, info), (ids, segments)))
    process(evaluator, perfect)
    assert set(evaluator.evaluate()["panoptic_seg"].values()) == {100.0}
    pq, sq, rq = evaluator._stats.quality()
    assert math.isnan(pq[2]) and math.isnan(sq[2]) and math.isnan(rq[2])


def test_iou_of_one_half_is_not_a_match():
    gt = np.zeros((2, 6), np.int64)
    gt[:, :3] = 1
    pred = np.where(np.arange(6) < 6, 4, 0) * np.ones((2, 1), np.int64)
    gt[:, 3:] = 2
    stats = PanopticStats(2)
    stats.add_image(Segments(gt, [1, 2], [0, 1]), Segments(pred, [4], [0]))
    assert stats.matched.tolist() == [0, 0] and stats.missed.tolist() == [1, 1]
    assert stats.wrong.tolist() == [1, 0]
    # If the other half is unlabeled, the union is smaller and they match.
    gt[:, 3:] = 0
    stats = PanopticStats(2)
    stats.add_image(Segments(gt, [1], [0]), Segments(pred, [4], [0]))
    assert stats.matched.tolist() == [1, 0] and stats.iou.tolist() == [1.0, 0.0]


def test_prediction_half_on_unlabeled_pixels_is_wrong():
    gt = np.zeros((1, 4), np.int64)
    gt[0, 2:] = 1
    for columns, wrong in ((slice(0, 4), 1), (slice(0, 3), 0)):
        pred = np.zeros((1, 4), np.int64)
        pred[0, columns] = 1
        stats = PanopticStats(2)
        stats.add_image(Segments(gt, [1], [0]), Segments(pred, [1], [1]))
        assert stats.wrong.tolist() == [0, wrong] and stats.missed.tolist() == [1, 0]


def test_ids_as_rgb_round_trip():
    ids = np.array([[0, 255, 256], [65_536, 70_000, (1 << 24) - 1]])
    rgb = id_to_rgb(ids)
    assert rgb.dtype == np.uint8 and rgb[1, 0].tolist() == [0, 0, 1] and rgb[0, 2].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(rgb_to_id(rgb), ids)
    with pytest.raises(ValueError, match=r"2\^24"):
        id_to_rgb(np.array([1 << 24]))


GOOD = np.ones((HEIGHT, WIDTH), np.int32)
SEGMENT = {"id": 1, "category_id": 0, "isthing": True}


@pytest.mark.parametrize(
    "ids, segments, message",
    [
        (GOOD, [], r"segment ids \[1\], which segments_info does not list"),
        (
            GOOD[:9],
            [SEGMENT],
            r"'000.jpg' has the size \(9, 64\), the ground truth .*000.png' has \(48, 64\)",
        ),
        (GOOD, [SEGMENT, SEGMENT], "two segments have the same id"),
        (-GOOD, [SEGMENT], "pixels from -1"),
        (
            GOOD,
            [{**SEGMENT, "category_id": 7}],
            "category_id 7; the dataset has 3 thing classes .0 to 2",
        ),
        (GOOD, [{**SEGMENT, "isthing": False}], "category_id 0; .*2 stuff classes"),
        (GOOD, [{"id": 1, "category_id": 2}], "category 2, which the ground truth does not list"),
    ],
)
def test_invalid_predictions_raise(data, ids, segments, message):
    image = {"image_id": 0, "file_name": "000.jpg"}
    with pytest.raises(ValueError, match=message):
        COCOPanopticEvaluator(NAME).process(
            [image], [{"panoptic_seg": (torch.from_numpy(ids.copy()), segments)}]
        )


def test_unknown_image_missing_output_and_missing_file_raise(data):
    evaluator = COCOPanopticEvaluator(NAME)
    good = {"panoptic_seg": (torch.from_numpy(GOOD), [SEGMENT])}
    with pytest.raises(ValueError, match="no image with id 5"):
        evaluator.process([{"image_id": 5, "file_name": "a.jpg"}], [good])
    with pytest.raises(ValueError, match="no 'panoptic_seg', only .'sem_seg'."):
        evaluator.process([{"image_id": 0, "file_name": "a.jpg"}], [{"sem_seg": 0}])
    (data / "panoptic.json").unlink()
    with pytest.raises(FileNotFoundError, match="panoptic_json of dataset 'panoptic_evaluation_test'"):
        COCOPanopticEvaluator(NAME)
