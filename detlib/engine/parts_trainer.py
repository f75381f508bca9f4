"""The trainer around a model and what belongs to it, however these were made."""

import logging
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.engine.options import RunOptions
from detlib.engine.setup import create_ddp_model, default_writers
from detlib.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from detlib.utils import comm
from detlib.utils.events import EventWriter

__all__ = ["PartsTrainer"]

logger = logging.getLogger(__name__)


class _AfterBackward(HookBase):
    """Hands the inner trainer's `after_backward` on to the hooks of the outer one."""

    def __init__(self, outer: TrainerBase):
        self._outer = outer

    def after_backward(self) -> None:
        self._outer.after_backward()


class PartsTrainer(TrainerBase):
    """Trains, saves and resumes, once it has its parts. Subclasses read a config and call `_take_parts`.

    Attributes:
        scheduler: the learning-rate schedule.
        checkpointer: the `DetectionCheckpointer`.
        output_dir: folder of checkpoints and logs.
        options: how to train, as the config says.
    """

    options: RunOptions

    def _take_parts(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Iterable,
        scheduler,
        *,
        max_iter: int,
        output_dir: str,
        weights: str,
        amp: bool = False,
        async_save: bool = False,
        fp16_compression: bool = False,
        **ddp,
    ) -> None:
        """
        Args:
            model: the model, on its device.
            optimizer: of its parameters.
            data_loader: the endless loader of training batches.
            scheduler: the learning-rate schedule, a PyTorch one.
            max_iter: the number of steps after which training ends.
            output_dir: folder of checkpoints and logs.
            weights: what `resume_or_load` loads where it does not resume.
            amp: train in mixed precision.
            async_save: see `detlib.checkpoint.Checkpointer`.
            fp16_compression, **ddp: see `create_ddp_model`.
        """
        model = create_ddp_model(model, fp16_compression=fp16_compression, **ddp)
        self._trainer = (AMPTrainer if amp else SimpleTrainer)(model, data_loader, optimizer)
        self._trainer.register_hooks([_AfterBackward(weakref.proxy(self))])
        self.scheduler = scheduler
        self.checkpointer = DetectionCheckpointer(
            model, output_dir, async_save=async_save, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = max_iter
        self.output_dir = output_dir
        self._weights = weights

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the last checkpoint in the output folder, or else loads the config's weights.

        Args:
            resume: False loads the config's weights in any case, and starts at iteration 0.
        """
        self.checkpointer.resume_or_load(self._weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            # The checkpoint was saved after the step it is named by.
            self.start_iter = self.iter + 1
            logger.info(
                "Resumed from %s with optimizer, schedule and hooks; next is iteration %d of %d",
                self.checkpointer.get_checkpoint_file(),
                self.start_iter,
                self.max_iter,
            )

    def build_writers(self) -> list[EventWriter]:
        """The writers that the config names."""
        options = self.options
        return default_writers(self.output_dir, self.max_iter, options.writers, options.writer_params)

    def _keep_results(self, results: Mapping) -> None:
        """Keeps the results of the last evaluation for `train` to return."""
        self._last_eval_results = results

    def train(self) -> dict | None:
        """Trains from where `resume_or_load` has left it up to the last iteration.

        Returns:
            The results of the last evaluation, on the main process.

        Raises:
            FloatingPointError: if a loss becomes infinite or NaN.
        """
        super().train(self.start_iter, self.max_iter)
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.keep_batch = self.keep_batch
        self._trainer.run_step()
        self.batch, self._trainer.batch = self._trainer.batch, None

    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @property
    def model(self) -> nn.Module:
        """The model, wrapped if there are several processes."""
        return self._trainer.model

    @property
    def data_loader(self) -> Iterable:
        """The training data."""
        return self._trainer.data_loader

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self._trainer.optimizer
