"""The default evaluator of a dataset."""

import logging
import os
from collections.abc import Callable

from detlib.config import CfgNode
from detlib.data.catalog import MetadataCatalog
from detlib.data.detection_utils import as_names
from detlib.engine.checks import check_num_classes
from detlib.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detlib.modeling import MetaArchitecture, facts_of
from detlib.utils.file_io import safe_name

__all__ = ["default_evaluator"]

logger = logging.getLogger(__name__)


def _coco(cfg: CfgNode, dataset_name: str, folder: str, metric: type = COCOEvaluator) -> DatasetEvaluator:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return metric(
        dataset_name,
        output_dir=folder,
        # By default the metric uses at most 100 detections per image.
        max_dets_per_image=limit if limit > 100 else None,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _rotated_coco(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return _coco(cfg, dataset_name, folder, RotatedCOCOEvaluator)


def _sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(dataset_name, output_dir=folder)


def _lvis(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return LVISEvaluator(dataset_name, output_dir=folder)


def _panoptic(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return COCOPanopticEvaluator(dataset_name, os.path.join(folder, "panoptic"))


def _pascal_voc(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(dataset_name)


def _cityscapes_instance(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


def _cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


# Builders by `evaluator_type`. Without a type, annotations are converted to COCO's format.
_EVALUATORS = {
    None: (_coco,),
    "coco": (_coco,),
    "rotated_coco": (_rotated_coco,),
    "lvis": (_lvis,),
    "sem_seg": (_sem_seg,),
    "coco_panoptic_seg": (_coco, _sem_seg, _panoptic),
    "pascal_voc": (_pascal_voc,),
    "cityscapes_instance": (_cityscapes_instance,),
    "cityscapes_sem_seg": (_cityscapes_sem_seg,),
    "cityscapes_panoptic_seg": (_cityscapes_instance, _cityscapes_sem_seg, _panoptic),
}


# Model outputs, of which an evaluator needs at least one; see `MetaArchitecture.outputs`.
_NEEDS = {
    _coco: {"instances", "proposals"},
    _sem_seg: {"sem_seg"},
    _panoptic: {"panoptic_seg"},
    _cityscapes_instance: {"masks"},
    _cityscapes_sem_seg: {"sem_seg"},
}


def _chosen(cfg: CfgNode, dataset_name: str) -> list[Callable[..., DatasetEvaluator]]:
    """Return the evaluators of the dataset's type for which it has ground truth and the model has outputs."""
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind not in _EVALUATORS:
        raise NotImplementedError(
            f"There is no default evaluator for the type '{kind}' of dataset '{dataset_name}': override "
            "DefaultTrainer.build_evaluator"
        )
    builders = list(_EVALUATORS[kind])
    if len(builders) == 1:
        return builders
    if metadata.get("label_divisor") and _sem_seg in builders:  # all classes in one list, no label images
        builders.remove(_sem_seg)
    outputs = facts_of(cfg).outputs(cfg)
    return [build for build in builders if outputs & _NEEDS[build]]


def _warn_of_unmeasured(cfg: CfgNode, dataset_name: str, builders: list[Callable]) -> None:
    """Warn if the model segments semantically, but the dataset has no ground truth to measure it with."""
    outputs = facts_of(cfg).outputs(cfg)
    if outputs == MetaArchitecture.outputs(cfg):  # the model does not state its outputs
        return
    measured = set().union(*(_NEEDS.get(build, set()) for build in builders))
    unmeasured = sorted((outputs & {"sem_seg", "panoptic_seg"}) - measured)
    metadata = MetadataCatalog.get(dataset_name)
    if not unmeasured or (metadata.get("label_divisor") and unmeasured == ["sem_seg"]):
        return
    missing = [] if metadata.get("stuff_classes") else ["stuff_classes"]
    if "panoptic_seg" in unmeasured:
        missing += [key for key in ("panoptic_json", "panoptic_root") if not metadata.get(key)]
    logger.warning(
        "%s predicts %s, which is not evaluated on dataset %r: its evaluator_type is %r, not 'sem_seg' or "
        "'coco_panoptic_seg'%s. The semantic ground truth is 'sem_seg_file_name' of its records.",
        cfg.MODEL.META_ARCHITECTURE,
        " and ".join(unmeasured),
        dataset_name,
        metadata.get("evaluator_type"),
        f", and its metadata has no {', '.join(missing)}" if missing else "",
    )


def default_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator of one dataset for the `evaluator_type` in its metadata.

    Args:
        cfg: the config. Result files are written to OUTPUT_DIR/inference, or to a subfolder for each dataset
            if DATASETS.TEST has multiple datasets.
        dataset_name: a registered name or a dataset URI.

    Raises:
        NotImplementedError: if there is no default evaluator for the type.
        ValueError: if the dataset has another number of classes than the model.
    """
    builders = _chosen(cfg, dataset_name)
    _warn_of_unmeasured(cfg, dataset_name, builders)
    check_num_classes(cfg, dataset_name)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(as_names(cfg.DATASETS.TEST)) > 1:  # they would overwrite each other's files
        folder = os.path.join(folder, safe_name(dataset_name))
    evaluators = [build(cfg, dataset_name, folder) for build in builders]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
