"""The default evaluators for a dataset and a model."""

import re

import pytest

from detlib.data import MetadataCatalog
from detlib.engine import DefaultTrainer
from detlib.engine.checks import check_num_classes
from detlib.engine.evaluators import _chosen, _warn_of_unmeasured, default_evaluator
from detlib.engine.hooks.visualization import write_prediction_images
from detlib.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from tests.builders import MASK_RCNN, small_config, tiny_cfg

PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
SHAPES = "shapes:val?num=2&size=64&task="


def config(name: str, tmp_path, **overrides):
    return small_config(name, OUTPUT_DIR=str(tmp_path), MODEL__SEM_SEG_HEAD__NUM_CLASSES=4, **overrides)


def kinds(evaluator) -> list[type]:
    if isinstance(evaluator, DatasetEvaluators):
        return [type(x) for x in evaluator._evaluators]
    return [type(evaluator)]


ALL = [COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator]


@pytest.mark.parametrize(
    "model, task, overrides, expected",
    [
        (PANOPTIC, "panoptic", {}, ALL),
        (PANOPTIC, "panoptic", {"MODEL__PANOPTIC_FPN__COMBINE__ENABLED": False}, ALL[:2]),
        (PANOPTIC, "panoptic", {"MODEL__META_ARCHITECTURE": "mypackage.MyPanopticModel"}, ALL),
        (PANOPTIC, "instances", {}, ALL[:1]),
        (PANOPTIC, "stuff", {}, ALL[1:2]),
        (SEMANTIC, "stuff", {}, ALL[1:2]),
        (SEMANTIC, "panoptic", {}, ALL[1:2]),
        (MASK_RCNN, "panoptic", {}, ALL[:1]),
        (MASK_RCNN, "instances", {}, ALL[:1]),
    ],
)
def test_default_evaluators_match_dataset_and_model(tmp_path, model, task, overrides, expected):
    assert kinds(default_evaluator(config(model, tmp_path, **overrides), SHAPES + task)) == expected


@pytest.mark.parametrize(
    "model, task, expected",
    [
        (
            PANOPTIC,
            "instances",
            "predicts panoptic_seg and sem_seg, .* metadata has no panoptic_json",
        ),
        (PANOPTIC, "panoptic", None),
        (SEMANTIC, "stuff", None),
        (MASK_RCNN, "instances", None),
    ],
)
def test_semantic_predictions_without_ground_truth_are_reported(tmp_path, caplog, model, task, expected):
    with caplog.at_level("WARNING", logger="detlib.engine.evaluators"):
        default_evaluator(config(model, tmp_path), SHAPES + task)
    found = [r.getMessage() for r in caplog.records if "not evaluated" in r.getMessage()]
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


def test_missing_stuff_classes_are_named(tmp_path, caplog):
    name = "things_without_stuff"
    MetadataCatalog.get(name).set(evaluator_type="coco_panoptic_seg", label_divisor=1000)
    MetadataCatalog.get(name + "_only").set(evaluator_type="coco", thing_classes=["a", "b", "c"])
    cfg = config(PANOPTIC, tmp_path)
    try:
        for dataset in (name, name + "_only"):
            _warn_of_unmeasured(cfg, dataset, _chosen(cfg, dataset))
    finally:
        MetadataCatalog.remove(name)
        MetadataCatalog.remove(name + "_only")
    (message,) = [r.getMessage() for r in caplog.records if "not evaluated" in r.getMessage()]
    assert "'things_without_stuff_only'" in message
    assert "metadata has no stuff_classes, panoptic_json, panoptic_root" in message


def test_data_without_label_images_get_no_semantic_evaluator(tmp_path):
    name = "panoptic_without_labels"
    MetadataCatalog.get(name).set(evaluator_type="coco_panoptic_seg", label_divisor=1000)
    try:
        found = kinds(default_evaluator(config(PANOPTIC, tmp_path), name))
    finally:
        MetadataCatalog.remove(name)
    assert found == [COCOEvaluator, COCOPanopticEvaluator]


def test_an_unknown_evaluator_type_raises_an_error(tmp_path):
    MetadataCatalog.get("strange_type").set(evaluator_type="strange")
    try:
        with pytest.raises(NotImplementedError, match="'strange' of dataset 'strange_type'"):
            default_evaluator(config(PANOPTIC, tmp_path), "strange_type")
    finally:
        MetadataCatalog.remove("strange_type")


@pytest.mark.parametrize(
    "model, tasks",
    [("PanopticFPN", {"bbox", "segm", "sem_seg", "panoptic_seg"}), ("SemanticSegmentor", {"sem_seg"})],
)
def test_every_model_is_trained_evaluated_and_drawn(tmp_path, model, tasks):
    cfg = tiny_cfg(
        tmp_path,
        MODEL__META_ARCHITECTURE=model,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=4,
        MODEL__SEM_SEG_HEAD__CONVS_DIM=32,
        DATASETS__TRAIN=("shapes:train?num=4&size=64&task=panoptic",),
        DATASETS__TEST=("shapes:val?num=3&size=64&task=panoptic",),
        SOLVER__MAX_ITER=1,
    )
    trainer = DefaultTrainer(cfg)
    results = trainer.train()
    assert results.keys() == tasks
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    images = write_prediction_images(cfg, trainer.model)
    assert len(images) == 3
    written = tmp_path / "inference" / "panoptic" / "predictions"
    assert written.exists() == (model == "PanopticFPN")


@pytest.mark.parametrize("model", [PANOPTIC, SEMANTIC])
def test_number_of_stuff_classes_is_checked(tmp_path, model):
    cfg = config(model, tmp_path)
    check_num_classes(cfg, SHAPES + "panoptic")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
    with pytest.raises(ValueError, match="SEM_SEG_HEAD.NUM_CLASSES is 54, .* 4 classes .things, grass"):
        check_num_classes(cfg, SHAPES + "panoptic")


def test_types_of_voc_and_cityscapes(tmp_path):
    voc = config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=20)
    assert kinds(default_evaluator(voc, "voc_2007_test")) == [PascalVOCDetectionEvaluator]
    name = "cityscapes_of_this_test"
    try:
        for kind, model, want in (
            ("instance", MASK_RCNN, [CityscapesInstanceEvaluator]),
            ("sem_seg", SEMANTIC, [CityscapesSemSegEvaluator]),
            ("panoptic_seg", SEMANTIC, [CityscapesSemSegEvaluator]),
            (
                "panoptic_seg",
                PANOPTIC,
                [CityscapesInstanceEvaluator, CityscapesSemSegEvaluator, COCOPanopticEvaluator],
            ),
        ):
            MetadataCatalog.pop(name, None)
            MetadataCatalog.get(name).set(
                evaluator_type=f"cityscapes_{kind}", gt_dir=str(tmp_path), label_divisor=1000
            )
            assert kinds(default_evaluator(config(model, tmp_path), name)) == want
    finally:
        MetadataCatalog.pop(name, None)
