"""Hooks for callbacks, timing, output and the learning rate."""

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable

import torch
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer

from detlib.engine.train_loop import HookBase
from detlib.solver import LRMultiplier
from detlib.utils.events import EventWriter

__all__ = ["CallbackHook", "IterationTimer", "LRScheduler", "PeriodicWriter"]

logger = logging.getLogger(__name__)


class CallbackHook(HookBase):
    """Calls functions of your own, each with the trainer as its argument."""

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
        # The functions may hold the trainer, which holds this hook.
        del self._before_train, self._after_train
        del self._before_step, self._after_step

    def before_step(self) -> None:
        if self._before_step:
            self._before_step(self.trainer)

    def after_step(self) -> None:
        if self._after_step:
            self._after_step(self.trainer)


class IterationTimer(HookBase):
    """Puts the seconds of each step into the storage as "time", and logs the totals at the end.

    Time in hooks counts in the totals only, those hooks excepted that come before this one.
    """

    def __init__(self, warmup_iter: int = 3):
        """
        Args:
            warmup_iter: number of first steps that are not counted, as they are slower than the others.
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


class PeriodicWriter(HookBase):
    """Lets writers put out the storage every so many steps, at each evaluation and after the last step."""

    def __init__(self, writers: list[EventWriter], period: int = 20, eval_period: int = 0):
        """
        Args:
            writers: what writes.
            period: steps between two calls.
            eval_period: the period of the `EvalHook`, whose results are put out in the same step: the next
                ones would replace them. 0 for none.

        Raises:
            TypeError: if one of `writers` is no EventWriter.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"writers must be EventWriter instances, got {type(writer).__name__}")
        self._writers = writers
        self._period = period
        self._eval_period = eval_period

    def before_train(self) -> None:
        for writer in self._writers:
            writer.start()
        if self.trainer.storage.latest():  # of an evaluation that was made up: the next would replace it
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
        # Without a writer that takes them they would only be in the way.
        self.trainer.storage.clear_images()
        self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.finish()
            except Exception as error:  # the others are to be closed all the same
                logger.error("%s failed at the end", type(writer).__name__, exc_info=error)
                errors.append(error)
        if errors:
            raise errors[0]


class LRScheduler(HookBase):
    """Steps a learning-rate schedule and puts the rate into the storage as "lr"."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler=None):
        """
        Args:
            optimizer: default: the trainer's ``optimizer``.
            scheduler: a PyTorch scheduler, or a fvcore ParamScheduler, which becomes an `LRMultiplier`;
                default: the trainer's ``scheduler``.
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
        """The parameter group whose rate stands for all: the largest, or of the commonest rate if all have
        one parameter."""
        groups = optimizer.param_groups
        largest = max(len(group["params"]) for group in groups)
        if largest > 1:
            return next(i for i, group in enumerate(groups) if len(group["params"]) == largest)
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        lr = self._optimizer.param_groups[self._best_param_group_id]["lr"]
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
