"""Matches, confusions, F1 and image scores, compared with slow loops over the images."""

import json

import numpy as np
import pytest

from detlib.evaluation.coco_metrics import rotated_iou
from detlib.report.detections import load_detections
from detlib.report.images import rank_images
from detlib.report.matching import confusion_matrix, f1_curve, image_scores, match_classes
from tests.report.run_folder import ground_truth_and_results, make_run


def load(folder, ground_truth, results):
    uri = make_run(folder, ground_truth, results, with_images=False)
    return load_detections(str(folder / "inference" / "coco_instances_results.json"), uri)


def slow_coco_iou(a, b, crowd):
    if len(a) == 5:
        return rotated_iou(np.array([a]), np.array([b]), np.array([False]))[0, 0]
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - inside)


def slow_matches(ground_truth, results):
    """Return for each result its matched object, "ignored" or None, by COCO's rule."""
    matches = {}
    for image in ground_truth["images"]:
        for category in ground_truth["categories"]:
            key = (image["id"], category["id"])
            here = [i for i, r in enumerate(results) if (r["image_id"], r["category_id"]) == key]
            objects = [a for a in ground_truth["annotations"] if (a["image_id"], a["category_id"]) == key]
            used = set()
            for i in sorted(here, key=lambda i: -results[i]["score"]):
                best, match = 0.5, None
                for a in objects:
                    if not a["iscrowd"] and a["id"] not in used:
                        iou = slow_coco_iou(results[i]["bbox"], a["bbox"], False)
                        if iou >= best:
                            best, match = iou, a["id"]
                crowds = [a for a in objects if a["iscrowd"]]
                if match is not None:
                    used.add(match)
                elif any(slow_coco_iou(results[i]["bbox"], a["bbox"], True) >= 0.5 for a in crowds):
                    match = "ignored"
                matches[i] = match
    return matches


def slow_confusions(ground_truth, results, threshold):
    ids = sorted(category["id"] for category in ground_truth["categories"])
    matrix = np.zeros((len(ids) + 1, len(ids) + 1), dtype=int)
    matches = slow_matches(ground_truth, results)
    matches = {i: m for i, m in matches.items() if results[i]["score"] >= threshold and m != "ignored"}
    objects = {a["id"]: a for a in ground_truth["annotations"] if not a["iscrowd"]}
    for i, match in list(matches.items()):
        if match is not None:
            k = ids.index(results[i]["category_id"])
            matrix[k, k] += 1
            del objects[match], matches[i]
    pairs = [
        (slow_coco_iou(results[i]["bbox"], a["bbox"], False), -i, a["id"])
        for i in matches
        for a in objects.values()
        if a["image_id"] == results[i]["image_id"] and a["category_id"] != results[i]["category_id"]
    ]
    for iou, minus, number in sorted(pairs, reverse=True):
        if iou >= 0.5 and -minus in matches and number in objects:
            matrix[ids.index(objects[number]["category_id"]), ids.index(results[-minus]["category_id"])] += 1
            del objects[number], matches[-minus]
    for a in objects.values():
        matrix[ids.index(a["category_id"]), -1] += 1
    for i in matches:
        matrix[-1, ids.index(results[i]["category_id"])] += 1
    return matrix


@pytest.mark.parametrize(("seed", "rotated"), [(0, False), (1, False), (2, False), (3, True)])
def test_matches_confusions_and_f1_agree_with_loops(tmp_path, seed, rotated):
    ground_truth, results = ground_truth_and_results(num_images=25, num_classes=4, seed=seed, rotated=rotated)
    found = load(tmp_path / "run", ground_truth, results)
    matches = match_classes(found)
    expected = slow_matches(ground_truth, results)
    for i, match in expected.items():
        number = found.ground_truth.coco["annotations"][matches.dt_match[i]]["id"]
        assert (number if matches.dt_match[i] >= 0 else None) == (match if match != "ignored" else None), i
        assert matches.dt_ignored[i] == (match == "ignored")
    if not rotated:
        assert "ignored" in expected.values()

    for threshold in (0.0, 0.3, 0.62, 1.1):
        matrix = confusion_matrix(found, matches, threshold)
        np.testing.assert_array_equal(matrix, slow_confusions(ground_truth, results, threshold))
    assert np.trace(confusion_matrix(found, matches, 0.3)) > 10
    off_diagonal = confusion_matrix(found, matches, 0.3)[:-1, :-1] * (1 - np.eye(4, dtype=int))
    assert off_diagonal.sum() > 2

    curve = f1_curve(found, matches)
    counted = {i: m for i, m in expected.items() if m != "ignored"}
    num_objects = sum(not a["iscrowd"] for a in ground_truth["annotations"])
    slow_f1 = []
    for threshold in curve.thresholds:
        kept = [m for i, m in counted.items() if results[i]["score"] >= threshold]
        slow_f1.append(2 * sum(m is not None for m in kept) / (len(kept) + num_objects))
    np.testing.assert_allclose(curve.rates()[2], slow_f1, atol=1e-12)
    assert curve.threshold == curve.thresholds[int(np.argmax(slow_f1))]

    # The table and the matrix have the same counts of correct detections, detections and objects per class.
    matrix = confusion_matrix(found, matches, curve.threshold)
    np.testing.assert_array_equal(matrix.diagonal()[:-1], curve.true_positives[curve.best])
    np.testing.assert_array_equal(matrix.sum(axis=0)[:-1], curve.num_detections[curve.best])
    np.testing.assert_array_equal(matrix.sum(axis=1)[:-1], curve.num_objects)


