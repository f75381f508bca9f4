"""The training loop, the base class of its hooks, and training steps with and without mixed precision."""

import concurrent.futures
import contextlib
import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from detlib.checkpoint.sharded import shard_optimizer_state
from detlib.engine.divergence import LossRecord, format_losses, losses_to_floats, zero_fused_momentum
from detlib.engine.resume_state import check_optimizer_state
from detlib.utils import comm
from detlib.utils.events import EventStorage, get_event_storage

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]

logger = logging.getLogger(__name__)


class HookBase:
    """Code that runs at fixed points of the training loop.

    The loop calls each hook in the order of registration::

        hook.before_train()
        for iter in range(start_iter, max_iter):    # until trainer.stop() is called
            hook.before_step()
            trainer.run_step()      # calls hook.after_backward() between backward pass and update
            hook.after_step()
        hook.after_train()          # also when training ends with an error

    During a step, ``trainer.iter`` is the number of that step. In `after_train` it is the number of completed
    steps, and ``trainer.is_finished`` is False if the run failed.
    """

    trainer: Any
    """A weak reference to the trainer, set by `TrainerBase.register_hooks`."""

    def before_train(self) -> None:
        """Called before the first step."""

    def after_train(self) -> None:
        """Called after the last step."""

    def before_step(self) -> None:
        """Called before each step."""

    def after_backward(self) -> None:
        """Called after the backward pass of each step, before the update."""

    def after_step(self) -> None:
        """Called after each step."""

    def state_dict(self) -> dict:
        """Return the state for a resumed run. A hook with a state also defines ``load_state_dict``."""
        return {}


