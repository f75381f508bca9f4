"""General hooks: timing, learning rate, checkpoints, evaluation, writers, interruption."""

import contextlib
import datetime
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import cast

import torch
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer

from detlib.checkpoint import Checkpointer
from detlib.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from detlib.checkpoint.sharded import is_sharded
from detlib.engine.distributed.interrupt import StopTraining, listen_for_stop, stop_requested
from detlib.engine.divergence import find_non_finite_parameters
from detlib.engine.train_loop import HookBase, TrainerBase
from detlib.evaluation.testing import flatten_results_dict
from detlib.solver import LRMultiplier
from detlib.utils import comm
from detlib.utils.events import EventWriter

__all__ = [
    "CallbackHook",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "StopOnSignal",
    "prepare_to_save",
    "refuse_diverged",
]

logger = logging.getLogger(__name__)


class CallbackHook(HookBase):
    """A hook that calls functions, each with the trainer as its argument."""

    def __init__(
        self,
        *,
        before_train: Callable | None = None,
        after_train: Callable | None = None,
        before_step: Callable | None = None,
        after_step: Callable | None = None,
    ):
        self._before_train = before_train
        self._after_train = after_train
        self._before_step = before_step
        self._after_step = after_step

    def before_train(self) -> None:
        if self._before_train:
            self._before_train(self.trainer)

    def after_train(self) -> None:
        if self._after_train:
            self._after_train(self.trainer)
        # The functions may refer to the trainer, which refers to this hook.
        del self._before_train, self._after_train
        del self._before_step, self._after_step

    def before_step(self) -> None:
        if self._before_step:
            self._before_step(self.trainer)

    def after_step(self) -> None:
        if self._after_step:
            self._after_step(self.trainer)


class IterationTimer(HookBase):
    """A hook that stores the seconds of each step as "time" and logs the totals at the end.

    The time of the hooks after this one counts in the total, not in the step.
    """

    def __init__(self, warmup_iter: int = 3):
        """
        Args:
            warmup_iter: number of first steps that are not counted, because they are slower.
        """
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._start_time = time.perf_counter()
        self._total_timer = Timer()

    def before_train(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()
        self._total_timer.pause()

    def after_train(self) -> None:
        total = time.perf_counter() - self._start_time
        in_steps = self._total_timer.seconds()
        num_iter = self.trainer.storage.iter - self.trainer.start_iter - self._warmup_iter
        if num_iter > 0 and in_steps > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                num_iter,
                _format_seconds(in_steps),
                in_steps / num_iter,
            )
        logger.info(
            "Total training time: %s (%s on hooks)",
            _format_seconds(total),
            _format_seconds(max(total - in_steps, 0.0)),
        )

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        done = self.trainer.storage.iter - self.trainer.start_iter + 1
        if done > self._warmup_iter:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        else:
            self._start_time = time.perf_counter()
            self._total_timer.reset()
        self._total_timer.pause()


