"""Tests of the COCO metric of rotated boxes against that of axis-aligned boxes."""

import json

import numpy as np
import pytest
import torch

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import register_coco_instances
from detlib.engine import DefaultTrainer
from detlib.evaluation import COCOEvaluator, RotatedCOCOEvaluator
from detlib.evaluation.coco_json import instances_to_coco_json
from detlib.evaluation.coco_metrics import rotated_iou
from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes

SIZE = 160
NAME = "rotated_coco_evaluation_test"
AXIS_ALIGNED = "axis_aligned_coco_evaluation_test"
CATEGORIES = [{"id": i, "name": f"class{i}"} for i in (3, 7, 8)]
METADATA = {
    "thing_classes": [category["name"] for category in CATEGORIES],
    "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(CATEGORIES)},
}


def random_scene(random):
    """Return ground truth and noisy detections as axis-aligned boxes (x0, y0, width, height)."""
    images = [{"id": 4 * i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(10)]
    annotations, detections = [], {image["id"]: [] for image in images}
    for image in images[1:]:
        for _ in range(random.randint(1, 7)):
            w, h = random.uniform(6, 110, 2)
            box = [random.uniform(0, SIZE - w), random.uniform(0, SIZE - h), w, h]
            category = random.randint(2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORIES[category]["id"],
                    "bbox": box,
                    "iscrowd": int(random.rand() < 0.15),
                }
            )
            for _ in range(2):
                noisy = np.maximum(np.array(box) + random.normal(0, 4, 4), [-9, -9, 1, 1])
                detections[image["id"]].append((noisy, category, round(random.rand(), 2)))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, detections


def equivalent_rotated_box(random, box):
    """Return a random rotated box that equals the axis-aligned box (x0, y0, width, height)."""
    x, y, w, h = box
    center = [x + w / 2, y + h / 2]
    return center + [[w, h, 0], [h, w, 90], [w, h, 180], [h, w, -90], [w, h, -360]][random.randint(5)]


@pytest.fixture(scope="module")
def scene():
    return random_scene(np.random.RandomState(0))


@pytest.fixture
def names(scene, tmp_path):
    """Names of the same ground truth with axis-aligned boxes, and with equivalent rotated boxes."""
    coco, _ = scene
    random = np.random.RandomState(1)
    rotated = [{**a, "bbox": equivalent_rotated_box(random, a["bbox"])} for a in coco["annotations"]]
    for name, annotations in ((AXIS_ALIGNED, coco["annotations"]), (NAME, rotated)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**coco, "annotations": annotations}))
        register_coco_instances(name, METADATA, str(path), str(tmp_path))
    yield AXIS_ALIGNED, NAME
    for name in (AXIS_ALIGNED, NAME):
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def to_instances(detections, box_type):
    boxes = np.array([d[0] for d in detections]).reshape(-1, 4)
    if box_type is RotatedBoxes:
        random = np.random.RandomState(2)
        boxes = np.array([equivalent_rotated_box(random, b) for b in boxes.tolist()])
    else:
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    return Instances(
        (SIZE, SIZE),
        pred_boxes=box_type(torch.tensor(boxes)),
        pred_classes=torch.tensor([d[1] for d in detections], dtype=torch.int64),
        scores=torch.tensor([d[2] for d in detections]),
    )


def evaluate(evaluator, detections, box_type):
    for image_id, found in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": to_instances(found, box_type)}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("evaluator_type", [COCOEvaluator, RotatedCOCOEvaluator])