class TrainerBase:
    """The training loop around `run_step`, independent of models, data and optimizers.

    Attributes:
        iter: number of the current step.
        start_iter: number of the first step.
        max_iter: number of steps after which training ends.
        storage: the `EventStorage` of the current run.
        stopped_reason: the argument of `stop`; None if it was not called.
        batch: the data of the current step, for hooks that ask for it with `keep_batch`; else None.
        keep_batch: whether the current step keeps its batch for its hooks. A hook sets it in
            ``before_step``; it is reset after each step.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage
        self.stopped_reason: str | None = None
        self.batch: Any = None
        self.keep_batch: bool = False
        self._is_over = False
        self._has_failed = False
        # The trainer whose loop runs the steps of this one, see `run_inside`.
        self._loop: TrainerBase = weakref.proxy(self)

    def run_inside(self, outer: "TrainerBase") -> None:
        """Run the steps of this trainer in the loop of another one, with its hooks and its batch."""
        self._loop = weakref.proxy(outer)

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks after the registered ones. None entries are ignored.

        Raises:
            TypeError: if an entry is not a hook.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"hooks must be HookBase instances or None, got {type(hook).__name__}")
            # A strong reference would be a cycle that keeps the data loader workers alive.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the steps from `start_iter` to `max_iter` (exclusive)."""
        if start_iter >= max_iter:
            logger.warning(
                "Nothing left to train: iteration %d is not below max_iter = %d", start_iter, max_iter
            )
        else:
            logger.info("Starting training from iteration %d of %d", start_iter, max_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        self.stopped_reason = None
        self._is_over = self._has_failed = False
        with EventStorage(start_iter) as self.storage:
            try:
                self._run_loop(max_iter)
            except BaseException as error:
                self._has_failed = True
                if isinstance(error, Exception):
                    logger.exception("Training failed at iteration %d:", self.iter)
                try:
                    self.after_train()
                except Exception:
                    # The first error is the one to raise.
                    logger.exception("The hooks also failed at the end of training:")
                raise
            self.after_train()

    def _run_loop(self, max_iter: int) -> None:
        try:
            self.before_train()
            while self.iter < max_iter and self.stopped_reason is None:
                self.before_step()
                self.run_step()
                self.after_step()
                self.iter += 1
        finally:
            self._is_over = True
            self.keep_batch, self.batch = False, None

    def stop(self, reason: str) -> None:
        """End the run after the current step, with its final checkpoint and evaluation.

        In distributed training every process must call this at the same step.

        Args:
            reason: logged as "Stopping training: {reason}".
        """
        if self.stopped_reason is None:
            self.stopped_reason = reason
            logger.info("Stopping training: %s", reason)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done or `stop` was called, and nothing failed."""
        return not self._has_failed and (self.stopped_reason is not None or self.iter >= self.max_iter)

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Call all hooks, even if one of them fails; then raise the first error."""
        self.storage.iter = self.iter
        errors: list[Exception] = []
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                if errors:
                    logger.error("%s also failed:", type(hook).__name__, exc_info=error)
                errors.append(error)
        if errors:
            raise errors[0]

    def before_step(self) -> None:
        # Otherwise the storage counts by itself, and would lag behind after a skipped step.
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def seed_step(self) -> None:
        """Called before the first forward pass of a step, to seed random numbers. No-op by default."""

    def after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()
        self.keep_batch, self.batch = False, None

    def run_step(self) -> None:
        """Run one training step. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step()")

    def state_dict(self) -> dict:
        """Return ``{"iteration": ..., "hooks": {name: state}}``. A second hook of a class is "Name#1"."""
        # The number of the last step: `iter` is one more once the loop is over.
        state: dict[str, Any] = {"iteration": self.iter - 1 if self._is_over else self.iter}
        hooks = {name: hook.state_dict() for name, hook in self._named_hooks()}
        hooks = {name: hook_state for name, hook_state in hooks.items() if hook_state}
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Restore the result of `state_dict`. States of hooks that are not registered are skipped."""
        self.iter = state_dict["iteration"]
        self._is_over = False
        hooks = dict(self._named_hooks())
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                cast(Any, hooks[name]).load_state_dict(state)
            elif comm.is_main_process():  # some hooks run in this process only
                logger.warning("The checkpoint has a state for the hook '%s', which is not registered", name)

    def _named_hooks(self) -> list[tuple[str, HookBase]]:
        """Return the hooks with their names in checkpoints."""
        named, counts = [], Counter()  # type: ignore[var-annotated]
        for hook in self._hooks:
            name = type(hook).__qualname__
            named.append((f"{name}#{counts[name]}" if counts[name] else name, hook))
            counts[name] += 1
        return named


class SimpleTrainer(TrainerBase):
    """The standard training step: one batch, one forward and backward pass, one optimizer update.

    The model must return a dict of scalar losses, which are summed, or one scalar. For anything else,
    subclass `TrainerBase` and define ``run_step``.

    Attributes:
        skipped: number of most recent steps skipped in a row, see `skip_non_finite`.
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
    ):
        """
        Args:
            model: takes a batch of the data loader and returns losses.
            data_loader: an endless iterable of batches.
            optimizer: the optimizer of the model's parameters.
            gather_metric_period: number of steps between two readings of the losses. Each reading waits for
                the device and, in distributed training, for the other processes. A NaN is detected only then.
            zero_grad_before_forward: clear the gradients before the forward pass instead of after it.
            async_write_metrics: read the losses in another thread. A NaN is detected one step later.
            accum_steps: number of batches whose gradients are averaged for one update. Their losses are
                averaged too.
            skip_non_finite: number of steps in a row that may be skipped, with a warning, because their loss
                is infinite or NaN in some process; 0 raises at the first one.
            advice: text to add to the error message about such losses.

        Raises:
            ValueError: if `accum_steps` is less than 1, or `skip_non_finite` is combined with late readings.
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
        self.skipped = 0
        self._data_loader_iter_obj = None
        self._losses = LossRecord()
        self._pending_write: concurrent.futures.Future | None = None
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError(
                f"{type(self).__name__}: the model is in eval mode, because model.eval() was called without "
                "model.train() after it"
            )
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        data_time, losses_of_passes = 0.0, []
        for k in range(self.accum_steps):
            start = time.perf_counter()
            data = self._next_batch()
            data_time += time.perf_counter() - start
            if self._loop.keep_batch:
                self._loop.batch = data
            if k == 0:  # after loading, because the start of the data loader draws random numbers
                self._loop.seed_step()
            with self._gradient_sync(is_last=k == self.accum_steps - 1):
                loss_dict = self._forward_or_skip(data)
                if loss_dict is None:
                    return
                losses: Any = sum(loss_dict.values())
                if k == 0 and not self.zero_grad_before_forward:
                    self.optimizer.zero_grad()
                self._backward(losses if self.accum_steps == 1 else losses / self.accum_steps)
            self._losses.add(self.iter, loss_dict, data)
            losses_of_passes.append(loss_dict)
        self._loop.after_backward()
        try:
            self._report(_mean_losses(losses_of_passes), data_time)
        except FloatingPointError as e:
            if not self._may_skip(str(e)):
                raise
            return
        # After the report, so that a NaN loss never updates the parameters.
        self._update()
        self.skipped = 0

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Average gradients over the processes only in the last backward pass of a step."""
        if self.accum_steps == 1:
            return contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):  # a model of fully_shard
            self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def _next_batch(self) -> Any:
        try:
            return next(self._data_loader_iter)
        except StopIteration:
            raise RuntimeError(
                f"The data loader ended at iteration {self.iter}, but training needs an endless one "
                "(build_detection_train_loader uses an endless sampler)"
            ) from None
        except (ConnectionError, EOFError):
            # Perhaps a loader process was killed: give PyTorch's signal handler time to report it.
            time.sleep(1.0)
            raise

    def _forward(self, data: Any) -> dict[str, torch.Tensor]:
        """Return the losses of a batch."""
        loss_dict = self.model(data)
        return {"total_loss": loss_dict} if isinstance(loss_dict, torch.Tensor) else loss_dict

    def _backward(self, losses: torch.Tensor) -> None:
        losses.backward()

    def _update(self) -> None:
        self.optimizer.step()

    def _forward_or_skip(self, data: Any) -> dict[str, torch.Tensor] | None:
        """Return the losses, or None if the model's predictions are not finite and the step is skipped."""
        try:
            return self._forward(data)
        except FloatingPointError as e:
            message = self._losses.explain_failed_forward(e, self.iter, data, self.optimizer, self.advice)
            if comm.get_world_size() == 1 and self._may_skip(message):
                return None
            raise FloatingPointError(message) from e

    def _may_skip(self, reason: str) -> bool:
        """Count and log a skipped step; return False if there have been too many."""
        self.skipped += 1
        if self.skipped > self.skip_non_finite:
            return False
        logger.warning(
            "Skipping the step (%d of at most %d in a row).\n%s", self.skipped, self.skip_non_finite, reason
        )
        self._losses.forget_until(self.iter)
        return True

    @property
    def _data_loader_iter(self):
        # Created at the first use, so that workers start only when there is training to do.
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Any]) -> None:
        """Replace the data loader. The workers of the old one end before the new one is built."""
        self._data_loader_iter_obj = None
        del self.data_loader
        self.data_loader = data_loader_builder()

    def _report(self, loss_dict: Mapping[str, torch.Tensor], data_time: float) -> None:
        """Write the metrics, in this thread or in another one."""
        if not self.async_write_metrics:
            self._write_metrics(loss_dict, data_time)
            return
        self._finish_pending_write()
        if self._executor is None:
            # One thread, so that the metrics are written in the order of the steps.
            self._executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending_write = self._executor.submit(self._write_metrics, loss_dict, data_time, iter=self.iter)

    def _finish_pending_write(self) -> None:
        """Wait for the other thread and raise its error, if any."""
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
        """Write the metrics every `gather_metric_period` steps.

        Raises:
            FloatingPointError: if a loss is not finite. The message has the losses and the images.
        """
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period != 0:
            return
        try:
            SimpleTrainer.write_metrics(loss_dict, data_time, iteration, prefix)
        except FloatingPointError as e:
            message = self._losses.explain(
                e, iteration, self.gather_metric_period, self.optimizer, self.advice
            )
            raise FloatingPointError(message) from None
        self._losses.forget_until(iteration)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Average the losses over the processes and store them in the active storage.

        Args:
            loss_dict: scalar losses by name.
            data_time: seconds that this process waited for data; the longest wait of all processes is stored.
            cur_iter: number of the step.
            prefix: prefix of the name "total_loss".

        Raises:
            FloatingPointError: in every process, if the total loss is not finite in any of them.
        """
        gathered = comm.all_gather((losses_to_floats(loss_dict), data_time))
        per_process = [losses for losses, _ in gathered]
        means = {k: sum(losses[k] for losses in per_process) / len(per_process) for k in per_process[0]}
        total = sum(means.values())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"The loss became infinite or NaN at iteration {cur_iter}: {format_losses(means)}"
            )
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("data_time", max(wait for _, wait in gathered), cur_iter=cur_iter)
            storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
            if len(means) > 1:
                storage.put_scalars(cur_iter=cur_iter, **means)

    def state_dict(self) -> dict:
        """Return the state of the loop, the optimizer and, if it has one, the data loader."""
        state = {**super().state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.skipped:
            state["skipped"] = self.skipped
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        check_optimizer_state(self.optimizer, state_dict["optimizer"])
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        shard_optimizer_state(self.optimizer)
        self.skipped = state_dict.get("skipped", 0)
        if "data_loader" in state_dict and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state_dict["data_loader"])

    def after_train(self) -> None:
        # Before the hooks, because the writers need the metrics of the last step.
        try:
            self._finish_pending_write()
        finally:
            super().after_train()
            if self._executor is not None:
                self._executor.shutdown(wait=True)
                self._executor = None


class AMPTrainer(SimpleTrainer):
    """`SimpleTrainer` with autocast and, for float16, scaled gradients.

    The CPU has few float16 kernels, so bfloat16 is used instead there.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
        **kwargs,
    ):
        """
        Args:
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward,
                async_write_metrics, **kwargs: as in `SimpleTrainer`.
            grad_scaler: scales the loss so that small gradients do not underflow. None creates one, which is
                disabled unless `precision` is float16.
            precision: torch.float16 or torch.bfloat16.
            log_grad_scaler: store the scale as "[metric]grad_scaler".

        Raises:
            ValueError: if `precision` is not supported, or the model uses multiple devices in one process.
        """
        if precision not in (torch.float16, torch.bfloat16):
            raise ValueError(f"precision must be torch.float16 or torch.bfloat16, got {precision}")
        if isinstance(model, DataParallel) or len(getattr(model, "device_ids", None) or []) > 1:
            raise ValueError("AMPTrainer supports one device per process; use detlib.engine.launch for more")
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            zero_grad_before_forward,
            async_write_metrics,
            **kwargs,
        )
        self.device_type = next(model.parameters()).device.type
        if self.device_type == "cpu" and precision == torch.float16:
            logger.info("Mixed precision on the CPU uses bfloat16 instead of float16")
            precision = torch.bfloat16
        self.precision = precision
        if grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)
        self.grad_scaler = grad_scaler
        zero_fused_momentum(optimizer)
        self.log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        super().run_step()
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _forward(self, data) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision):
            return super()._forward(data)

    def _backward(self, losses: torch.Tensor) -> None:
        self.grad_scaler.scale(losses).backward()

    def _update(self) -> None:
        # Explicitly, because clipping needs unscaled gradients even if the optimizer unscales them itself.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # A checkpoint of a full-precision run has none.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _mean_losses(passes: Sequence[Mapping[str, torch.Tensor]]) -> Mapping[str, Any]:
    """Return the mean losses over the passes of a step. A loss missing in a pass counts as 0."""
    if len(passes) == 1:
        return passes[0]
    names = dict.fromkeys(name for losses in passes for name in losses)
    return {k: sum(losses[k].detach() for losses in passes if k in losses) / len(passes) for k in names}
