"""Learning-rate schedules as multipliers over the progress of training.

A `fvcore.common.param_scheduler.ParamScheduler` is a pure function of the progress ``where`` in [0, 1).
`WarmupParamScheduler` puts a warm-up before one, and `LRMultiplier` turns one into a PyTorch scheduler
that is stepped once an iteration.
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

# Some schedules of fvcore have no value at progress 1, for which PyTorch asks after the last step.
_END = 1.0 - 2 * ParamScheduler.WHERE_EPSILON


class WarmupParamScheduler(CompositeParamScheduler):
    """A schedule that begins with a warm-up phase."""

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
            scheduler: the schedule that follows the warm-up.
            warmup_factor: the warm-up starts at ``warmup_factor * scheduler(0)``.
            warmup_length: share of the whole training, in [0, 1], that the warm-up takes.
            warmup_method: "linear" climbs to the value that `scheduler` has where the warm-up ends;
                "constant" stays at the start value.
            rescale_interval: False lets the warm-up cover the head of `scheduler`, whose steps stay where
                they were; True squeezes the whole of `scheduler` into what is left after the warm-up.

        Raises:
            ValueError: if `warmup_method` or `warmup_length` is out of range.
        """
        if not 0.0 <= warmup_length <= 1.0:
            raise ValueError(f"warmup_length is a share of the training in [0, 1], got {warmup_length}")
        start = warmup_factor * scheduler(0.0)
        end = scheduler(0.0 if rescale_interval else _before_end(warmup_length))
        if warmup_method == "linear":
            warmup: ParamScheduler = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"warmup_method must be one of {WARMUP_METHODS}, got {warmup_method!r}")
        if warmup_length == 1.0:
            # A second part of no length could not be rescaled: the warm-up is all there is.
            super().__init__([warmup], lengths=[1.0], interval_scaling=["rescaled"])
            return
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1.0 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Sets each group's learning rate to its initial one times ``multiplier(iteration / max_iter)``.

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
            optimizer: as for every PyTorch scheduler.
            multiplier: the schedule, a function of the progress in [0, 1).
            max_iter: number of iterations in the whole training.
            last_iter: the last iteration done, -1 for a fresh start.

        Raises:
            TypeError: if `multiplier` is not a ParamScheduler.
        """
        if not isinstance(multiplier, ParamScheduler):
            raise TypeError(
                f"multiplier must be a fvcore.common.param_scheduler.ParamScheduler, got {type(multiplier)}"
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """Only the position and the base rates: the schedule itself comes from the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = self._multiplier(_before_end(self.last_epoch / self._max_iter))
        return [base_lr * factor for base_lr in self.base_lrs]


class WarmupMultiStepLR(LRScheduler):
    """Step decay at given iterations, times a warm-up. New code composes `LRMultiplier` instead."""

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
    """Half a cosine down to zero, times a warm-up. New code composes `LRMultiplier` instead."""

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
    """The factor on the learning rate at `iteration`: 1.0 once the warm-up is over."""
    if method not in WARMUP_METHODS:
        raise ValueError(f"warmup_method must be one of {WARMUP_METHODS}, got {method!r}")
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    alpha = iteration / warmup_iters
    return warmup_factor * (1.0 - alpha) + alpha
