"""The trainer for lazy configs."""

import copy
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detlib.config import instantiate
from detlib.data import MetadataCatalog
from detlib.data.build import images_per_epoch
from detlib.data.detection_utils import as_names
from detlib.engine.base_trainer import ConfigTrainer
from detlib.engine.freezing import log_model
from detlib.engine.options import RunSettings, warn_about_unknown_entries
from detlib.engine.train_loop import HookBase
from detlib.evaluation import inference_on_dataset, print_csv_format
from detlib.solver import LRMultiplier
from detlib.utils import comm
from detlib.utils.env import resolve_device
from detlib.utils.logger import setup_logger
from detlib.utils.registry import locate

__all__ = ["LazyTrainer"]

logger = logging.getLogger(__name__)


class _ClipGradients(HookBase):
    """A hook that clips the global gradient norm before each update."""

    def __init__(self, model: nn.Module, **kwargs: Any):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._kwargs = kwargs
        try:  # fail here, not in the first step
            inspect.signature(torch.nn.utils.clip_grad_norm_).bind(self._parameters, **kwargs)
        except TypeError as e:
            raise TypeError(f"train.clip_grad.params are not arguments of clip_grad_norm_: {e}") from None

    def after_backward(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, **self._kwargs)


def _takes_output_dir(node: Mapping[str, Any]) -> bool:
    target = node["_target_"]
    target = locate(target) if isinstance(target, str) else target
    return "output_dir" in inspect.signature(target).parameters


class LazyTrainer(ConfigTrainer):
    """A trainer that builds model, optimizer, schedule, data loader and hooks from a lazy config.

    The config has these nodes:

    - ``model``;
    - ``optimizer``, whose ``params.model`` is set here;
    - ``lr_multiplier``, a schedule of factors in [0, 1];
    - ``dataloader`` with ``train``; ``test`` and ``evaluator`` for evaluations; ``val_loss``, one loader or a
      dict of loaders by name, for validation losses;
    - ``train``, as in ``configs/common/train.py``. ``docs/training.md`` lists its entries.

    Example:
        >>> trainer = LazyTrainer(LazyConfig.load("configs/COCO-Detection/fcos_R_50_FPN_1x.py"))
        >>> trainer.resume_or_load(resume=False)
        >>> trainer.train()

    Attributes:
        cfg: the config.
    """

    def __init__(self, cfg: Any):
        """
        Raises:
            KeyError: if a node is missing.
        """
        super().__init__()
        if not logging.getLogger("detlib").isEnabledFor(logging.INFO):
            setup_logger()
        missing = [k for k in ("model", "optimizer", "lr_multiplier", "dataloader", "train") if k not in cfg]
        if missing:
            raise KeyError(f"The lazy config lacks {missing}, which training needs; it has {list(cfg)}.")
        self.cfg = cfg
        train = cfg.train
        data_loader = instantiate(self._train_loader_config())
        warn_about_unknown_entries(train)
        settings = RunSettings.from_config(cfg).in_iterations(images_per_epoch(data_loader))
        model = self._prepare_model(self.build_model(cfg), settings)
        model.train()
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        del cfg.optimizer.params.model  # the model cannot be saved with the config
        scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), train.max_iter)
        self._set_parts(model, optimizer, data_loader, scheduler, settings)
        self.register_hooks(self.build_hooks())

    def _train_loader_config(self):
        """Return the node of the training loader, with the batch size of one forward pass."""
        node, parts = self.cfg.dataloader.train, self.cfg.train.get("accum_steps", 1)
        total = node.get("total_batch_size")
        if not total or parts == 1:
            return node
        if not isinstance(parts, int) or parts < 1 or total % (parts * comm.get_world_size()):
            raise ValueError(
                f"dataloader.train.total_batch_size = {total} must be a multiple of train.accum_steps = "
                f"{parts} times the number of processes, {comm.get_world_size()}"
            )
        node = copy.deepcopy(node)
        node.total_batch_size = total // parts
        return node

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Build the model on ``train.device``, or on the best available device if that does not exist."""
        device = RunSettings.from_config(cfg).device
        try:
            device = resolve_device(device)
        except ValueError as e:
            logger.warning("train.device = %r: %s", device, e)
            device = resolve_device("auto")
        model = instantiate(cfg.model).to(device)
        log_model(model)
        return model

    def build_hooks(self) -> list[HookBase | None]:
        """Build the hooks of `ConfigTrainer`, preceded by gradient clipping."""
        clip = self.settings.clip_grad
        return [None if clip is None else _ClipGradients(self.model, **clip), *super().build_hooks()]

    @property
    def image_format(self) -> str:
        return self.cfg.dataloader.train.get("mapper", {}).get("image_format", "BGR")

    @property
    def train_metadata(self) -> Any:
        names = as_names(self.cfg.dataloader.train.get("dataset", {}).get("names", ()))
        return MetadataCatalog.get(names[0]) if names else None

    def run_test(self) -> Mapping[str, Any]:
        """Evaluate on ``dataloader.test``."""
        return self.test(self.cfg, self.model)

    def build_val_loss_loaders(self) -> dict[str, Any]:
        """Build the loaders of ``dataloader.val_loss`` by name."""
        node = self.cfg.dataloader.get("val_loss", {})
        nodes = {"val_loss": node} if "_target_" in node else node
        return {name: instantiate(loader) for name, loader in nodes.items()}

    def build_precise_bn_loader(self):
        return instantiate(self._train_loader_config())

    @classmethod
    def test(cls, cfg: Any, model: nn.Module) -> dict:
        """Evaluate a model on ``dataloader.test`` with ``dataloader.evaluator``.

        Args:
            cfg: the config.
            model: the model; its mode does not change.

        Returns:
            Results such as ``{"bbox": {"AP": 37.9, ...}}``; empty on processes other than the main one and
            without an evaluator.
        """
        if "evaluator" not in cfg.dataloader or "test" not in cfg.dataloader:
            return {}
        evaluator = copy.deepcopy(cfg.dataloader.evaluator)
        for node in evaluator if isinstance(evaluator, Sequence) else [evaluator]:
            # The report reads the result files.
            if node.get("_target_") is not None and "output_dir" not in node and _takes_output_dir(node):
                node.output_dir = os.path.join(cfg.train.output_dir, "inference")
        results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
        if comm.is_main_process():
            print_csv_format(results)
        return results
