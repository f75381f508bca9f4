"""Tests of COCOEvaluator against pycocotools on random detections, and of unusual input."""

import contextlib
import copy
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import load_coco_json, register_coco_instances
from detlib.evaluation import COCOEvaluator
from detlib.evaluation.coco_json import complete_ground_truth, instances_to_coco_json
from detlib.evaluation.fast_eval_api import COCOeval_opt
from detlib.structures import Boxes, BoxMode, Instances, ROIMasks
from detlib.utils import comm
from tests.evaluation.coco_cases import (
    CATEGORY_IDS,
    SIZE,
    feed,
    make_coco,
    make_predictions,
    random_polygon,
    reference,
)

NAME = "coco_evaluation_test"


@pytest.fixture
def dataset(tmp_path):
    """The content and the annotation file of a registered random dataset."""
    coco = make_coco(np.random.RandomState(3))
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco))
    register_coco_instances(NAME, {}, str(path), str(tmp_path), overwrite=True)
    load_coco_json(str(path), str(tmp_path), NAME)
    yield coco, path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def outputs(dataset):
    return make_predictions(np.random.RandomState(5), dataset[0])


@pytest.mark.parametrize("fast", [True, False])
def test_metrics_equal_pycocotools(dataset, outputs, fast):
    results = feed(COCOEvaluator(NAME, use_fast_impl=fast), outputs).evaluate()
    assert set(results) == {"bbox", "segm", "keypoints"}
    for task, metrics in results.items():
        stats, per_class, _ = reference(dataset[0], outputs, task)
        names = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        if task == "keypoints":
            names.remove("APs")
        expected = dict(zip(names, stats)) | {f"AP-class{i}": v for i, v in zip(CATEGORY_IDS, per_class)}
        assert list(metrics) == list(expected)
        np.testing.assert_allclose(list(metrics.values()), list(expected.values()), rtol=0, atol=1e-9)
        assert math.isnan(metrics["AP-class8"]) and 5 < metrics["AP"] < 95


def test_evaluate_is_repeatable_and_reset_discards_predictions(dataset, outputs):
    evaluator = feed(COCOEvaluator(NAME, ("bbox",)), outputs)
    first = evaluator.evaluate()
    assert list(first) == ["bbox"]
    np.testing.assert_equal(evaluator.evaluate(), first)
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_subset_of_images_equals_pycocotools(dataset, outputs):
    ids = [image["id"] for image in dataset[0]["images"][2:7]]
    results = feed(COCOEvaluator(NAME, ("bbox",)), outputs).evaluate(img_ids=ids)
    assert results["bbox"]["AP"] == pytest.approx(
        reference(dataset[0], outputs, "bbox", img_ids=ids)[0][0], abs=1e-9
    )


@pytest.mark.parametrize("limit", [5, 10, 300])
def test_max_dets_per_image_equals_pycocotools(dataset, limit, log):
    outputs = make_predictions(np.random.RandomState(6), dataset[0], extra=150, masks=False)
    result = feed(COCOEvaluator(NAME, ("bbox",), max_dets_per_image=limit), outputs).evaluate()["bbox"]
    _, per_class, _ = reference(dataset[0], outputs, "bbox", max_dets=[limit])
    assert [result["AP-class3"], result["AP-class7"]] == pytest.approx(per_class[:2], abs=1e-9)
    assert result["AP"] == pytest.approx(np.mean(per_class[:2]), abs=1e-9)
    assert "max_dets_per_image=" not in log.text


def test_exceeding_the_default_limit_of_detections_warns(dataset, log):
    outputs = make_predictions(np.random.RandomState(6), dataset[0], extra=150, masks=False)
    feed(COCOEvaluator(NAME, ("bbox",)), outputs).evaluate()
    assert "max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE" in log.text


