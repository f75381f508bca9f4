"""The usual training step: one batch, one forward and backward pass, one update."""

import concurrent.futures
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detlib.checkpoint.sharded import shard_optimizer_state
from detlib.engine.divergence import LossRecord, losses_to_floats, picture_names
from detlib.engine.optimizer_state import check_optimizer_state, warn_of_kept_settings
from detlib.engine.trainer_base import TrainerBase
from detlib.utils import comm
from detlib.utils.events import get_event_storage

__all__ = ["SimpleTrainer"]

logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds

_ADVICE = (
    "The parameters were not saved after this. Common causes: a learning rate too high for the batch size, "
    "too short a warm-up, or broken annotations in these images."
)


class SimpleTrainer(TrainerBase):
    """The usual step: one batch, one forward and backward pass, one update by one optimizer.

    The model must return a dict of scalar losses, which are summed, or one scalar. For anything else,
    subclass `TrainerBase` with a ``run_step`` of your own.

    Attributes:
        skipped: how many steps in a row were left out last, see `skip_non_finite`.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
        *,
        accum_steps: int = 1,
        skip_non_finite: int = 0,
        advice: str = "",
        seed_step: Callable[[int], None] | None = None,
    ):
        """
        Args:
            model: takes a batch of the data loader and returns losses.
            data_loader: an endless iterable of batches.
            optimizer: the optimizer of the model's parameters.
            gather_metric_period: steps between two looks at the losses. Each look waits for the device and,
                in distributed training, for the other processes. A loss that is NaN comes to light only then.
            zero_grad_before_forward: clear the gradients before the forward pass instead of after it.
            async_write_metrics: look at the losses in another thread. An error in one (NaN) comes to light
                a step later.
            accum_steps: batches whose gradients are averaged for one update. Their losses are averaged too.
            skip_non_finite: how many steps in a row may be left out, with a warning, because their loss is
                infinite or NaN in some process; 0 raises at once. Every step's losses are then looked at.
            advice: what to add to the message for such losses.
            seed_step: called with the step's number before its first forward pass, to seed random numbers.

        Raises:
            ValueError: if `accum_steps` is less than 1, or `skip_non_finite` comes with late looks.
        """
        super().__init__()
        if accum_steps < 1:
            raise ValueError(f"accum_steps must be at least 1, got {accum_steps}")
        if skip_non_finite and (gather_metric_period != 1 or async_write_metrics):
            raise ValueError(
                f"skip_non_finite={skip_non_finite} needs gather_metric_period=1 and no async_write_metrics: "
                f"the loss must be known before the update"
            )
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self.accum_steps = accum_steps
        self.skip_non_finite = skip_non_finite
        self.advice = advice
        self._seed_step = seed_step
        self.skipped = 0
        self._data_loader_iter_obj = None
        self._losses = LossRecord()
        self._pending_write: concurrent.futures.Future | None = None
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError(
                f"{type(self).__name__}: the model is in eval mode; something called model.eval() "
                "without model.train() after it"
            )
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        data_time, parts = 0.0, []
        for part in range(self.accum_steps):
            start = time.perf_counter()
            data = self._next_batch()
            data_time += time.perf_counter() - start
            if self.keep_batch:
                self.batch = data
            if part == 0 and self._seed_step is not None:
                # After the loading: a loader draws random numbers when it starts, so at other steps in a
                # resumed run.
                self._seed_step(self.iter)
            with self._communicate(part == self.accum_steps - 1):
                try:
                    loss_dict = self._forward(data)
                except FloatingPointError as e:
                    message = self._explain_failed_forward(e, data)
                    if comm.get_world_size() == 1 and self._may_skip(message):
                        return
                    raise FloatingPointError(message) from e
                losses = sum(loss_dict.values())
                if part == 0 and not self.zero_grad_before_forward:
                    self.optimizer.zero_grad()
                self._backward(losses if self.accum_steps == 1 else losses / self.accum_steps)
            self._losses.add(self.iter, loss_dict, data)
            parts.append(loss_dict)
        self.after_backward()
        try:
            self._report(parts[0] if len(parts) == 1 else _mean_losses(parts), data_time)
        except FloatingPointError as e:
            if self._may_skip(str(e)):
                return
            raise
        # After the report: a step whose loss is NaN must not reach the parameters.
        self._update()
        self.skipped = 0

    def _communicate(self, last: bool) -> contextlib.AbstractContextManager:
        """Sends gradients to the other processes in the last of the backward passes of a step only."""
        if self.accum_steps == 1:
            return contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):  # a model of fully_shard
            self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _may_skip(self, reason: str) -> bool:
        """Counts and logs a step that is left out, unless there have been too many."""
        self.skipped += 1
        if self.skipped > self.skip_non_finite:
            return False
        logger.warning(
            "The step is left out (%d of at most %d in a row).\n%s",
            self.skipped,
            self.skip_non_finite,
            reason,
        )
        self._losses.forget_until(self.iter)
        return True

    def _next_batch(self) -> Any:
        try:
            return next(self._data_loader_iter)
        except StopIteration:
            raise RuntimeError(
                f"The data loader ended at iteration {self.iter}: training needs an endless one "
                "(build_detection_train_loader makes it with an endless sampler)"
            ) from None
        except (ConnectionError, EOFError):
            # Perhaps the first sign of a loader's process that was killed; PyTorch's signal handler tells.
            time.sleep(_PATIENCE)
            raise

    def _forward(self, data: Any) -> dict[str, torch.Tensor]:
        """The losses of a batch."""
        loss_dict = self.model(data)
        return {"total_loss": loss_dict} if isinstance(loss_dict, torch.Tensor) else loss_dict

    def _backward(self, losses: torch.Tensor) -> None:
        losses.backward()

    def _update(self) -> None:
        self.optimizer.step()

    @property
    def _data_loader_iter(self):
        # Made at the first use, so that workers start only when there is training to do.
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Any]) -> None:
        """Replaces the data loader by what `data_loader_builder` returns.

        The old one is let go of first, so that its workers end before the new ones start.
        """
        self._data_loader_iter_obj = None
        del self.data_loader
        self.data_loader = data_loader_builder()

    def _report(self, loss_dict: Mapping[str, torch.Tensor], data_time: float) -> None:
        """Writes the metrics, here or in the other thread."""
        if not self.async_write_metrics:
            self._write_metrics(loss_dict, data_time)
            return
        self._finish_pending_write()
        if self._executor is None:
            # One thread, so that the metrics are written in the order of the steps.
            self._executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending_write = self._executor.submit(self._write_metrics, loss_dict, data_time, iter=self.iter)

    def _finish_pending_write(self) -> None:
        """Waits for the other thread, and raises here what was raised there."""
        pending, self._pending_write = self._pending_write, None
        if pending is not None:
            pending.result()

    def _write_metrics(
        self,
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        """Writes the metrics every `gather_metric_period` steps.

        Raises:
            FloatingPointError: naming iteration, losses, learning rate and pictures, if a loss is not finite.
        """
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period != 0:
            return
        try:
            SimpleTrainer.write_metrics(loss_dict, data_time, iteration, prefix)
        except FloatingPointError as e:
            raise FloatingPointError(self._explain_divergence(e, iteration)) from None
        self._losses.forget_until(iteration)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        cur_iter: int,
        prefix: str = "",
    ) -> None:
        """Averages the losses over the processes and puts them into the storage.

        Args:
            loss_dict: scalar losses by name.
            data_time: seconds that this process waited for data; the longest wait of all is kept.
            cur_iter: the step's number.
            prefix: what the name of the total loss begins with.

        Raises:
            FloatingPointError: in every process, if the total loss is not finite in any.
        """
        gathered = comm.all_gather((losses_to_floats(loss_dict), data_time))
        per_process = [losses for losses, _ in gathered]
        means = {k: sum(losses[k] for losses in per_process) / len(per_process) for k in per_process[0]}
        total = sum(means.values())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"The loss became infinite or NaN at iteration {cur_iter}: {_format_losses(means)}"
            )
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("data_time", max(wait for _, wait in gathered), cur_iter=cur_iter)
            storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
            if len(means) > 1:
                storage.put_scalars(cur_iter=cur_iter, **means)

    def _explain_divergence(self, error: FloatingPointError, iteration: int) -> str:
        """The message for losses that are not finite. All processes come here together."""
        lines = [str(error)]
        firsts = comm.all_gather(self._losses.first_non_finite())
        bad = [(rank, step) for rank, step in enumerate(firsts) if step]
        if bad and self.gather_metric_period > 1:
            first = min(step.iteration for _, step in bad)
            lines.append(
                f"It began at iteration {first} (the losses are looked at every {self.gather_metric_period} "
                f"iterations; this look covers {iteration + 1 - self.gather_metric_period} to {iteration})."
            )
            bad = [(rank, step) for rank, step in bad if step.iteration == first]
        lines.append(self._learning_rates())
        for rank, step in bad:
            where = f"Process {rank}" if len(firsts) > 1 else "Losses"
            lines.append(f"{where}: {_format_losses(step.losses)}")
            lines.append(f"Images: {', '.join(step.files) or 'the batch names no files'}")
        return self._with_advice(lines)

    def _explain_failed_forward(self, error: FloatingPointError, data: Any) -> str:
        """The message for a model that found its own predictions to be not finite."""
        latest = get_event_storage().latest()
        losses = {name: value for name, (value, _) in latest.items() if "loss" in name}
        lines = [f"At iteration {self.iter}: {error}", self._learning_rates()]
        if losses:
            when = max(iteration for name, (_, iteration) in latest.items() if name in losses)
            lines.append(f"Losses at iteration {when}: {_format_losses(losses)}")
        lines.append(f"Images: {', '.join(picture_names(data)) or 'the batch names no files'}")
        return self._with_advice(lines)

    def _with_advice(self, lines: list[str]) -> str:
        return "\n".join(filter(None, [*lines, self.advice, _ADVICE]))

    def _learning_rates(self) -> str:
        rates = sorted({float(group["lr"]) for group in self.optimizer.param_groups})
        return f"Learning rate: {', '.join(f'{rate:.6g}' for rate in rates)}"

    def state_dict(self) -> dict:
        """As the base class's, with the optimizer's state and, if the data loader has one, its position."""
        state = {**super().state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.skipped:
            state["skipped"] = self.skipped
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        check_optimizer_state(self.optimizer, state_dict["optimizer"])
        warn_of_kept_settings(self.optimizer, state_dict["optimizer"])
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        shard_optimizer_state(self.optimizer)
        self.skipped = state_dict.get("skipped", 0)
        if "data_loader" in state_dict and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state_dict["data_loader"])

    def after_train(self) -> None:
        # Before the hooks, whose writers put out the last step's metrics.
        try:
            self._finish_pending_write()
        finally:
            super().after_train()
            if self._executor is not None:
                self._executor.shutdown(wait=True)
                self._executor = None


def _mean_losses(parts: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The losses of a step of several batches; a loss that a batch lacks counts as 0 there."""
    names = dict.fromkeys(name for losses in parts for name in losses)
    return {
        name: sum(losses[name].detach() for losses in parts if name in losses) / len(parts) for name in names
    }


def _format_losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.6g}" for name, value in losses.items())
