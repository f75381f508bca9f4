"""Learning rate schedules as multipliers over the training progress.

A `fvcore.common.param_scheduler.ParamScheduler` is a pure function of the progress ``where`` in [0, 1).
`WarmupParamScheduler` adds a warmup to it, and `LRMultiplier` turns it into a PyTorch scheduler that is
stepped once per iteration.
"""

import math
from bisect import bisect_right

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "CompositeParamScheduler",
    "ConstantParamScheduler",
    "LRMultiplier",
    "LRScheduler",
    "LinearParamScheduler",
    "ParamScheduler",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WarmupParamScheduler",
]

WARMUP_METHODS = ("linear", "constant")

# Some fvcore schedules are undefined at progress 1, which PyTorch evaluates after the last step.
_END = 1.0 - 2 * ParamScheduler.WHERE_EPSILON


class WarmupParamScheduler(CompositeParamScheduler):
    """A schedule that begins with a warmup phase."""

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        """
        Args:
            scheduler: the schedule that follows the warmup.
            warmup_factor: the warmup starts at ``warmup_factor * scheduler(0)``.
            warmup_length: length of the warmup as a fraction of the training run, in [0, 1].
            warmup_method: "linear" increases to the value of `scheduler` at the end of the warmup, "constant"
                stays at the start value.
            rescale_interval: if False, the warmup replaces the beginning of `scheduler`, whose steps are
                unchanged. If True, the entire `scheduler` is rescaled to the interval after the warmup.

        Raises:
            ValueError: `warmup_method` is unknown, or `warmup_length` is out of range.
        """
        if not 0.0 <= warmup_length <= 1.0:
            raise ValueError(f"warmup_length must be in [0, 1], got {warmup_length}")
        start = warmup_factor * scheduler(0.0)
        end = scheduler(0.0 if rescale_interval else _before_end(warmup_length))
        if warmup_method == "linear":
            warmup: ParamScheduler = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"warmup_method must be one of {WARMUP_METHODS}, got {warmup_method!r}")
        if warmup_length == 1.0:
            # A second part of zero length cannot be rescaled, so there is only the warmup.
            super().__init__([warmup], lengths=[1.0], interval_scaling=["rescaled"])
            return
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1.0 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Scheduler that multiplies each group's initial learning rate by ``multiplier(iteration / max_iter)``.

    Example:
        >>> schedule = MultiStepParamScheduler([1, 0.1, 0.01], milestones=[60000, 80000], num_updates=90000)
        >>> LRMultiplier(optimizer, WarmupParamScheduler(schedule, 0.001, 100 / 90000), max_iter=90000)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ):
        """
        Args:
            optimizer: the optimizer.
            multiplier: the schedule, a function of the progress in [0, 1).
            max_iter: total number of iterations of the training run.
            last_iter: index of the last completed iteration; -1 to start from the beginning.

        Raises:
            TypeError: `multiplier` is not a ParamScheduler.
        """
        if not isinstance(multiplier, ParamScheduler):
            raise TypeError(
                f"multiplier must be an fvcore.common.param_scheduler.ParamScheduler, got {type(multiplier)}"
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """Return the position and the base learning rates. The schedule itself comes from the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = self._multiplier(_before_end(self.last_epoch / self._max_iter))
        return [base_lr * factor for base_lr in self.base_lrs]


class WarmupMultiStepLR(LRScheduler):
    """Step decay at given iterations with a warmup. Prefer `LRMultiplier` in new code."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: list[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ):
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be increasing, got {milestones}")
        self.milestones = milestones
        self.gamma = gamma
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        warmup = _warmup_multiplier(
            self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor
        )
        decay = self.gamma ** bisect_right(self.milestones, self.last_epoch)
        return [base_lr * warmup * decay for base_lr in self.base_lrs]


class WarmupCosineLR(LRScheduler):
    """Half-cosine decay to zero with a warmup. Prefer `LRMultiplier` in new code."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ):
        self.max_iters = max_iters
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        warmup = _warmup_multiplier(
            self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor
        )
        decay = 0.5 * (1.0 + math.cos(math.pi * self.last_epoch / self.max_iters))
        return [base_lr * warmup * decay for base_lr in self.base_lrs]


def _before_end(progress: float) -> float:
    return progress if progress < 1.0 else _END


def _warmup_multiplier(method: str, iteration: int, warmup_iters: int, warmup_factor: float) -> float:
    """Return the learning rate factor at `iteration`, which is 1.0 after the warmup."""
    if method not in WARMUP_METHODS:
        raise ValueError(f"warmup_method must be one of {WARMUP_METHODS}, got {method!r}")
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    alpha = iteration / warmup_iters
    return warmup_factor * (1.0 - alpha) + alpha