def test_image_scores_and_ranks(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(1, 7)]
    ground_truth = {"images": images, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    box = [10, 10, 40, 40]
    half = [10, 10, 40, 24]  # an IoU of 0.6
    objects = [(1, 1, box), (2, 1, box), (2, 1, [55, 55, 40, 40]), (3, 1, box), (4, 1, box), (4, 2, box)]
    ground_truth["annotations"] = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": 1600, "iscrowd": 0}
        for n, (i, c, b) in enumerate(objects, start=1)
    ]
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in [
            (1, 1, half, 0.9),
            (2, 1, box, 0.9),
            (2, 1, [55, 55, 40, 40], 0.8),
            (2, 2, box, 0.1),  # below the threshold
            (3, 2, box, 0.9),
            (5, 1, box, 0.9),  # no object there
        ]
    ]
    found = load(tmp_path / "run", ground_truth, results)
    scores = image_scores(found, match_classes(found), 0.5)
    np.testing.assert_allclose(scores["score"], [0.6, 1.0, 0.0, 0.0, 0.0, np.nan])
    assert scores["objects"].tolist() == [1, 2, 1, 2, 0, 0]
    assert scores["detections"].tolist() == [1, 2, 1, 0, 1, 0]
    assert scores["correct"].tolist() == [1, 2, 0, 0, 0, 0]
    assert rank_images(scores, 2) == ([1, 0], [2, 3])
    # Even with few images, no image is both best and worst; one without objects and detections is neither.
    assert rank_images(scores, 6) == ([1, 0, 3], [2, 4])


def test_threshold_is_half_if_no_detection_is_correct(tmp_path):
    ground_truth, results = ground_truth_and_results()
    results = [{**r, "bbox": [0, 0, 1, 1]} for r in results]
    found = load(tmp_path / "run", ground_truth, results)
    assert f1_curve(found, match_classes(found)).threshold == 0.5


def test_lvis_counts_only_exhaustively_annotated_classes(tmp_path):
    images = [
        {"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": [1]},
        {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": []},
    ]
    images = [{"file_name": "a.png", "width": 100, "height": 100, **image} for image in images]
    categories = [{"id": k, "name": f"k{k}", "frequency": "f"} for k in (1, 2, 3)]
    annotation = {"id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "area": 400}
    ground_truth = {
        "images": images,
        "categories": categories,
        "annotations": [{**annotation, "image_id": 1}],
    }
    ground_truth["annotations"].append({**annotation, "id": 2, "image_id": 2})
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [60, 60, 20, 20], "score": 0.9},  # not exhaustive
        {"image_id": 1, "category_id": 2, "bbox": [60, 60, 20, 20], "score": 0.9},  # known to be absent
        {"image_id": 1, "category_id": 3, "bbox": [60, 60, 20, 20], "score": 0.9},  # not annotated
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.9},
    ]
    uri = make_run(tmp_path / "run", ground_truth, with_images=False)
    path = tmp_path / "run" / "inference" / "lvis_instances_results.json"
    path.write_text(json.dumps(results))
    found = load_detections(str(path), uri)
    matrix = confusion_matrix(found, match_classes(found), 0.5)
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 0] = expected[0, 3] = expected[3, 1] = 1
    np.testing.assert_array_equal(matrix, expected)


def test_predictions_of_unknown_images_raise(tmp_path):
    ground_truth, results = ground_truth_and_results()
    with pytest.raises(ValueError, match="image_id .4321."):
        load(tmp_path / "run", ground_truth, [*results, {**results[0], "image_id": 4321}])
