"""The trainer for YAML configs."""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.data import (
    DatasetMapper,
    Metadata,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detlib.data.build import images_per_epoch
from detlib.data.detection_utils import as_names
from detlib.engine.base_trainer import ConfigTrainer
from detlib.engine.checks import (
    check_datasets,
    check_num_classes,
    set_class_weights,
    set_num_classes,
)
from detlib.engine.evaluators import default_evaluator
from detlib.engine.freezing import log_model
from detlib.engine.options import RunSettings, set_iterations
from detlib.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import build_model
from detlib.solver import build_lr_scheduler, build_optimizer
from detlib.utils import comm
from detlib.utils.logger import setup_logger

__all__ = ["DefaultTrainer"]

logger = logging.getLogger(__name__)


class DefaultTrainer(ConfigTrainer):
    """A trainer that builds model, optimizer, schedule, data loader and hooks from a config.

    By default it

    1. checks that all datasets exist, sets the number of classes from a dataset URI if the config does not
       set it, and checks that the number matches;
    2. builds the components with the ``build_*`` methods, which a subclass may override;
    3. loads MODEL.WEIGHTS, or the last checkpoint when resuming, in `resume_or_load`;
    4. trains, saves checkpoints, evaluates and logs in `train`.

    Example:
        >>> trainer = DefaultTrainer(cfg)
        >>> trainer.resume_or_load(resume=False)
        >>> trainer.train()

    Attributes:
        cfg: the config, scaled to the number of processes (see `auto_scale_workers`).
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            KeyError, FileNotFoundError, ValueError: if a dataset does not exist, is empty, or has another
                number of classes than the model.
        """
        super().__init__()
        if not logging.getLogger("detlib").isEnabledFor(logging.INFO):
            setup_logger()
        check_datasets(cfg)
        set_num_classes(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        set_class_weights(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            # If it does not support the model, fail here and not at the end of training.
            GeneralizedRCNNWithTTA(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self._check_num_classes(cfg)
        images = images_per_epoch(data_loader)
        cfg = set_iterations(cfg, images)
        settings = RunSettings.from_config(cfg).in_iterations(images)
        model = self._prepare_model(model, settings)
        optimizer = self.build_optimizer(cfg, model)
        scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._set_parts(model, optimizer, data_loader, scheduler, settings)
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def _check_num_classes(self, cfg: CfgNode) -> None:
        check_num_classes(cfg, cfg.DATASETS.TRAIN)
        # A custom evaluator may accept data with other classes.
        own, default = (c.build_evaluator.__func__ for c in (self, DefaultTrainer))  # type: ignore[attr-defined]
        if own is default:
            check_num_classes(cfg, cfg.DATASETS.TEST)

    @property
    def image_format(self) -> str:
        return self.cfg.INPUT.FORMAT

    @property
    def train_metadata(self) -> Metadata:
        return MetadataCatalog.get(as_names(self.cfg.DATASETS.TRAIN)[0])

    @property
    def has_final_evaluation(self) -> bool:
        return self.cfg.TEST.AUG.ENABLED

    def run_test(self) -> Mapping[str, Any]:
        """Evaluate on DATASETS.TEST; with test-time augmentation at the end only, because it is slow."""
        cfg = self.cfg
        if cfg.TEST.AUG.ENABLED and not self._is_over:
            cfg = _changed(cfg, ["TEST.AUG.ENABLED", False])
        return self.test(cfg, self.model)

    def build_val_loss_loaders(self) -> dict[str, Any]:
        return {name: self.build_val_loss_loader(self.cfg, name) for name in self.settings.val_loss}

    def build_precise_bn_loader(self):
        return self.build_train_loader(_changed(self.cfg, ["DATALOADER.NUM_WORKERS", 0]))

    def train(self) -> Mapping[str, Any] | None:
        """Train as `ConfigTrainer.train` does, and compare the results with TEST.EXPECTED_RESULTS."""
        results = super().train()
        if comm.is_main_process() and self.cfg.TEST.EXPECTED_RESULTS:
            if results is None:
                raise ValueError("TEST.EXPECTED_RESULTS is set, but there was no evaluation")
            verify_results(self.cfg, results)
        return results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model on its device."""
        model = build_model(cfg)
        log_model(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """Build the learning-rate schedule."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Build the endless loader of training batches."""
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Build the loader of one test dataset."""
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_val_loss_loader(cls, cfg: CfgNode, dataset_name: str):
        """Build the loader of one dataset of TEST.VAL_LOSS: a test loader with annotations."""
        mapper = DatasetMapper(**{**DatasetMapper.from_config(cfg, is_train=False), "is_train": True})
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator of one dataset, by default `default_evaluator`.

        Raises:
            NotImplementedError: if there is no default evaluator for the dataset's ``evaluator_type``.
            ValueError: if the dataset has another number of classes than the model.
        """
        return default_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict:
        """Evaluate a model on DATASETS.TEST and, if TEST.AUG.ENABLED, again with test-time augmentation.

        Args:
            cfg: the config.
            model: the model; its mode does not change.
            evaluators: one evaluator per dataset; None calls `build_evaluator`.

        Returns:
            Results such as ``{"bbox": {"AP": 37.9, ...}}``, by dataset name if there are several datasets.
            Tasks with augmentation are named "bbox_TTA". Empty on processes other than the main one.

        Raises:
            ValueError: if the number of evaluators differs from the number of datasets.
        """
        results = cls._test_all(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED:
            for name, augmented in cls._test_all_with_tta(cfg, model, evaluators).items():
                results[name] = {**results[name], **augmented}
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:  # noqa: N802
        """Evaluate a model with test-time augmentation only, whether or not TEST.AUG.ENABLED is set.

        The evaluators of `build_evaluator` write to ``OUTPUT_DIR/TTA``.

        Args:
            cfg, model, evaluators: as in `test`.

        Returns:
            Results as in `test`, with the suffix "_TTA": ``{"bbox_TTA": {"AP": 38.9, ...}}``.
        """
        results = cls._test_all_with_tta(cfg, model, evaluators)
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def _test_all_with_tta(cls, cfg: CfgNode, model: nn.Module, evaluators) -> dict[str, dict]:
        logger.info("Evaluation with test-time augmentation")
        model = GeneralizedRCNNWithTTA(cfg, model)
        cfg = _changed(cfg, ["INPUT.MIN_SIZE_TEST", 0])  # the views are created from the original image
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "TTA")
        results = cls._test_all(cfg, model, evaluators)
        return {
            name: {f"{task}_TTA": metrics for task, metrics in of_dataset.items()}
            for name, of_dataset in results.items()
        }

    @classmethod
    def _test_all(cls, cfg: CfgNode, model: nn.Module, evaluators) -> dict[str, dict]:
        """Return the results by dataset name."""
        names = as_names(cfg.DATASETS.TEST)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(
                f"DATASETS.TEST has {len(names)} datasets, but there are {len(evaluators)} evaluators"
            )

        results: OrderedDict[str, Any] = OrderedDict()
        for i, name in enumerate(names):
            data_loader = cls.build_test_loader(cfg, name)
            if evaluators is not None:
                evaluator = evaluators[i]
            else:
                try:
                    evaluator = cls.build_evaluator(cfg, name)
                except NotImplementedError as e:
                    logger.warning("Skipping the evaluation on '%s': %s", name, e)
                    results[name] = {}
                    continue
            results[name] = inference_on_dataset(model, data_loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s as comma-separated values:", name)
                print_csv_format(results[name])
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scale a config written for SOLVER.REFERENCE_WORLD_SIZE processes to another number of processes.

        By the linear rule of "Accurate, Large Minibatch SGD" (https://arxiv.org/abs/1706.02677), the batch
        size and the learning rate grow with the number of processes, and all numbers of iterations shrink.

        Args:
            cfg: the config, which is not changed.
            num_workers: the number of processes.

        Returns:
            `cfg` itself if REFERENCE_WORLD_SIZE is 0 or equals `num_workers`; else a changed copy.

        Raises:
            ValueError: if SOLVER.IMS_PER_BATCH is not a multiple of SOLVER.REFERENCE_WORLD_SIZE, or this is
                negative.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference == 0 or reference == num_workers:
            return cfg
        if reference < 0:
            raise ValueError(f"SOLVER.REFERENCE_WORLD_SIZE must be at least 0, got {reference}")
        if cfg.SOLVER.IMS_PER_BATCH % reference:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} is not a multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE={reference}"
            )
        frozen = cfg.is_frozen()
        cfg = cfg.clone()
        cfg.defrost()
        scale = num_workers / reference
        solver = cfg.SOLVER
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
        solver.BASE_LR *= scale
        solver.MAX_ITER = round(solver.MAX_ITER / scale)
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
        solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
        solver.CHECKPOINT_PERIOD = round(solver.CHECKPOINT_PERIOD / scale)
        cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / scale)
        solver.REFERENCE_WORLD_SIZE = num_workers
        logger.info(
            "Scaled the config from %d to %d processes: batch size %d, learning rate %g, %d iterations, "
            "warm-up %d",
            reference,
            num_workers,
            solver.IMS_PER_BATCH,
            solver.BASE_LR,
            solver.MAX_ITER,
            solver.WARMUP_ITERS,
        )
        if frozen:
            cfg.freeze()
        return cfg


def _changed(cfg: CfgNode, changes: list) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(changes)
    return cfg
