"""The base class of trainers that are built from a config."""

import contextlib
import logging
import os
import random
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.data.build import images_per_epoch
from detlib.engine import hooks
from detlib.engine.distributed.activation_checkpointing import add_activation_checkpoints
from detlib.engine.distributed.ddp import (
    compile_parts,
    create_ddp_model,
    first_process_buffers,
    gathered_parameters,
    shard_model,
)
from detlib.engine.divergence import learning_rate_advice, length_advice
from detlib.engine.ema import EMA_ENTRY, WeightAverage
from detlib.engine.freezing import freeze_by_name
from detlib.engine.options import RunSettings
from detlib.engine.output_folder import lock_output_folder
from detlib.engine.resume_state import gather_process_state, load_process_state
from detlib.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from detlib.engine.validation import validation_results
from detlib.layers.fvcore_nn import get_bn_modules
from detlib.modeling import facts_of
from detlib.utils import comm
from detlib.utils.events import EventWriter
from detlib.utils.writers import build_writers

__all__ = ["ConfigTrainer"]

logger = logging.getLogger(__name__)


class ConfigTrainer(TrainerBase):
    """A trainer that saves, resumes and evaluates. Subclasses build its components from a config.

    A subclass builds a model, passes it to `_prepare_model`, builds an optimizer for the result, and calls
    `_set_parts`. The inner trainer `_trainer` runs the steps inside this one's loop: it uses the hooks and
    the batch of this trainer. The random numbers of a step are a function of the seed, the step and the
    process, so a resumed run draws the same numbers as an uninterrupted one.

    Attributes:
        settings: the settings of the run.
        scheduler: the learning-rate schedule.
        checkpointer: the `DetectionCheckpointer`.
        output_dir: folder of checkpoints and logs.
        ema: the moving average of the weights, or None.
    """

    settings: RunSettings

    def __init__(self) -> None:
        super().__init__()
        self._process_states: list[dict] = []
        self._all_save = False  # whether all processes have hooks that save
        self._restored: list[str] = []  # names of the restored states, for the log
        self._last_eval_results: Mapping | None = None
        self._val_loss_loaders: Mapping[str, Iterable] | None = None  # built at the first evaluation

    @property
    def _trainer(self) -> SimpleTrainer:
        return self._inner

    @_trainer.setter
    def _trainer(self, trainer: SimpleTrainer) -> None:
        trainer.run_inside(self)
        self._inner = trainer

    def _prepare_model(self, model: nn.Module, settings: RunSettings) -> nn.Module:
        """Freeze, compile and shard a model according to the settings, before its optimizer is built.

        Args:
            model: the model, on its device.
            settings: ``freeze``, ``activation_checkpoint``, ``compile*`` and ``strategy`` are used.

        Raises:
            ValueError, RuntimeError: if the model or the number of processes does not support an option.
        """
        if settings.freeze:
            freeze_by_name(model, settings.freeze)
        if settings.activation_checkpoint:
            add_activation_checkpoints(model)
        if settings.compile:
            compile_parts(model, settings.compile_modules, settings.compile_backend)
        return shard_model(model) if settings.strategy == "fsdp" else model

    def _set_parts(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Iterable,
        scheduler,
        settings: RunSettings,
    ) -> None:
        """
        Args:
            model: the result of `_prepare_model`.
            optimizer: the optimizer of its parameters.
            data_loader: the endless loader of training batches.
            scheduler: the learning-rate schedule, a PyTorch scheduler.
            settings: the settings of the run.
        """
        self.settings = settings
        self.ema = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
        wrapped = model if settings.strategy == "fsdp" else create_ddp_model(model, **settings.ddp_arguments)
        step_options: dict[str, Any] = {
            "accum_steps": settings.accum_steps,
            "skip_non_finite": settings.skip_non_finite,
            "advice": learning_rate_advice(
                optimizer, settings.images_per_step, facts_of(model).reference_lr_per_image
            ),
        }
        images = images_per_epoch(data_loader)
        too_long = length_advice(settings.max_iter, settings.images_per_step, images)
        # Before the first step: a run that diverges or overfits wastes hours.
        for advice in filter(None, [step_options["advice"], too_long]):
            logger.warning(advice)
        if settings.precision:
            precision = getattr(torch, settings.precision)
            self._trainer = AMPTrainer(wrapped, data_loader, optimizer, precision=precision, **step_options)
        else:
            self._trainer = SimpleTrainer(wrapped, data_loader, optimizer, **step_options)
        self.scheduler = scheduler
        self.checkpointer = DetectionCheckpointer(
            wrapped, settings.output_dir, async_save=settings.checkpoint_async, trainer=weakref.proxy(self)
        )
        if self.ema is not None:
            self.checkpointer.add_checkpointable(EMA_ENTRY, self.ema)
        self.max_iter = settings.max_iter
        self.output_dir = settings.output_dir
        # The same in all processes; `seed_step` adds the rank.
        self._seed = settings.seed if settings.seed >= 0 else comm.shared_random_seed()

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint in the output folder, or else load the weights of the config.

        Args:
            resume: False always loads the weights of the config and starts at iteration 0.
        """
        settings = self.settings
        has_checkpoint = resume and self.checkpointer.has_checkpoint()
        self._restored = []
        self.checkpointer.resume_or_load(settings.weights, resume=resume)
        if self._restored:
            # The iteration in a checkpoint is the step after which it was saved.
            self.start_iter = self.iter + 1
            logger.info(
                "Resumed from %s: next is iteration %d of %d. Restored: %s",
                self.checkpointer.get_checkpoint_file(),
                self.start_iter,
                self.max_iter,
                ", ".join(self._restored),
            )
        else:
            self.start_iter = 0
            if self.ema is not None:
                self.ema.reset()
            if has_checkpoint:
                logger.warning(
                    "%s has a model, but no optimizer and no iteration: training starts at iteration 0 from "
                    "this model",
                    self.checkpointer.get_checkpoint_file(),
                )
            elif resume:
                logger.info(
                    "There is no checkpoint in %s: training starts at iteration 0 from %s",
                    settings.output_dir,
                    settings.weights or "random weights",
                )
        if has_checkpoint and settings.weights:
            logger.info(
                "The weights %s were not loaded, because the run resumes from a checkpoint. Leave out "
                "--resume to start from these weights",
                settings.weights,
            )

    def build_writers(self) -> list[EventWriter]:
        """Build the writers named in the config."""
        settings = self.settings
        return build_writers(settings.writers, self.output_dir, self.max_iter, settings.writer_arguments)

    def build_hooks(self) -> list[HookBase | None]:
        """Build the hooks according to the settings.

        The order matters: the checkpoint is saved before the evaluation, which may fail; the hooks that use
        its results follow; the writers come last, to write the metrics of all other hooks.

        Returns:
            The hooks; None entries are ignored.
        """
        settings = self.settings
        result: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if settings.profile_steps > 0:
            folder = os.path.join(settings.output_dir, "profile")
            result.append(hooks.StepsProfiler(settings.profile_start, settings.profile_steps, folder))
        if settings.vis_period > 0:
            result.append(
                hooks.TrainingImages(
                    settings.vis_period,
                    settings.output_dir,
                    image_format=self.image_format,
                    metadata=self.train_metadata,
                    model=self.model,
                )
            )
        if settings.precise_bn_batches > 0 and get_bn_modules(self.model):
            loader = self.build_precise_bn_loader()
            batches = settings.precise_bn_batches
            result.append(
                hooks.PreciseBN(settings.eval_period, self.model, loader, batches, average=self.ema)
            )
        # On every process, so that all of them stop if the model has diverged. Only the main one writes
        # files.
        result.append(
            hooks.PeriodicCheckpointer(
                self.checkpointer,
                settings.checkpoint_period,
                max_to_keep=settings.checkpoint_keep or None,
            )
        )
        result.append(
            hooks.EvalHook(settings.eval_period, self.evaluate, repeat_after_stop=self.has_final_evaluation)
        )
        result += self._metric_hooks()
        if settings.eval_period > 0:
            result.append(hooks.MissedEvaluation(settings.eval_period, settings.output_dir))
        if comm.is_main_process():
            result.append(
                hooks.PeriodicWriter(self.build_writers(), settings.log_period, settings.eval_period)
            )
        return result

    def _metric_hooks(self) -> list[HookBase]:
        settings = self.settings
        result: list[HookBase] = []
        if settings.best_metric:
            result.append(
                hooks.BestCheckpointer(
                    settings.eval_period,
                    self.checkpointer,
                    settings.best_metric,
                    settings.best_mode,
                    on_all_processes=True,
                )
            )
        if settings.early_stop_patience > 0:
            if settings.eval_period <= 0:
                logger.warning(
                    "Early stopping (SOLVER.EARLY_STOP.PATIENCE, train.early_stop.patience) has no effect: "
                    "there is no evaluation before the end of training. Set TEST.EVAL_PERIOD or "
                    "TEST.EVAL_EPOCHS (train.eval_period, train.eval_epochs)"
                )
            result.append(
                hooks.EarlyStopping(
                    settings.eval_period,
                    settings.early_stop_metric or settings.best_metric,
                    settings.early_stop_patience,
                    cast(str, settings.early_stop_mode),
                    settings.output_dir,
                )
            )
        return result

    # Used by the hooks. These depend on the type of config.

    image_format: str = "BGR"
    """Channel order of the training images."""
    train_metadata: Any = None
    """Metadata of the training data, such as class names and colors."""
    has_final_evaluation: bool = False
    """Whether the evaluation after the last step does more than the earlier ones."""

    def run_test(self) -> Mapping[str, Any] | None:
        """Evaluate the model with its current weights on the test datasets."""
        raise NotImplementedError(f"{type(self).__name__} must define run_test()")

    def build_val_loss_loaders(self) -> Mapping[str, Iterable]:
        """Build the loaders of the validation losses by name."""
        return {}

    def build_precise_bn_loader(self) -> Iterable:
        """Build the loader of the batches for `hooks.PreciseBN`."""
        raise NotImplementedError(f"{type(self).__name__} must define build_precise_bn_loader()")

    def evaluate(self) -> Mapping[str, Any] | None:
        """Evaluate the averaged weights, if there are any, or else the model's, and store the results.

        Returns:
            The results of `run_test` and the validation losses, at least on the main process.
        """
        with self.weights_to_evaluate():
            results = self.run_test()
            if self._val_loss_loaders is None:
                self._val_loss_loaders = self.build_val_loss_loaders()
            if self._val_loss_loaders:
                results = {**(results or {}), **validation_results(self.model, self._val_loss_loaders)}
        self._last_eval_results = results
        return results

    @property
    def last_evaluation(self) -> int | None:
        """Number of completed steps at the last evaluation of this run; None before the first."""
        done = [hook.evaluated for hook in self._hooks if isinstance(hook, hooks.EvalHook) and hook.evaluated]
        return max(done, default=None)

    def rerun_evaluation(self, iteration: int) -> bool:
        """Run the missed evaluation after a step of an earlier run, with the hooks that use its results.

        Args:
            iteration: number of the step.

        Returns:
            Whether there is an evaluation to run: False without an `EvalHook`.
        """
        types = hooks.EvalHook | hooks.BestCheckpointer | hooks.EarlyStopping
        chosen = [hook for hook in self._hooks if isinstance(hook, types)]
        if not any(isinstance(hook, hooks.EvalHook) for hook in chosen):
            return False
        logger.info("The evaluation after iteration %d was interrupted; running it now", iteration)
        self.iter = self.storage.iter = iteration
        try:
            for hook in chosen:
                hook.after_step()
        finally:
            self.iter = self.storage.iter = iteration + 1
        return True

    @contextlib.contextmanager
    def weights_to_evaluate(self) -> Iterator[None]:
        """Context manager in which the model has the weights to evaluate: the averaged ones if there are any.

        All processes must enter it. They use the buffers of the main process, as checkpoints do.
        """
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            stack.enter_context(first_process_buffers(self.checkpointer.model))
            stack.enter_context(gathered_parameters(self.checkpointer.model))
            yield

    def train(self) -> dict | None:
        """Train from the iteration of `resume_or_load` to the last one.

        Returns:
            The results of the last evaluation on the main process, None on the others.

        Raises:
            FloatingPointError: if a loss becomes infinite or NaN.
            OutputFolderInUseError: if another process trains in the output folder.
            OSError: if the output folder cannot be written to.
        """
        with lock_output_folder(self.output_dir):
            super().train(self.start_iter, self.max_iter)
        return cast(dict, self._last_eval_results) if comm.is_main_process() else None

    def before_train(self) -> None:
        saves = any(isinstance(h, hooks.PeriodicCheckpointer | hooks.BestCheckpointer) for h in self._hooks)
        # Some scripts register the saving hooks on the main process only.
        self._all_save = all(comm.all_gather(saves))
        super().before_train()

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()
        if self.ema is not None and not self._trainer.skipped:
            self.ema.update()

    def seed_step(self) -> None:
        seed_rng(self._seed, self.iter, comm.get_rank())

    def prepare_to_save(self) -> None:
        """Collect the state of each process. Hooks call this in all processes before they save."""
        if self._all_save:
            self._process_states = gather_process_state(self.checkpointer.model)

    def state_dict(self) -> dict:
        state = {**super().state_dict(), "_trainer": self._trainer.state_dict(), "seed": self._seed}
        if self.ema is not None:
            state["ema_updates"] = self.ema.updates
        if self._process_states:
            state["processes"] = self._process_states
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        restored = ["model", "optimizer", "schedule and hooks"]
        if self.settings.seed < 0 and "seed" in state_dict:
            self._seed = state_dict["seed"]
        restored.append(f"random numbers (seed {self._seed})")
        if "data_loader" in state_dict["_trainer"]:
            restored.append("position in the data")
        if state_dict["_trainer"].get("grad_scaler"):
            restored.append("gradient scale")
        if self.ema is not None and "ema_updates" in state_dict:
            self.ema.updates = state_dict["ema_updates"]
            restored.append(f"average of the weights ({self.ema.updates} updates)")
        elif self.ema is not None:
            self.ema.reset()
        load_process_state(self.checkpointer.model, state_dict.get("processes", []))
        self._restored = restored

    @property
    def model(self) -> nn.Module:
        """The model, wrapped in DDP if there are multiple processes."""
        return self._trainer.model

    @property
    def data_loader(self) -> Iterable:
        """The training data loader."""
        return self._trainer.data_loader

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self._trainer.optimizer


def seed_rng(seed: int, iteration: int, rank: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch for one step of one process.

    A resumed run thus draws the same numbers as an uninterrupted one, even if more numbers are drawn between
    two steps, such as in an evaluation.

    Args:
        seed: the seed of the run.
        iteration: number of the step.
        rank: rank of the process.
    """
    low, high = np.random.SeedSequence([seed, iteration, rank]).generate_state(2, np.uint64)
    random.seed(int(low))
    np.random.seed(int(low) % 2**32)
    # torch.manual_seed checks for every type of device, which takes half a millisecond.
    torch.default_generator.manual_seed(int(high) % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(high) % 2**63)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(int(high) % 2**63)