def _format_seconds(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class LRScheduler(HookBase):
    """A hook that steps a learning-rate schedule and stores the learning rate as "lr"."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler=None):
        """
        Args:
            optimizer: the optimizer; None for the trainer's.
            scheduler: a PyTorch scheduler, or a fvcore ParamScheduler, which becomes an `LRMultiplier`; None
                for the trainer's.
        """
        self._optimizer = optimizer
        self._scheduler = scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
            )
        self._best_param_group_id = LRScheduler.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Return the index of the parameter group whose learning rate is reported.

        It is the largest group, or one with the most common learning rate if each group has one parameter.
        """
        groups = optimizer.param_groups
        largest = max(len(group["params"]) for group in groups)
        if largest > 1:
            return next(i for i, group in enumerate(groups) if len(group["params"]) == largest)
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        lr = cast(torch.optim.Optimizer, self._optimizer).param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self):
        return self._scheduler or self.trainer.scheduler

    def state_dict(self) -> dict:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
            return self.scheduler.state_dict()
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
            self.scheduler.load_state_dict(state_dict)


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """`detlib.checkpoint.PeriodicCheckpointer` as a hook.

    It does not save a model with infinite or NaN parameters, so a run that diverges between two readings of
    the losses does not overwrite good checkpoints.
    """

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        """Save a checkpoint if one is due.

        Raises:
            FloatingPointError: if parameters are not finite.
        """
        iteration = self.trainer.iter
        is_periodic = self.period > 0 and (iteration + 1) % self.period == 0
        if not is_periodic and (self.max_iter is None or iteration + 1 < self.max_iter):
            return
        refuse_diverged(self.checkpointer, iteration)
        prepare_to_save(self.trainer)
        self.step(iteration)

    def after_train(self) -> None:
        """Save the final checkpoint if it is missing, and wait for checkpoints saved in the background.

        It is missing if the run was stopped early, or if it was interrupted between its last periodic
        checkpoint and the final one and then resumed with nothing left to train.

        Raises:
            FloatingPointError: if parameters are not finite.
        """
        trainer = self.trainer
        last = trainer.iter - 1
        was_stopped = trainer.start_iter <= last < trainer.max_iter - 1
        had_nothing_to_do = 0 < trainer.start_iter == trainer.iter
        if trainer.is_finished and (was_stopped or (had_nothing_to_do and self._lacks_final())):
            refuse_diverged(self.checkpointer, last)
            prepare_to_save(trainer)
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=last)
        self.checkpointer.wait()

    def _lacks_final(self) -> bool:
        lacks = not self.path_manager.exists(
            os.path.join(self.checkpointer.save_dir, f"{self.file_prefix}_final.pth")
        )
        # If all processes have this hook, all save or none does: the main process decides.
        all_save = is_sharded(self.checkpointer.model) or getattr(self.trainer, "_all_save", False)
        return comm.all_gather(lacks)[0] if all_save else lacks


def prepare_to_save(trainer: TrainerBase) -> None:
    """Let a trainer collect the state of each process. Called before a checkpoint is saved."""
    prepare = getattr(trainer, "prepare_to_save", None)
    if prepare is not None:
        prepare()


def refuse_diverged(checkpointer: Checkpointer, iteration: int) -> None:
    """Check that the parameters are finite before a checkpoint is saved.

    Raises:
        FloatingPointError: if the model has infinite or NaN parameters.
    """
    bad = find_non_finite_parameters(checkpointer.model)
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        last = checkpointer.get_checkpoint_file() if checkpointer.save_dir else ""
        raise FloatingPointError(
            f"After iteration {iteration} the model has infinite or NaN parameters ({listed}), so no "
            f"checkpoint was saved. The last good checkpoint: {last or 'none'}"
        )


