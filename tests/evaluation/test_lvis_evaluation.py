"""Tests of LVISEvaluator against a slow formula from the paper, and against the lvis package if installed."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import register_lvis_instances
from detlib.engine.evaluators import default_evaluator
from detlib.evaluation import LVISEvaluator
from detlib.evaluation.lvis_evaluation import evaluate_lvis, keep_best_per_image
from detlib.structures import Boxes, Instances

SIZE = 140
NUM_CATEGORIES = 9
NAME = "lvis_evaluation_test"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def rectangle(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def make_lvis(random, num_images=14):
    """Return random annotations without objects of category 9."""
    categories = [
        {"id": c, "name": f"class{c}", "frequency": "rccffffrc"[c - 1]} for c in range(1, NUM_CATEGORIES + 1)
    ]
    images, annotations = [], []
    for i in range(num_images):
        present = random.choice(np.arange(1, 9), random.randint(0, 5), replace=False).tolist()
        rest = [c for c in range(1, NUM_CATEGORIES + 1) if c not in present]
        images.append(
            {
                "id": 5 + 2 * i,
                "file_name": f"{i}.jpg",
                "height": SIZE,
                "width": SIZE,
                "neg_category_ids": random.choice(rest, 2, replace=False).tolist(),
                "not_exhaustive_category_ids": [c for c in present if random.rand() < 0.3],
            }
        )
        for category in present:
            for _ in range(random.randint(1, 5)):
                w, h = random.uniform(4, 120, 2)
                box = [random.uniform(0, SIZE - w), random.uniform(0, SIZE - h), w, h]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": images[-1]["id"],
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3] * 0.9,
                        "segmentation": rectangle(box),
                    }
                )
    return {"images": images, "annotations": annotations, "categories": categories}


def make_results(random, lvis):
    """Return detections near the ground truth and far from it, of any category, with tied scores."""
    results = []
    for image in lvis["images"]:
        gt = [a for a in lvis["annotations"] if a["image_id"] == image["id"]]
        for _ in range(random.randint(0, 40)):
            if gt and random.rand() < 0.6:
                near = gt[random.randint(len(gt))]
                x, y, w, h = near["bbox"]
                box = [x + random.normal(0, 0.08) * w, y + random.normal(0, 0.08) * h, w, h]
                category = near["category_id"]
            else:
                w, h = random.uniform(4, 120, 2)
                box = [random.uniform(0, SIZE - w), random.uniform(0, SIZE - h), w, h]
                category = int(random.randint(1, NUM_CATEGORIES + 1))
            rle = mask_utils.merge(mask_utils.frPyObjects(rectangle(box), SIZE, SIZE))
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [float(v) for v in box],
                    "score": round(float(random.rand()), 1),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return results


# ---------------------------------------------------------------------------- slow formula


def iou_of_boxes(a, b):
    w = max(min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]), 0)
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def decoded(segmentation):
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, SIZE, SIZE))
    return mask_utils.decode(segmentation).astype(bool)


def iou_of_masks(a, b):
    return (a & b).sum() / (a | b).sum()


def slow_matches(gt, found, overlap, threshold, low, high, not_exhaustive):
    """Return (score, is a match, counts) of each detection in an image, and how many objects count."""
    counts = [low <= t["area"] <= high for t in gt]
    order = sorted(range(len(gt)), key=lambda j: not counts[j])  # objects that count are matched first
    taken, rows = set(), []
    for d in sorted(found, key=lambda d: -d["score"]):
        best, best_iou = None, threshold
        for j in order:
            if best is not None and counts[best] and not counts[j]:
                break
            if j not in taken and overlap(d, gt[j]) >= best_iou:
                best, best_iou = j, overlap(d, gt[j])
        if best is None:
            rows.append((d["score"], False, not not_exhaustive and low <= d["area"] <= high))
        else:
            taken.add(best)
            rows.append((d["score"], True, counts[best]))
    return rows, sum(counts)


def slow_ap(lvis, results, task, max_dets, threshold, category, low, high):
    """Return the mean precision at 101 recalls and the final recall; None for both without objects."""
    rows, num_objects = [], 0
    for image in sorted(lvis["images"], key=lambda image: image["id"]):
        mine = [a for a in lvis["annotations"] if a["image_id"] == image["id"]]
        found = [r for r in results if r["image_id"] == image["id"]]
        if max_dets >= 0:
            found = sorted(found, key=lambda r: -r["score"])[:max_dets]
        annotated = {a["category_id"] for a in mine} | set(image["neg_category_ids"])
        if category not in annotated:
            continue
        overlap = OVERLAPS[task]
        new_rows, n = slow_matches(
            [a for a in mine if a["category_id"] == category],
            [r for r in found if r["category_id"] == category],
            overlap,
            threshold,
            low,
            high,
            category in image["not_exhaustive_category_ids"],
        )
        rows += new_rows
        num_objects += n
    if num_objects == 0:
        return None, None
    hits, misses, points = 0, 0, []
    for _, is_hit, counts in sorted(rows, key=lambda row: -row[0]):
        if not counts:
            continue
        hits, misses = hits + is_hit, misses + (not is_hit)
        points.append((hits / num_objects, hits / (hits + misses)))
    at = [max((p for r, p in points if r >= x), default=0.0) for x in np.linspace(0, 1, 101)]
    return float(np.mean(at)), points[-1][0] if points else 0.0


def box_overlap(d, t):
    return iou_of_boxes(d["bbox"], t["bbox"])


def mask_overlap(d, t):
    return iou_of_masks(d["mask"], t["mask"])


OVERLAPS = {"bbox": box_overlap, "segm": mask_overlap}
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def slow_scores(lvis, results, task, max_dets=300):
    lvis = {**lvis, "annotations": [dict(a) for a in lvis["annotations"]]}
    results = [dict(r) for r in results]
    for a in (*lvis["annotations"], *results):
        a["mask"] = decoded(a["segmentation"])
    for r in results:
        r["area"] = r["bbox"][2] * r["bbox"][3] if task == "bbox" else r["mask"].sum()
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    table, recalls = {}, []
    for threshold in thresholds:
        for area, (low, high) in AREAS.items():
            if area and threshold not in thresholds[::3]:
                continue
            for category in lvis["categories"]:
                ap, recall = slow_ap(lvis, results, task, max_dets, threshold, category["id"], low, high)
                table[threshold, area, category["id"]] = ap
                if not area and recall is not None:
                    recalls.append(recall)
    frequency = {c["id"]: c["frequency"] for c in lvis["categories"]}

    def mean(keep):
        values = [ap for key, ap in table.items() if ap is not None and keep(*key)]
        return 100 * float(np.mean(values)) if values else math.nan

    scores = {
        "AP": mean(lambda t, a, c: not a),
        "AP50": mean(lambda t, a, c: not a and t == 0.5),
        "AP75": mean(lambda t, a, c: not a and abs(t - 0.75) < 1e-9),
    }
    for f in "rcf":
        scores["AP" + f] = mean(lambda t, a, c, f=f: not a and frequency[c] == f)
    return scores, table, 100 * float(np.mean(recalls))


# ---------------------------------------------------------------------------- tests


@pytest.mark.parametrize("max_dets", [300, 8])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores_equal_slow_formula(task, max_dets):
    random = np.random.RandomState(3)
    lvis = make_lvis(random)
    results = make_results(random, lvis)
    scores = evaluate_lvis(lvis, results, task, max_dets=max_dets)
    want, table, recall = slow_scores(lvis, results, task, max_dets)
    assert {name: scores.ap(name) for name in want} == pytest.approx(want, abs=1e-9, nan_ok=True)
    assert scores.ar() == pytest.approx(recall, abs=1e-9)
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    for (threshold, area, category), ap in table.items():
        cell = scores.precision[thresholds.index(threshold), :, category - 1, list(AREAS).index(area), 0]
        assert cell.mean() == pytest.approx(-1 if ap is None else ap, abs=1e-9)
    assert want["AP"] > 10 and (scores.precision[:, :, 8] == -1).all()


@pytest.mark.parametrize("max_dets", [300, 8, -1])
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_lvis_package(task, max_dets, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # the package requires NumPy 1
    lvis_package = pytest.importorskip("lvis")
    random = np.random.RandomState(seed)
    gt = make_lvis(random)
    results = make_results(random, gt)
    (tmp_path / "lvis.json").write_text(json.dumps(gt))
    lvis = lvis_package.LVIS(str(tmp_path / "lvis.json"))
    hidden = {"bbox"} if task == "segm" else {"segmentation"}
    theirs = [{k: v for k, v in r.items() if k not in hidden} for r in results]
    evaluation = lvis_package.LVISEval(lvis, lvis_package.LVISResults(lvis, theirs, max_dets=max_dets), task)
    evaluation.run()
    want = evaluation.get_results()
    scores = evaluate_lvis(gt, results, task, max_dets=max_dets)
    for name in METRICS:
        value = want[name] * 100 if want[name] > -1 else math.nan
        assert scores.ap(name) == pytest.approx(value, abs=1e-9, nan_ok=True), name
    recall = next(value for name, value in want.items() if name.startswith("AR@"))
    assert scores.ar() == pytest.approx(recall * 100, abs=1e-9)


def one_image(boxes, categories, **image):
    """Return the ground truth of one image, with a rare, a common and a frequent category."""
    return {
        "images": [{"id": 1, "height": 100, "width": 100, "file_name": "1.jpg", **image}],
        "categories": [{"id": i, "name": f"c{i}", "frequency": "rcf"[i - 1]} for i in (1, 2, 3)],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": c,
                "bbox": b,
                "area": b[2] * b[3],
                "segmentation": rectangle(b),
            }
            for i, (b, c) in enumerate(zip(boxes, categories), start=1)
        ],
    }


def detections(*rows):
    return [{"image_id": 1, "category_id": c, "bbox": b, "score": s} for b, c, s in rows]


BOX, FAR = [0, 0, 40, 40], [50, 50, 40, 40]


def test_federated_categories_in_small_examples():
    hit, miss = (BOX, 1, 0.5), (FAR, 1, 0.9)
    # The detection with the higher score is wrong, so precision is 1/2 at every recall.
    assert evaluate_lvis(one_image([BOX], [1]), detections(hit, miss), "bbox").ap("AP") == pytest.approx(50)
    # Not all objects of the category are annotated, so it does not count as wrong.
    lenient = one_image([BOX], [1], not_exhaustive_category_ids=[1])
    assert evaluate_lvis(lenient, detections(hit, miss), "bbox").ap("AP") == pytest.approx(100)
    # Category 2 is not annotated, or known to be absent. Without objects it has no precision.
    other = detections(hit, (FAR, 2, 0.9))
    for lvis in (one_image([BOX], [1]), one_image([BOX], [1], neg_category_ids=[2])):
        scores = evaluate_lvis(lvis, other, "bbox")
        assert scores.ap("AP") == pytest.approx(100) and math.isnan(scores.ap("APc"))
        assert scores.ap("APr") == pytest.approx(100)


def test_detections_of_a_category_count_only_where_it_is_annotated():
    lvis = one_image([BOX], [1])
    lvis["images"].append({"id": 2, "height": 100, "width": 100, "file_name": "2.jpg"})
    results = [*detections((BOX, 1, 0.5)), {"image_id": 2, "category_id": 1, "bbox": BOX, "score": 0.9}]
    assert evaluate_lvis(lvis, results, "bbox").ap("AP") == pytest.approx(100)
    lvis["images"][1].update(neg_category_ids=None, not_exhaustive_category_ids=None)
    assert evaluate_lvis(lvis, results, "bbox").ap("AP") == pytest.approx(100)
    lvis["images"][1]["neg_category_ids"] = [1]
    assert evaluate_lvis(lvis, results, "bbox").ap("AP") == pytest.approx(50)
    assert evaluate_lvis(lvis, results, "bbox", img_ids=[1]).ap("AP") == pytest.approx(100)


def test_object_without_detection_counts():
    scores = evaluate_lvis(one_image([BOX, FAR], [1, 3]), detections((BOX, 1, 0.5)), "bbox")
    assert scores.ap("AP") == pytest.approx(50)
    assert scores.ap("APr") == pytest.approx(100) and scores.ap("APf") == 0


def test_limit_of_detections_applies_over_all_categories():
    results = detections((BOX, 1, 0.2), (FAR, 2, 0.9), (FAR, 3, 0.9), (BOX, 1, 0.2))
    assert [r["category_id"] for r in keep_best_per_image(results, 3)] == [2, 3, 1]
    assert keep_best_per_image(results, -1) == results and len(keep_best_per_image(results, 4)) == 4
    lvis = one_image([BOX], [1])
    assert evaluate_lvis(lvis, results, "bbox", max_dets=2).ap("AP") == 0
    assert evaluate_lvis(lvis, results, "bbox", max_dets=3).ap("AP") == pytest.approx(100)


@pytest.fixture
def registered(tmp_path):
    random = np.random.RandomState(5)
    lvis = make_lvis(random)
    (tmp_path / "lvis.json").write_text(json.dumps(lvis))
    register_lvis_instances(NAME, {}, str(tmp_path / "lvis.json"), str(tmp_path))
    yield lvis, make_results(random, lvis)
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def predictions_of(results, with_masks=False):
    """Return the model inputs and outputs that correspond to results."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    inputs, outputs = [], []
    for image_id, found in by_image.items():
        xywh = torch.tensor([r["bbox"] for r in found], dtype=torch.float64)
        instances = Instances((SIZE, SIZE))
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float())
        instances.scores = torch.tensor([r["score"] for r in found])
        instances.pred_classes = torch.tensor([r["category_id"] - 1 for r in found])
        if with_masks:
            instances.pred_masks = torch.from_numpy(np.stack([decoded(r["segmentation"]) for r in found]))
        inputs.append({"image_id": image_id})
        outputs.append({"instances": instances})
    return inputs, outputs


