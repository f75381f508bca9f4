"""Finding and reporting losses that are infinite or not a number.

A trainer looks at its losses only when it gathers the metrics, as every look waits for the device. Until
then `LossRecord` keeps the last steps' losses where they are, so that the report names the step at which the
trouble began and the pictures of that step.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detlib.checkpoint.sharded import is_shard, is_sharded
from detlib.utils import comm

__all__ = [
    "LossRecord",
    "LossStep",
    "find_non_finite_parameters",
    "learning_rate_advice",
    "losses_to_floats",
    "picture_names",
]

_MAX_FILES = 64


@dataclass
class LossStep:
    """What is kept of one step."""

    iteration: int
    losses: Mapping[str, Any]
    """Detached scalars by name, on their device."""
    files: list[str]
    """The pictures of the batch."""


class LossRecord:
    """The losses and pictures of the steps since the last look."""

    def __init__(self) -> None:
        self._steps: deque[LossStep] = deque()

    def add(self, iteration: int, loss_dict: Mapping[str, Any], data: Any) -> None:
        """Remembers one step.

        Args:
            iteration: its number.
            loss_dict: its losses.
            data: the batch that it was made from.
        """
        losses = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in loss_dict.items()}
        self._steps.append(LossStep(iteration, losses, picture_names(data)))

    def forget_until(self, iteration: int) -> None:
        """Forgets the steps up to `iteration`, which were found to be in order."""
        # Another thread may be adding steps at the other end.
        while self._steps and self._steps[0].iteration <= iteration:
            self._steps.popleft()

    def first_non_finite(self) -> LossStep | None:
        """The first step with a loss that is no finite number, with its losses as floats."""
        for step in list(self._steps):
            losses = losses_to_floats(step.losses)
            if not all(math.isfinite(value) for value in losses.values()):
                return LossStep(step.iteration, losses, step.files)
        return None


def picture_names(data: Any) -> list[str]:
    """File names, or else image ids, of a batch in the standard format; [] for other batches."""
    if not isinstance(data, list | tuple):
        return []
    samples = [d for d in data if isinstance(d, Mapping)]
    names = [str(d.get("file_name", d.get("image_id", ""))) for d in samples]
    return [name for name in names if name][:_MAX_FILES]


def losses_to_floats(loss_dict: Mapping[str, Any]) -> dict[str, float]:
    """Fetches scalars from their device, all in one go.

    Args:
        loss_dict: tensors of one element, or numbers, by name.
    """
    tensors = {k: v for k, v in loss_dict.items() if isinstance(v, torch.Tensor)}
    values = {k: float(v) for k, v in loss_dict.items() if k not in tensors}
    if tensors:
        stacked = torch.stack([v.detach().reshape(()).to(torch.float32) for v in tensors.values()])
        values.update(zip(tensors, stacked.tolist()))
    return {name: values[name] for name in loss_dict}


def learning_rate_advice(
    optimizer: torch.optim.Optimizer, images_per_step: int, rate_per_image: float
) -> str:
    """Tells the learning rate that fits, if the one in use is too high for so small a batch.

    By the linear rule of "Accurate, Large Minibatch SGD" (https://arxiv.org/abs/1706.02677); nothing is said
    of other optimizers than SGD, whose rates do not follow it.

    Args:
        optimizer: the optimizer.
        images_per_step: pictures of one update over all processes, 0 if that is not known.
        rate_per_image: learning rate over batch size of the published schedules.

    Returns:
        A sentence, or "".
    """
    if not isinstance(optimizer, torch.optim.SGD) or images_per_step < 1:
        return ""
    rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    fitting = rate_per_image * images_per_step
    if rate <= 1.5 * fitting:
        return ""
    return (
        f"The learning rate {rate:g} is high for {images_per_step} pictures a step: the published schedules "
        f"have {rate_per_image * 16:g} for 16, which makes {fitting:g} here (SOLVER.BASE_LR)."
    )


def find_non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold an infinite value or NaN."""
    named = [
        # Each process looks at its own part of a parameter that is shared out.
        (name, param.to_local() if is_shard(param) else param)
        for name, param in model.named_parameters()
        if param.is_floating_point()
    ]
    named = [(name, param) for name, param in named if param.numel()]
    bad: list[str] = []
    if named:
        # One transfer for the whole model.
        finite = torch.stack([torch.isfinite(p.detach()).all().to(named[0][1].device) for _, p in named])
        bad = [name for (name, _), good in zip(named, finite.tolist()) if not good]
    if is_sharded(model):
        bad = sorted(set().union(*comm.all_gather(bad)))
    return bad