def test_files_can_be_evaluated_by_pycocotools(dataset, outputs, tmp_path):
    results = feed(COCOEvaluator(NAME, output_dir=str(tmp_path / "out")), outputs).evaluate()
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(dataset[1]))
        evaluation = COCOeval(gt, gt.loadRes(str(tmp_path / "out" / "coco_instances_results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] * 100 == pytest.approx(results["bbox"]["AP"], abs=1e-9)
    predictions = torch.load(tmp_path / "out" / "instances_predictions.pth", weights_only=False)
    assert [p["image_id"] for p in predictions] == list(outputs)


def test_no_predictions_give_nan(dataset):
    outputs = {image["id"]: Instances((SIZE, SIZE)) for image in dataset[0]["images"]}
    for instances in outputs.values():
        instances.pred_boxes = Boxes(torch.zeros(0, 4))
        instances.scores = torch.zeros(0)
        instances.pred_classes = torch.zeros(0, dtype=torch.long)
    results = feed(COCOEvaluator(NAME, ("bbox", "segm")), outputs).evaluate()
    assert set(results) == {"bbox", "segm"}
    assert all(math.isnan(value) for metrics in results.values() for value in metrics.values())
    assert list(results["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def test_wrong_predictions_give_zero(dataset, outputs):
    for instances in outputs.values():
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(instances), 1))
    assert feed(COCOEvaluator(NAME, ("bbox",)), outputs).evaluate()["bbox"]["AP"] == 0


def test_single_class_has_no_class_ap(tmp_path):
    coco = make_coco(np.random.RandomState(0), num_images=3)
    coco["categories"] = coco["categories"][:1]
    for annotation in coco["annotations"]:
        annotation["category_id"] = CATEGORY_IDS[0]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(coco))
    uri = f"coco:{path}@{tmp_path}"
    outputs = make_predictions(np.random.RandomState(0), coco)
    for instances in outputs.values():
        instances.pred_classes[:] = 0
    assert list(feed(COCOEvaluator(uri, ("bbox",)), outputs).evaluate()["bbox"])[-1] == "APl"


def test_predicted_class_not_in_dataset_raises(dataset, outputs):
    outputs[10].pred_classes[0] = 3
    with pytest.raises(ValueError, match="predicted class 3.*3 classes 0, 1, 2.*NUM_CLASSES"):
        feed(COCOEvaluator(NAME), outputs).evaluate()


def test_incomplete_annotations_are_completed(dataset, outputs, tmp_path):
    """`area`, `iscrowd`, `id`, `info` and `num_keypoints` may be missing, and ids may start at 0."""
    full = dataset[0]
    for annotation in full["annotations"]:
        if annotation["iscrowd"]:
            annotation["iscrowd"] = 0
            annotation["segmentation"] = [random_polygon(np.random.RandomState(1), annotation["bbox"])]
            annotation["area"] = float(
                mask_utils.area(mask_utils.frPyObjects(annotation["segmentation"], SIZE, SIZE)).sum()
            )
    dropped = ("area", "iscrowd", "id", "num_keypoints")
    bare = {
        "images": full["images"],
        "categories": full["categories"],
        "annotations": [{k: v for k, v in a.items() if k not in dropped} for a in full["annotations"]],
    }
    from_zero = {**full, "annotations": [{**a, "id": i} for i, a in enumerate(full["annotations"])]}
    for i, coco in enumerate((bare, from_zero)):
        path = tmp_path / f"bare{i}.json"
        path.write_text(json.dumps(coco))
        results = feed(COCOEvaluator(f"coco:{path}@{tmp_path}"), outputs).evaluate()
        for task in ("bbox", "segm", "keypoints"):
            expected = reference(full, outputs, task)[0][0]
            assert results[task]["AP"] == pytest.approx(expected, abs=1e-9), (i, task)


def test_registered_dicts_are_converted_by_each_evaluator(outputs, dataset, tmp_path):
    """Ground truth of an earlier run is not reused, even with the same name and folder."""
    name = "coco/evaluation:test dicts"
    dicts = load_coco_json(str(dataset[1]), "")
    for record in dicts:
        record["image_id"] = f"image {record['image_id']}"
        for annotation in record["annotations"]:
            annotation["category_id"] = CATEGORY_IDS.index(annotation["category_id"])
    DatasetCatalog.register(name, lambda: dicts)
    try:
        MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"])
        named = {f"image {i}": instances for i, instances in outputs.items()}
        evaluate = feed(COCOEvaluator(name, output_dir=str(tmp_path)), named).evaluate
        first = evaluate()
        for task in first:
            assert first[task]["AP"] == pytest.approx(reference(dataset[0], outputs, task)[0][0], abs=1e-3)
        assert "AP-b" in first["bbox"]
        with contextlib.redirect_stdout(io.StringIO()):
            gt = COCO(str(tmp_path / "coco_evaluation_test_dicts_coco_format.json"))
            gt.loadRes(str(tmp_path / "coco_instances_results.json"))
        for record in dicts:
            record["annotations"] = record["annotations"][:1]
        second = feed(COCOEvaluator(name, output_dir=str(tmp_path)), named).evaluate()
        assert second["bbox"]["AP"] < first["bbox"]["AP"] - 1
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_predictions_without_annotations_are_saved(outputs, dataset, tmp_path):
    coco = {key: value for key, value in dataset[0].items() if key != "annotations"}
    path = tmp_path / "test.json"
    path.write_text(json.dumps(coco))
    evaluator = COCOEvaluator(f"coco:{path}@{tmp_path}", output_dir=str(tmp_path / "out"))
    assert feed(evaluator, outputs).evaluate() == {}
    saved = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert len(saved) == sum(map(len, outputs.values()))
    assert {result["category_id"] for result in saved} == set(CATEGORY_IDS)


def test_custom_keypoints_require_sigmas(tmp_path, log):
    coco = make_coco(np.random.RandomState(0), num_keypoints=4)
    coco["categories"][0].update(keypoints=["a", "b", "left_c", "right_c"])
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(coco))
    uri = f"coco:{path}@{tmp_path}"
    outputs = make_predictions(np.random.RandomState(0), coco, num_keypoints=4)
    with pytest.raises(ValueError, match="4 keypoints.*TEST.KEYPOINT_OKS_SIGMAS"):
        COCOEvaluator(uri, ("keypoints",))
    with pytest.raises(ValueError, match="has 3 numbers.*4 keypoints"):
        COCOEvaluator(uri, kpt_oks_sigmas=[0.1, 0.1, 0.1])
    assert set(feed(COCOEvaluator(uri), outputs).evaluate()) == {"bbox", "segm"}
    assert "TEST.KEYPOINT_OKS_SIGMAS" in log.text
    sigmas = [0.05, 0.1, 0.2, 0.1]
    results = feed(COCOEvaluator(uri, kpt_oks_sigmas=sigmas), outputs).evaluate()
    expected = reference(coco, outputs, "keypoints", sigmas=sigmas)[0][0]
    assert results["keypoints"]["AP"] == pytest.approx(expected, abs=1e-9)


def test_invalid_tasks_and_missing_file_raise(dataset, tmp_path):
    with pytest.raises(TypeError, match="tuple of names"):
        COCOEvaluator(NAME, "bbox")
    with pytest.raises(ValueError, match=r"\['boxes'\].*bbox, segm, keypoints"):
        COCOEvaluator(NAME, ("boxes",))
    dataset[1].unlink()
    with pytest.raises(FileNotFoundError, match="annotations.json"):
        COCOEvaluator(NAME)


def test_task_without_predicted_field_raises(dataset, outputs):
    for instances in outputs.values():
        instances.remove("pred_masks")
    with pytest.raises(ValueError, match=r"no results for \['segm'\]"):
        feed(COCOEvaluator(NAME, ("bbox", "segm")), outputs).evaluate()


def test_config_instead_of_tasks_is_deprecated(dataset, outputs, tmp_path, log, monkeypatch):
    monkeypatch.setattr("detlib.utils.logger._counts", Counter())
    cfg = get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    evaluator = COCOEvaluator(NAME, cfg, False, str(tmp_path / "old"))
    COCOEvaluator(NAME, cfg)
    assert log.text.count("is deprecated") == 1
    new = COCOEvaluator(NAME, max_dets_per_image=7)
    np.testing.assert_equal(feed(evaluator, outputs).evaluate(), feed(new, outputs).evaluate())
    assert (tmp_path / "old" / "coco_instances_results.json").exists()


def test_instances_to_coco_json_fields():
    masks = torch.zeros(70, 5, 6, dtype=torch.bool)
    for i in range(70):
        masks[i, i % 5, : i % 7] = True
    instances = Instances(
        (5, 6),
        pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 4.0, 7.0]]).repeat(70, 1)),
        scores=torch.linspace(0, 1, 70),
        pred_classes=torch.arange(70),
        pred_masks=masks,
        pred_keypoints=torch.tensor([[[2.5, 3.5, 0.75]]]).repeat(70, 1, 1),
    )
    results = json.loads(json.dumps(instances_to_coco_json(instances, 9)))
    assert len(results) == 70
    assert results[69]["bbox"] == [1.0, 2.0, 3.0, 5.0] and results[69]["score"] == 1.0
    assert results[69]["category_id"] == 69 and results[69]["image_id"] == 9
    assert results[0]["keypoints"] == [2.0, 3.0, 0.75]
    assert instances.pred_keypoints[0, 0, 0] == 2.5, "the input must not change"
    for i, result in enumerate(results):
        np.testing.assert_array_equal(mask_utils.decode(result["segmentation"]), masks[i].numpy())
    assert instances_to_coco_json(instances[:0], 9) == []


