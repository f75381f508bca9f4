"""Tests of the Pascal VOC metric against a slow formula with 1-based pixel coordinates as in VOC files."""

import logging

import numpy as np
import pytest
import torch

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.evaluation import PascalVOCDetectionEvaluator
from detlib.evaluation.pascal_voc_evaluation import voc_average_precision
from detlib.structures import Boxes, BoxMode, Instances

NAME = "voc_evaluation_test"
CLASSES = ["owl", "wren", "crow", "never"]
SIZE = (200, 200)


@pytest.fixture
def register():
    def do(records, year):
        DatasetCatalog.register(NAME, lambda: records, overwrite=True)
        MetadataCatalog.get(NAME).set(thing_classes=CLASSES, year=year, overwrite=True)
        return PascalVOCDetectionEvaluator(NAME)

    yield do
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def make(seed=0, num_images=12):
    """Return random dataset dicts and predictions.

    Objects have integer coordinates, and some are difficult. One image is empty, and the class "never" does
    not occur. Predictions are shifted objects, duplicates and random boxes, with many equal scores.
    """
    rng = np.random.default_rng(seed)
    records, predictions = [], []
    for number in range(num_images):
        annotations, boxes, classes = [], [], []
        for _ in range(0 if number == 3 else rng.integers(1, 7)):
            x, y, w, h = rng.integers([0, 0, 8, 8], [140, 140, 60, 60])
            box = [float(x), float(y), float(x + w), float(y + h)]
            category = int(rng.integers(3))
            annotation = {"category_id": category, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
            annotations.append(annotation | ({"difficult": 1} if rng.random() < 0.25 else {}))
            for _ in range(rng.integers(0, 4)):
                boxes.append(np.array(box) + rng.normal(0, 3, 4))
                classes.append(category if rng.random() < 0.9 else int(rng.integers(4)))
        for _ in range(rng.integers(0, 4)):
            x, y = rng.uniform(0, 150, 2)
            boxes.append(np.array([x, y, x + 30, y + 20]))
            classes.append(int(rng.integers(4)))
        records.append({"image_id": f"p{number}", "file_name": f"p{number}.jpg", "annotations": annotations})
        instances = Instances(SIZE)
        instances.pred_boxes = Boxes(torch.as_tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
        instances.scores = torch.as_tensor(rng.integers(1, 9, len(boxes)) / 10, dtype=torch.float32)
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        predictions.append(instances)
    return records, predictions


def run(evaluator, records, predictions, order=None):
    evaluator.reset()
    for i in range(len(records)) if order is None else order:
        evaluator.process([{"image_id": records[i]["image_id"]}], [{"instances": predictions[i]}])
    return evaluator.evaluate()["bbox"]


def slow_pixel_iou(a, b):
    """Return the IoU of two boxes in pixel indices, including the last pixel."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(areas) - w * h)


def slow_ap(records, predictions, category, threshold, is_2007):
    detections = []
    for number, instances in enumerate(predictions):
        for i in range(len(instances)):
            if instances.pred_classes[i] == category:
                box = instances.pred_boxes.tensor[i].double().tolist()
                pixels = [box[0] + 1, box[1] + 1, box[2], box[3]]
                detections.append((-instances.scores[i].item(), number, i, pixels))
    detections.sort(key=lambda d: d[:3])
    objects = [[a for a in r["annotations"] if a["category_id"] == category] for r in records]
    to_find = sum(not a.get("difficult") for group in objects for a in group)
    taken, correct, wrong, points = set(), 0, 0, []
    for _, number, _, pixels in detections:
        best, which = 0.0, None
        for i, annotation in enumerate(objects[number]):
            x0, y0, x1, y1 = annotation["bbox"]
            overlap = slow_pixel_iou(pixels, [x0 + 1, y0 + 1, x1, y1])
            if overlap > best:
                best, which = overlap, i
        if which is not None and best > threshold:
            if objects[number][which].get("difficult"):
                continue
            if (number, which) in taken:
                wrong += 1
            else:
                taken.add((number, which))
                correct += 1
        else:
            wrong += 1
        points.append((correct / to_find, correct / (correct + wrong)))
    if is_2007:
        return np.mean([max([p for r, p in points if r >= k * 0.1], default=0.0) for k in range(11)])
    area, last = 0.0, 0.0
    for recall, _ in points:
        if recall > last:
            area += (recall - last) * max(p for r, p in points if r >= recall)
            last = recall
    return area


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", [0, 1])
def test_ap_equals_slow_formula(register, year, seed):
    records, predictions = make(seed)
    found = run(register(records, year), records, predictions)
    table = np.array(
        [
            [100 * slow_ap(records, predictions, c, t / 100, year == 2007) for t in range(50, 100, 5)]
            for c in range(3)
        ]
    )
    assert 10 < table.mean() < 90
    assert found["AP"] == pytest.approx(table.mean(), abs=1e-10)
    assert found["AP50"] == pytest.approx(table[:, 0].mean(), abs=1e-10)
    assert found["AP75"] == pytest.approx(table[:, 5].mean(), abs=1e-10)
    for c in range(3):
        assert found[f"AP-{CLASSES[c]}"] == pytest.approx(table[c].mean(), abs=1e-10)
    assert np.isnan(found["AP-never"])


def test_difficult_flags_change_the_result(register):
    records, predictions = make()
    with_them = run(register(records, 2012), records, predictions)
    for record in records:
        for annotation in record["annotations"]:
            annotation.pop("difficult", None)
    assert run(register(records, 2012), records, predictions)["AP"] != pytest.approx(with_them["AP"], abs=0.1)


def test_order_of_images_does_not_matter(register):
    """Many scores are equal, so a ranking by order of processing would change the result."""
    records, predictions = make(num_images=20)
    evaluator = register(records, 2012)
    first = run(evaluator, records, predictions)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(records))
        np.testing.assert_equal(run(evaluator, records, predictions, order), first)


def test_perfect_and_missing_detections(register, caplog):
    records, _ = make()
    predictions = []
    for record in records:
        instances = Instances(SIZE)
        boxes = [a["bbox"] for a in record["annotations"]]
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.scores = torch.linspace(0.5, 0.9, len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]]).long()
        predictions.append(instances)
    for year in (2007, 2012):
        with caplog.at_level(logging.INFO, "detlib.evaluation.pascal_voc_evaluation"):
            assert run(register(records, year), records, predictions)["AP"] == pytest.approx(100.0)
        assert f"Pascal VOC {year} metric" in caplog.text and "| wren" in caplog.text
        nothing = [instances[torch.zeros(len(instances), dtype=torch.bool)] for instances in predictions]
        assert run(register(records, year), records, nothing)["AP"] == 0.0


def test_eleven_point_average_of_a_small_curve():
    """Precision is 1 at the recalls 0 to 0.3, 2/3 at 0.4 to 0.6, and 0 above."""
    recall, precision = np.array([1, 1, 2]) / 3, np.array([1, 1 / 2, 2 / 3])
    assert voc_average_precision(recall, precision, True) == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert voc_average_precision(recall, precision) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)


def test_unknown_class_and_unknown_image_raise(register):
    records, predictions = make()
    evaluator = register(records, 2012)
    predictions[0].pred_classes += 9
    with pytest.raises(ValueError, match="predicted class .* has 4 classes"):
        evaluator.process([{"image_id": "p0"}], [{"instances": predictions[0]}])
    evaluator.process([{"image_id": "other"}], [{"instances": predictions[1]}])
    with pytest.raises(ValueError, match="'other', which is not in dataset"):
        evaluator.evaluate()