class EvalHook(HookBase):
    """A hook that calls an evaluation function every `eval_period` steps and after the last step.

    Every process calls the function, and they wait for each other afterwards.

    Attributes:
        evaluated: number of completed steps at the last evaluation; None before the first.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping | None],
        eval_after_train: bool = True,
        repeat_after_stop: bool = False,
    ):
        """
        Args:
            eval_period: number of steps between two evaluations; 0 evaluates after the last step only.
            eval_function: function without arguments that returns a nested dict of numbers, or None.
            eval_after_train: whether to evaluate after the last step.
            repeat_after_stop: whether to evaluate again if the evaluation of the last step stopped training
                early; for functions that do more at the end.
        """
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train
        self._repeat_after_stop = repeat_after_stop
        self.evaluated: int | None = None

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(f"eval_function must return a dict of numbers, got {type(results).__name__}")
            flat = {}
            for name, value in flatten_results_dict(results).items():
                try:
                    flat[name] = float(value)
                except (TypeError, ValueError) as e:
                    raise ValueError(
                        f"eval_function must return a nested dict of numbers; '{name}' is {value!r}"
                    ) from e
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        # The duration of an evaluation differs between processes, but steps must start together.
        comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step runs in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()
            self.evaluated = done

    def after_train(self) -> None:
        # Not after an error.
        if self._eval_after_train and self.trainer.is_finished:
            if self._repeat_after_stop or self.evaluated != self.trainer.iter:
                self._do_eval()
                self.evaluated = self.trainer.iter
        # The function usually refers to the trainer, which refers to this hook.
        del self._func


# Checkpoints keep the metrics of this many iterations; the writers' windows are 20 iterations by default.
_KEPT_METRICS = 50


class PeriodicWriter(HookBase):
    """A hook that calls each writer every `period` steps, at each evaluation and after the last step."""

    def __init__(self, writers: list[EventWriter], period: int = 20, eval_period: int = 0):
        """
        Args:
            writers: the writers.
            period: number of steps between two calls.
            eval_period: the period of the `EvalHook`, whose results are written in the same step, before the
                next ones replace them. 0 for none.

        Raises:
            TypeError: if one of `writers` is not an EventWriter.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"writers must be EventWriter instances, got {type(writer).__name__}")
        self._writers = writers
        self._period = period
        self._eval_period = eval_period
        self._recent: dict[str, list] = {}

    def state_dict(self) -> dict:
        """Return the metrics of the last iterations, because the writers smooth them."""
        return {"recent": self.trainer.storage.state_dict(_KEPT_METRICS)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the metrics when training starts."""
        self._recent = state_dict["recent"]

    def before_train(self) -> None:
        self.trainer.storage.load_state_dict(self._recent)
        self._recent = {}
        for writer in self._writers:
            writer.start()
        if self.trainer.storage.latest():  # results of a missed evaluation, which the next would replace
            self._write()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_evaluated = self._eval_period > 0 and done % self._eval_period == 0
        if is_evaluated or done % self._period == 0 or done == self.trainer.max_iter:
            self._write()
        for writer in self._writers:
            writer.step()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()
        # In case no writer has cleared them.
        self.trainer.storage.clear_images()
        self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.finish()
            except Exception as error:  # the other writers must still be closed
                logger.error("%s failed at the end", type(writer).__name__, exc_info=error)
                errors.append(error)
        if errors:
            raise errors[0]


class StopOnSignal(HookBase):
    """A hook that saves a checkpoint after the current step and stops, on SIGTERM or Ctrl-C.

    Slurm, Kubernetes and spot instances send SIGTERM some time before they end a job.

    If one process gets the signal, all stop after the same step. Register the hook after all hooks with a
    state, so that the checkpoint includes their updates of this step.
    """

    def __init__(self, checkpointer: Checkpointer, period: int = 1):
        """
        Args:
            checkpointer: the checkpointer that saves the checkpoint.
            period: number of steps between two checks for a stop request in any process.

        Raises:
            ValueError: if `period` is below 1.
        """
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self._checkpointer = checkpointer
        self._period = period
        self._listening = contextlib.ExitStack()

    def before_train(self) -> None:
        self._listening.enter_context(listen_for_stop())

    def after_step(self) -> None:
        """Save and stop if a process got a signal.

        Raises:
            StopTraining: in all processes.
        """
        iteration = self.trainer.iter
        if (iteration + 1) % self._period != 0:
            return
        signum = stop_requested()
        if not signum:
            if self._is_last_step():
                # No step is left. From here on a signal ends the program as usual.
                self._listening.close()
            return
        name = f"model_{iteration:07d}"
        # The main process decides for all: the others may not see yet what it saves in the background.
        if not comm.all_gather(self._is_saved(iteration, name))[0]:
            prepare_to_save(self.trainer)
            self._checkpointer.save(name, iteration=iteration)
        self._checkpointer.wait()
        logger.warning(
            "Stopped by %s after iteration %d, which is saved in %s; --resume continues from there",
            signal.Signals(signum).name,
            iteration,
            self._checkpointer.get_checkpoint_file(),
        )
        raise StopTraining(signum)

    def _is_saved(self, iteration: int, name: str) -> bool:
        """Return whether this step's checkpoint has been saved already."""
        if not self._checkpointer.has_checkpoint():
            return False
        last = os.path.basename(self._checkpointer.get_checkpoint_file())
        return last == f"{name}.pth" or (last == "model_final.pth" and self._is_last_step())

    def _is_last_step(self) -> bool:
        return self.trainer.iter + 1 >= self.trainer.max_iter or self.trainer.stopped_reason is not None

    def after_train(self) -> None:
        self._listening.close()
