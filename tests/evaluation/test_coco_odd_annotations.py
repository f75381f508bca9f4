"""Tests of COCOEvaluator on irregular annotation files, against pycocotools on corrected ones."""

import copy
import json
import math

import numpy as np
import pytest

from detlib.evaluation import COCOEvaluator
from detlib.evaluation.coco_json import complete_ground_truth
from tests.evaluation.coco_cases import SIZE, feed, make_coco, make_predictions, reference


@pytest.fixture
def coco():
    return make_coco(np.random.RandomState(3))


def evaluate(tmp_path, coco, outputs, tasks=None):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(coco))
    return feed(COCOEvaluator(f"coco:{path}@{tmp_path}", tasks), outputs).evaluate()


def expect(results, coco, outputs, tasks=("bbox", "segm", "keypoints")):
    for task in tasks:
        stats = reference(coco, outputs, task)[0]
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        names = names if task != "keypoints" else ("AP", "AP50", "AP75", "APm", "APl")
        np.testing.assert_allclose([results[task][n] for n in names], stats[: len(names)], atol=1e-9)


@pytest.mark.parametrize("shift", [-1000, 2**53, 2**60])
def test_negative_and_huge_image_ids_are_renumbered(tmp_path, coco, shift):
    outputs = make_predictions(np.random.RandomState(5), coco)
    odd = copy.deepcopy(coco)
    for image in odd["images"]:
        image["id"] += shift
    for annotation in odd["annotations"]:
        annotation["image_id"] += shift
    results = evaluate(tmp_path, odd, {i + shift: instances for i, instances in outputs.items()})
    expect(results, coco, outputs)


def test_float_sizes_and_invalid_areas_are_corrected(tmp_path, coco):
    outputs = make_predictions(np.random.RandomState(5), coco)
    odd = copy.deepcopy(coco)
    for image in odd["images"]:
        image.update(width=float(SIZE), height=float(SIZE))
    for annotation, area in zip(odd["annotations"], (None, "12", -5, math.nan, None, True)):
        annotation["area"] = area if area is not True else -1
    expect(evaluate(tmp_path, odd, outputs), coco, outputs)


def test_annotations_without_image_and_short_polygons_are_dropped(tmp_path, coco):
    outputs = make_predictions(np.random.RandomState(5), coco)
    odd = copy.deepcopy(coco)
    for image_id in (None, [10], 999):
        odd["annotations"].append({**coco["annotations"][0], "id": 1000, "image_id": image_id})
    del odd["annotations"][-1]["image_id"]
    polygons = next(a["segmentation"] for a in odd["annotations"] if not a["iscrowd"])
    polygons += [[], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    expect(evaluate(tmp_path, odd, outputs), coco, outputs)


@pytest.mark.parametrize("mask", [None, {}, [], [[]], [[1.0, 2.0, 3.0, 4.0]], "missing"])
def test_objects_without_masks_count_as_missed(tmp_path, coco, mask, log):
    outputs = make_predictions(np.random.RandomState(5), coco)
    corrected, odd = copy.deepcopy(coco), copy.deepcopy(coco)
    chosen = [i for i, a in enumerate(coco["annotations"]) if not a["iscrowd"]][:4]
    for i in chosen:
        corrected["annotations"][i]["segmentation"] = {"size": [SIZE, SIZE], "counts": [SIZE * SIZE]}
        odd["annotations"][i]["segmentation"] = mask
        if mask == "missing":
            del odd["annotations"][i]["segmentation"]
    results = evaluate(tmp_path, odd, outputs)
    expect(results, corrected, outputs, ("segm",))
    expect(results, coco, outputs, ("bbox", "keypoints"))
    assert f"4 of {len(coco['annotations'])} annotations" in log.text
    assert "have no mask, count as missed objects" in log.text


def test_tasks_without_annotations_are_skipped(tmp_path, coco, log):
    outputs = make_predictions(np.random.RandomState(5), coco)
    for annotation in coco["annotations"]:
        del annotation["segmentation"], annotation["keypoints"], annotation["num_keypoints"]
    results = evaluate(tmp_path, coco, outputs)
    assert set(results) == {"bbox"}
    expect(results, coco, outputs, ("bbox",))
    assert "have no mask, so the task is not evaluated" in log.text
    assert "have no keypoints, so the task is not evaluated" in log.text


@pytest.mark.parametrize("keypoints", [None, [], "missing"])
def test_objects_without_keypoints_have_no_labeled_keypoints(tmp_path, coco, keypoints):
    outputs = make_predictions(np.random.RandomState(5), coco)
    corrected, odd = copy.deepcopy(coco), copy.deepcopy(coco)
    for i in range(4):
        corrected["annotations"][i].update(keypoints=[0] * 51, num_keypoints=0)
        odd["annotations"][i]["keypoints"] = keypoints
        del odd["annotations"][i]["num_keypoints"]
        if keypoints == "missing":
            del odd["annotations"][i]["keypoints"]
    expect(evaluate(tmp_path, odd, outputs), corrected, outputs)


def test_repeated_class_names_get_a_number(tmp_path, coco):
    outputs = make_predictions(np.random.RandomState(5), coco)
    expected = reference(coco, outputs, "bbox")[1]
    for category in coco["categories"][:2]:
        category["name"] = "owl"
    results = evaluate(tmp_path, coco, outputs, ("bbox",))["bbox"]
    found = [results["AP-owl"], results["AP-owl (2)"], results["AP-class8"]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def ground_truth_with(segmentation):
    box = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": segmentation}
    image = {"id": 1, "height": 50, "width": 60}
    return complete_ground_truth({"images": [image], "categories": [{"id": 1}], "annotations": [box]})


@pytest.mark.parametrize("far", [1e9, 3e9, 1e30])
def test_polygon_far_outside_of_the_image_is_clipped(far):
    near = ground_truth_with([[0, 0, 1000, 0, 1000, 1000]]).coco["annotations"][0]
    annotation = ground_truth_with([[0, 0, far, 0, far, far]]).coco["annotations"][0]
    assert annotation["area"] == near["area"] > 1000
    assert max(annotation["segmentation"][0]) < 200 and near["segmentation"] == [[0, 0, 1000, 0, 1000, 1000]]


@pytest.mark.parametrize(
    "segmentation", [[[0, 0, 9, 0, 9, math.nan]], {"size": [50, 60], "counts": [5]}, {"size": [50, 60]}]
)
def test_mask_that_would_crash_the_metric_is_named(segmentation):
    with pytest.raises(ValueError, match="Image 1, annotation 7: "):
        ground_truth_with(segmentation)