def test_all_mask_types_give_the_same_json():
    masks = torch.rand(9, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.0, 2.0, 14.5, 17.0]]) + torch.arange(9)[:, None]
    fields = {"pred_boxes": Boxes(boxes), "scores": torch.ones(9), "pred_classes": torch.zeros(9).long()}
    pasted = ROIMasks(masks).to_bitmasks(boxes, 20, 21)
    results = [
        instances_to_coco_json(Instances((20, 21), **fields, pred_masks=given), 1)
        for given in (ROIMasks(masks), pasted, pasted.tensor, pasted.tensor.byte(), pasted.tensor.float())
    ]
    assert all(result == results[0] for result in results)


def test_coco_eval_opt_accepts_pycocotools_objects(dataset, outputs):
    expected = reference(dataset[0], outputs, "bbox")[2]
    evaluation = COCOeval_opt(expected.cocoGt, expected.cocoDt, "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    np.testing.assert_allclose(evaluation.stats[:12], expected.stats, atol=1e-12)


def test_complete_ground_truth_does_not_modify_input():
    coco = {
        "images": [{"id": "a", "height": 4, "width": 4, "file_name": "a"}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"image_id": "a", "category_id": 1, "bbox": [0, 0, 2, 3], "bbox_mode": BoxMode.XYWH_ABS}
        ],
    }
    before = json.dumps(coco)
    gt = complete_ground_truth(coco)
    assert json.dumps(coco) == before
    assert gt.coco["annotations"][0]["area"] == 6 and gt.image_numbers == {"a": 1}
    assert gt.coco["images"][0]["id"] == 1 and gt.has_annotations