def test_equivalent_rotated_boxes_give_the_same_ap(scene, names, evaluator_type, fast):
    _, detections = scene
    expected = evaluate(COCOEvaluator(AXIS_ALIGNED, distributed=False), detections, Boxes)
    assert 5 < expected["AP"] < 80 and expected["AP50"] > expected["AP75"] > 0
    evaluator = evaluator_type(NAME, distributed=False, use_fast_impl=fast)
    assert evaluate(evaluator, detections, RotatedBoxes) == pytest.approx(expected, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("box_type, index", [(RotatedBoxes, 0), (Boxes, 1)])
def test_only_ground_truth_or_predictions_rotated(scene, names, box_type, index):
    _, detections = scene
    expected = evaluate(COCOEvaluator(AXIS_ALIGNED, distributed=False), detections, Boxes)
    got = evaluate(COCOEvaluator(names[index], distributed=False), detections, box_type)
    assert got == pytest.approx(expected, abs=1e-3, nan_ok=True)


def covered(box, step=0.1):
    """Return which points of a grid over the image are inside a rotated box."""
    x, y = np.meshgrid(*[np.arange(0, SIZE, step) + step / 2] * 2)
    x, y, angle = x - box[0], y - box[1], np.deg2rad(box[4])
    along_width, along_height = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    return (abs(along_width) <= box[2] / 2) & (abs(along_height) <= box[3] / 2)


def test_overlap_depends_on_the_angle(names):
    """AP of one detection is the fraction of the ten thresholds that its IoU reaches."""
    gt = [80, 80, 90, 30, 30]
    coco = json.loads(open(MetadataCatalog.get(NAME).json_file).read())
    coco["annotations"] = [{"id": 1, "image_id": 4, "category_id": 3, "bbox": gt}]
    with open(MetadataCatalog.get(NAME).json_file, "w") as file:
        json.dump(coco, file)
    for angle in (30, 210, 120, 34, 22, 45):
        box = [80, 80, 90, 30, angle]
        evaluator = COCOEvaluator(NAME, distributed=False)
        fields = {"scores": torch.ones(1), "pred_classes": torch.zeros(1, dtype=torch.int64)}
        found = Instances((SIZE, SIZE), pred_boxes=RotatedBoxes([box]), **fields)
        evaluator.process([{"image_id": 4}], [{"instances": found}])
        iou = (covered(gt) & covered(box)).sum() / (covered(gt) | covered(box)).sum()
        expected = 100 * np.mean(iou >= np.arange(0.5, 0.96, 0.05) - 1e-6)
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(expected, abs=1e-6), (angle, iou)


def test_overlap_with_a_crowd_is_the_covered_fraction_of_the_detection():
    dt = np.array([[50, 50, 20, 10, 30.0], [50, 50, 400, 400, 0]])
    gt = np.array([[50, 50, 200, 200, 77.0]] * 2)
    overlaps = rotated_iou(dt, gt, np.array([True, False]))
    np.testing.assert_allclose(overlaps, [[1, 200 / 40000], [0.25, 0.25]], rtol=1e-9)


def test_rotated_boxes_are_unchanged_in_json():
    boxes = RotatedBoxes([[30, 40, 20, 10, -35.5]])
    fields = {"scores": torch.ones(1), "pred_classes": torch.ones(1, dtype=torch.int64)}
    (result,) = instances_to_coco_json(Instances((90, 90), pred_boxes=boxes, **fields), "a")
    assert result == {"image_id": "a", "category_id": 1, "bbox": [30, 40, 20, 10, -35.5], "score": 1}


@pytest.mark.parametrize("box_type", [Boxes, RotatedBoxes])
def test_equivalent_rotated_proposals_give_the_same_recall(scene, names, box_type, tmp_path):
    _, detections = scene
    recalls = []
    for name, each_type in ((AXIS_ALIGNED, Boxes), (NAME, box_type)):
        evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path))
        for image_id, found in detections.items():
            proposals = Instances((SIZE, SIZE), proposal_boxes=to_instances(found, each_type).pred_boxes)
            proposals.objectness_logits = torch.tensor([d[2] for d in found])
            evaluator.process([{"image_id": image_id}], [{"proposals": proposals}])
        recalls.append(evaluator.evaluate()["box_proposals"])
    assert 20 < recalls[0]["AR@100"] < 100
    assert recalls[1] == pytest.approx(recalls[0], abs=1e-3, nan_ok=True)
    saved = np.load(tmp_path / "box_proposals.pkl", allow_pickle=True)
    assert saved["bbox_mode"] == (BoxMode.XYWHA_ABS if box_type is RotatedBoxes else BoxMode.XYXY_ABS)


def test_no_detections_give_nan_and_other_tasks_raise(names):
    evaluator = RotatedCOCOEvaluator(NAME, distributed=False)
    evaluator.process([{"image_id": 0}], [{"instances": to_instances([], RotatedBoxes)}])
    assert np.isnan(evaluator.evaluate()["bbox"]["AP"])
    with pytest.raises(ValueError, match="only the task 'bbox'"):
        RotatedCOCOEvaluator(NAME, ("bbox", "segm"))


def test_trainer_selects_evaluator_by_type(names, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    assert type(DefaultTrainer.build_evaluator(cfg, NAME)) is COCOEvaluator
    MetadataCatalog.pop(NAME)
    MetadataCatalog.get(NAME).set(evaluator_type="rotated_coco")
    assert type(DefaultTrainer.build_evaluator(cfg, NAME)) is RotatedCOCOEvaluator
