"""COCO 2017 with masks of things, and stuff as semantic label maps."""

from detlib.config import LazyCall as L
from detlib.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator

from .coco import dataloader

dataloader.train.dataset.names = "coco_2017_train_panoptic_separated"
dataloader.train.dataset.filter_empty = False
dataloader.test.dataset.names = "coco_2017_val_panoptic_separated"

dataloader.evaluator = [
    L(evaluator)(dataset_name="${...test.dataset.names}")
    for evaluator in (COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator)
]