def test_evaluator_equals_evaluate_lvis(registered, tmp_path):
    lvis, results = registered
    evaluator = LVISEvaluator(NAME, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(*predictions_of(results, with_masks=True))
    metrics = evaluator.evaluate()
    assert list(metrics) == ["bbox", "segm"]
    for task, values in metrics.items():
        scores = evaluate_lvis(lvis, results, task)
        assert tuple(values) == METRICS
        assert values == pytest.approx({name: scores.ap(name) for name in METRICS}, abs=0.2)
    written = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert [r["category_id"] for r in written] == [
        r["category_id"]
        for i in dict.fromkeys(r["image_id"] for r in results)
        for r in results
        if r["image_id"] == i
    ]
    only = LVISEvaluator(NAME, tasks=("bbox",), max_dets_per_image=8)
    only.process(*predictions_of(results, with_masks=True))
    metrics = only.evaluate()
    assert list(metrics) == ["bbox"]
    assert metrics["bbox"]["AP"] == pytest.approx(
        evaluate_lvis(lvis, results, "bbox", max_dets=8).ap("AP"), abs=0.2
    )


def test_perfect_proposals_have_full_recall(registered):
    lvis, _ = registered
    evaluator = LVISEvaluator(NAME)
    for image in lvis["images"]:
        boxes = [a["bbox"] for a in lvis["annotations"] if a["image_id"] == image["id"]]
        xywh = torch.tensor(boxes).reshape(-1, 4)
        proposals = Instances((SIZE, SIZE), objectness_logits=torch.zeros(len(xywh)))
        proposals.proposal_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        evaluator.process([{"image_id": image["id"]}], [{"proposals": proposals}])
    recalls = evaluator.evaluate()["box_proposals"]
    assert {name for name in recalls} == {f"AR{a}@{n}" for a in AREAS for n in (100, 1000)}
    assert recalls["AR@100"] == pytest.approx(100)


def test_no_detections_give_nan(registered):
    lvis, _ = registered
    evaluator = LVISEvaluator(NAME)
    assert evaluator.evaluate() == {}
    empty = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    evaluator.process([{"image_id": lvis["images"][0]["id"]}], [{"instances": empty}])
    values = evaluator.evaluate()["bbox"]
    assert tuple(values) == METRICS and all(math.isnan(value) for value in values.values())


def test_default_evaluator_of_an_lvis_dataset(registered, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CATEGORIES
    DatasetCatalog.get(NAME)
    assert type(default_evaluator(cfg, NAME)) is LVISEvaluator


def test_invalid_arguments_and_predictions_raise(registered, tmp_path):
    lvis, results = registered
    with pytest.raises(
        ValueError, match=r"LVISEvaluator: unknown tasks \['keypoints'\]; legal tasks are bbox, segm"
    ):
        LVISEvaluator(NAME, tasks=("keypoints",))
    evaluator = LVISEvaluator(NAME)
    evaluator.process(*predictions_of([{**results[0], "category_id": NUM_CATEGORIES + 1}]))
    with pytest.raises(
        ValueError, match=f"predicted class {NUM_CATEGORIES}, but dataset '{NAME}' has the 9 classes"
    ):
        evaluator.evaluate()
    MetadataCatalog.get(NAME).set(overwrite=True, json_file=str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"LVISEvaluator: .*none\.json"):
        LVISEvaluator(NAME)
    MetadataCatalog.get(NAME).set(overwrite=True, json_file=None)
    with pytest.raises(ValueError, match="no 'json_file' in its metadata"):
        LVISEvaluator(NAME)
