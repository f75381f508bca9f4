"""Tests of the average recall of proposals against a formula that sorts all pairs."""

import json
import pickle

import numpy as np
import pytest
import torch
import torchvision

from detlib.evaluation import COCOEvaluator
from detlib.evaluation.coco_evaluation import evaluate_box_proposals
from detlib.evaluation.coco_json import complete_ground_truth
from detlib.structures import Boxes, Instances

SIZE = 200


def slow_average_recall(boxes_per_image, coco, limit, low, high):
    found, num_boxes = [], 0
    for image_id, boxes in boxes_per_image.items():
        gt = [a for a in coco["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
        gt_boxes = [a["bbox"] for a in gt if low <= a["area"] <= high]
        num_boxes += len(gt_boxes)
        if not gt_boxes:
            continue
        gt_boxes = torchvision.ops.box_convert(torch.tensor(gt_boxes), "xywh", "xyxy")
        iou = torchvision.ops.box_iou(boxes[:limit], gt_boxes)
        pairs = sorted(((-float(v), i, j) for (i, j), v in np.ndenumerate(iou.numpy())))
        rows, columns = set(), set()
        for v, i, j in pairs:
            if i not in rows and j not in columns:
                rows.add(i)
                columns.add(j)
                found.append(-v)
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    return (
        100 * np.mean([sum(v >= t for v in found) / num_boxes for t in thresholds]) if num_boxes else np.nan
    )


@pytest.fixture
def case(tmp_path):
    random = np.random.RandomState(0)
    coco = {"images": [], "categories": [{"id": 5, "name": "x"}], "annotations": []}
    outputs, ordered = {}, {}
    for image_id in range(1, 9):
        coco["images"].append({"id": image_id, "file_name": "x.png", "height": SIZE, "width": SIZE})
        gt_boxes = []
        for _ in range(random.randint(0, 8)):
            x, y = random.uniform(0, 120, 2)
            w, h = random.uniform(5, 80, 2) if random.rand() < 0.7 else random.uniform(5, 25, 2)
            gt_boxes.append([x, y, x + w, y + h])
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 5,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(random.rand() < 0.1),
                }
            )
        noisy = np.array(gt_boxes).reshape(-1, 4).repeat(30, axis=0)
        noisy = noisy + random.normal(0, 6, noisy.shape)
        spurious = random.uniform(0, 100, (40, 4)) + [0, 0, 100, 100]
        boxes = torch.tensor(np.concatenate([noisy, spurious]), dtype=torch.float32).clamp(0, SIZE)
        scores = torch.tensor(random.permutation(len(boxes)), dtype=torch.float32)
        outputs[image_id] = Instances((SIZE, SIZE), proposal_boxes=Boxes(boxes), objectness_logits=scores)
        ordered[image_id] = boxes[scores.argsort(descending=True)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    return coco, f"coco:{path}@{tmp_path}", outputs, ordered


def test_average_recall_equals_slow_formula_and_proposals_are_saved(case, tmp_path):
    coco, name, outputs, ordered = case
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for image_id, proposals in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"proposals": proposals}])
    results = evaluator.evaluate()
    assert list(results) == ["box_proposals"]
    areas = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    expected = {
        f"AR{suffix}@{limit}": slow_average_recall(ordered, coco, limit, *bounds)
        for limit in (100, 1000)
        for suffix, bounds in areas.items()
    }
    assert list(results["box_proposals"]) == list(expected)
    np.testing.assert_allclose(list(results["box_proposals"].values()), list(expected.values()), atol=1e-6)
    assert results["box_proposals"]["AR@100"] < results["box_proposals"]["AR@1000"]
    assert np.isnan(expected["ARl@100"]), "there are no large boxes"

    with open(tmp_path / "out" / "box_proposals.pkl", "rb") as file:
        saved = pickle.load(file)
    assert set(saved) == {"ids", "boxes", "objectness_logits", "bbox_mode"} and saved["bbox_mode"] == 0
    assert saved["ids"] == list(outputs)
    np.testing.assert_array_equal(saved["boxes"][2], outputs[3].proposal_boxes.tensor.numpy())
    np.testing.assert_array_equal(saved["objectness_logits"][2], outputs[3].objectness_logits.numpy())


def test_proposal_matches_only_one_box():
    annotation = {"image_id": 1, "category_id": 5, "bbox": [0, 0, 50, 50]}
    image = {"id": 1, "file_name": "x.png", "height": SIZE, "width": SIZE}
    coco = {"images": [image], "categories": [{"id": 5, "name": "x"}], "annotations": [annotation] * 2}
    boxes = Boxes(torch.tensor([[0.0, 0, 50, 50], [100, 100, 150, 150]]))
    proposals = Instances((SIZE, SIZE), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
    recalls = evaluate_box_proposals(
        [{"image_id": 1, "proposals": proposals}], complete_ground_truth(coco), [5]
    )
    assert recalls["AR@5"] == 50
