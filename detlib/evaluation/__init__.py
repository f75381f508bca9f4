"""Evaluation of models on datasets."""

from detlib.evaluation.cityscapes_evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detlib.evaluation.coco_evaluation import COCOEvaluator
from detlib.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from detlib.evaluation.lvis_evaluation import LVISEvaluator
from detlib.evaluation.panoptic_evaluation import COCOPanopticEvaluator
from detlib.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from detlib.evaluation.rotated_coco_evaluation import RotatedCOCOEvaluator
from detlib.evaluation.sem_seg_evaluation import SemSegEvaluator
from detlib.evaluation.testing import flatten_results_dict, print_csv_format, verify_results

__all__ = [
    "COCOEvaluator",
    "COCOPanopticEvaluator",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "LVISEvaluator",
    "PascalVOCDetectionEvaluator",
    "RotatedCOCOEvaluator",
    "SemSegEvaluator",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]
