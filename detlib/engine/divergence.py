"""Detection of infinite or NaN losses and parameters, and error messages that explain them.

A trainer reads its losses only when it gathers the metrics, because each reading synchronizes with the
device. Until then `LossRecord` keeps the losses of the last steps on the device, so that the error message
can name the first step with a bad loss, and the images of that step.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from detlib.checkpoint.sharded import is_shard, is_sharded
from detlib.utils import comm
from detlib.utils.events import get_event_storage

__all__ = [
    "LossRecord",
    "LossStep",
    "find_non_finite_parameters",
    "format_losses",
    "learning_rate_advice",
    "length_advice",
    "losses_to_floats",
    "zero_fused_momentum",
]

_MAX_IMAGES = 64

# The longest published schedules have 100 passes over COCO. A run on a few images may need more.
_MAX_PASSES = 1000
_FITTING_PASSES = 100
_MIN_ITERATIONS = 1000

_ADVICE = (
    "The parameters were not saved after this. Common causes: a learning rate too high for the batch size, "
    "too short a warm-up, or broken annotations in these images."
)


@dataclass
class LossStep:
    """The losses and images of one step."""

    iteration: int
    losses: Mapping[str, Any]
    """Detached scalars by name, on their device."""
    images: list[str]
    """File names of the batch."""


class LossRecord:
    """The losses and images of the steps since the losses were last read."""

    def __init__(self) -> None:
        self._steps: deque[LossStep] = deque()

    def add(self, iteration: int, loss_dict: Mapping[str, Any], data: Any) -> None:
        """Record one step.

        Args:
            iteration: number of the step.
            loss_dict: losses of the step by name.
            data: batch of the step.
        """
        losses = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in loss_dict.items()}
        self._steps.append(LossStep(iteration, losses, _image_names(data)))

    def forget_until(self, iteration: int) -> None:
        """Drop the steps up to `iteration`: their losses were finite, or they were skipped."""
        # Another thread may be adding steps at the other end.
        while self._steps and self._steps[0].iteration <= iteration:
            self._steps.popleft()

    def first_non_finite(self) -> LossStep | None:
        """Return the first step with an infinite or NaN loss, with its losses as floats."""
        for step in list(self._steps):
            losses = losses_to_floats(step.losses)
            if not all(math.isfinite(value) for value in losses.values()):
                return LossStep(step.iteration, losses, step.images)
        return None

    def explain(
        self,
        error: FloatingPointError,
        iteration: int,
        period: int,
        optimizer: torch.optim.Optimizer,
        advice: str,
    ) -> str:
        """Return the error message for losses that are not finite. All processes call this together.

        Args:
            error: the error raised when the losses were read.
            iteration: the iteration at which they were read.
            period: number of iterations between two readings.
            optimizer: the optimizer, whose learning rates are reported.
            advice: a sentence to add, or "".
        """
        lines = [str(error)]
        firsts = comm.all_gather(self.first_non_finite())
        bad = [(rank, step) for rank, step in enumerate(firsts) if step]
        if bad and period > 1:
            first = min(step.iteration for _, step in bad)
            lines.append(
                f"The first one was at iteration {first} (losses are read every {period} iterations; this "
                f"reading covers {iteration + 1 - period} to {iteration})."
            )
            bad = [(rank, step) for rank, step in bad if step.iteration == first]
        lines.append(_learning_rates(optimizer))
        for rank, step in bad:
            where = f"Process {rank}" if len(firsts) > 1 else "Losses"
            lines += [f"{where}: {format_losses(step.losses)}", _list_images(step.images)]
        return "\n".join(filter(None, [*lines, advice, _ADVICE]))

    def explain_failed_forward(
        self,
        error: FloatingPointError,
        iteration: int,
        data: Any,
        optimizer: torch.optim.Optimizer,
        advice: str,
    ) -> str:
        """Return the error message for a model that raised because its predictions are infinite or NaN.

        Args:
            error: the model's error.
            iteration: number of the step.
            data: batch of the step.
            optimizer: the optimizer, whose learning rates are reported.
            advice: a sentence to add, or "".
        """
        lines = [f"At iteration {iteration}: {error}", _learning_rates(optimizer)]
        latest = get_event_storage().latest()
        losses = {name: value for name, (value, _) in latest.items() if "loss" in name}
        if losses:
            when = max(iteration for name, (_, iteration) in latest.items() if name in losses)
            lines.append(f"Losses at iteration {when}: {format_losses(losses)}")
        lines.append(_list_images(_image_names(data)))
        return "\n".join(filter(None, [*lines, advice, _ADVICE]))


def _image_names(data: Any) -> list[str]:
    """Return the file names, or else image ids, of a batch in the standard format; [] for other batches."""
    if not isinstance(data, list | tuple):
        return []
    samples = [d for d in data if isinstance(d, Mapping)]
    names = [str(d.get("file_name", d.get("image_id", ""))) for d in samples]
    return [name for name in names if name][:_MAX_IMAGES]


def losses_to_floats(loss_dict: Mapping[str, Any]) -> dict[str, float]:
    """Copy losses from their device in a single transfer.

    Args:
        loss_dict: tensors of one element, or numbers, by name.
    """
    tensors = {k: v for k, v in loss_dict.items() if isinstance(v, torch.Tensor)}
    values = {k: float(v) for k, v in loss_dict.items() if k not in tensors}
    if tensors:
        stacked = torch.stack([v.detach().reshape(()).to(torch.float32) for v in tensors.values()])
        values.update(zip(tensors, stacked.tolist()))
    return {name: values[name] for name in loss_dict}


def format_losses(losses: Mapping[str, float]) -> str:
    """Format losses as "loss_a=0.5, loss_b=nan"."""
    return ", ".join(f"{name}={value:.6g}" for name, value in losses.items())


def _list_images(names: list[str]) -> str:
    return f"Images: {', '.join(names) or 'the batch has no file names'}"


def _learning_rates(optimizer: torch.optim.Optimizer) -> str:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    return f"Learning rate: {', '.join(f'{rate:.6g}' for rate in rates)}"


def learning_rate_advice(optimizer: torch.optim.Optimizer, images_per_step: int, lr_per_image: float) -> str:
    """Suggest a learning rate if the one in use is too high for the batch size.

    This is the linear rule of "Accurate, Large Minibatch SGD" (https://arxiv.org/abs/1706.02677). It applies
    to SGD only: the learning rates of other optimizers do not follow it.

    Args:
        optimizer: the optimizer.
        images_per_step: number of images of one update over all processes; 0 if unknown.
        lr_per_image: learning rate divided by batch size in the model's published schedules.

    Returns:
        A sentence, or "".
    """
    if not isinstance(optimizer, torch.optim.SGD) or images_per_step < 1:
        return ""
    rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    fitting = lr_per_image * images_per_step
    if rate <= 1.5 * fitting:
        return ""
    return (
        f"The learning rate {rate:g} is high for {images_per_step} images per step: the published schedules "
        f"use {lr_per_image * 16:g} for 16, which scales to {fitting:g} here (SOLVER.BASE_LR)."
    )


def length_advice(max_iter: int, images_per_step: int, images_per_epoch: int | None) -> str:
    """Suggest a number of iterations if a run passes over a small dataset very often.

    Args:
        max_iter: number of steps of the run.
        images_per_step: number of images of one update over all processes; 0 if unknown.
        images_per_epoch: number of training images; None if unknown.

    Returns:
        A sentence, or "".
    """
    if not images_per_epoch or images_per_step < 1:
        return ""
    passes = max_iter * images_per_step / images_per_epoch
    if passes <= _MAX_PASSES:
        return ""
    fitting = max(_MIN_ITERATIONS, -(-_FITTING_PASSES * images_per_epoch // images_per_step))
    if fitting >= max_iter:
        return ""
    return (
        f"{max_iter} iterations of {images_per_step} images are {passes:.0f} passes over the "
        f"{images_per_epoch} training images. For so few images about {fitting} iterations are enough: "
        f"SOLVER.MAX_ITER (train.max_iter) {fitting}, with STEPS and WARMUP_ITERS (lr_multiplier) scaled, "
        f"or SOLVER.MAX_EPOCHS {fitting * images_per_step / images_per_epoch:.0f}, which scales them."
    )


def find_non_finite_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that contain infinite or NaN values."""
    named = [
        # Each process checks its own shard of a sharded parameter.
        (name, cast(Any, param).to_local() if is_shard(param) else param)
        for name, param in model.named_parameters()
        if param.is_floating_point()
    ]
    named = [(name, param) for name, param in named if param.numel()]
    bad: list[str] = []
    if named:
        # A single transfer for the entire model.
        finite = torch.stack([torch.isfinite(p.detach()).all().to(named[0][1].device) for _, p in named])
        bad = [name for (name, _), good in zip(named, finite.tolist()) if not good]
    if is_sharded(model):
        bad = sorted(set().union(*comm.all_gather(bad)))
    return bad


def zero_fused_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialize the momentum buffers of a fused SGD with zeros before the first step.

    PyTorch allocates them uninitialized in the first step, and does not write them if the gradients overflow,
    which is common in the first steps. The next step would then produce NaN.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"]:
            for param in group["params"]:
                state = optimizer.state[param]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param)