def test_predictions_of_all_processes_are_gathered(dataset, outputs, monkeypatch):
    expected = feed(COCOEvaluator(NAME, ("bbox",)), outputs).evaluate()
    ids = list(outputs)
    halves = [
        feed(COCOEvaluator(NAME, ("bbox",)), {i: outputs[i] for i in part}) for part in (ids[:5], ids[5:])
    ]
    monkeypatch.setattr(comm, "gather", lambda data, dst: [half._predictions for half in halves])
    np.testing.assert_equal(halves[0].evaluate(), expected)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert halves[1].evaluate() == {}
    halves[1]._distributed = False
    assert halves[1].evaluate()["bbox"]["AP"] < expected["bbox"]["AP"]


def test_many_rle_masks_are_evaluated(tmp_path):
    """RLE masks are used unchanged, also more than 255 of them, where pycocotools.mask.area fails."""
    from detlib.evaluation.coco_metrics import evaluate_coco, make_coco_api

    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image_id in range(1, 31):
        for _ in range(10):
            x, y = rng.integers(0, 40, 2).tolist()
            mask = np.zeros((64, 64), np.uint8, order="F")
            mask[y : y + 20, x : x + 15] = 1
            rle = mask_utils.encode(mask)
            rle["counts"] = rle["counts"].decode()
            annotation = {"image_id": image_id, "category_id": 1, "segmentation": rle, "bbox": [x, y, 15, 20]}
            annotations.append(annotation | {"id": len(annotations) + 1, "area": 300, "iscrowd": 0})
            results.append(annotation | {"score": float(rng.random()), "bbox": [0, 0, 1, 1]})
    images = [{"id": i, "height": 64, "width": 64} for i in range(1, 31)]
    coco = {"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": annotations}
    scores = [
        evaluate_coco(make_coco_api(copy.deepcopy(coco), fast), results, "segm", fast=fast)
        for fast in (True, False)
    ]
    assert scores[0].ap("AP") == pytest.approx(scores[1].ap("AP"), abs=1e-10)
    # The area is that of the mask, not of the box, so detections count as small and none is wrong.
    assert scores[0].ap("APs") == pytest.approx(100)
