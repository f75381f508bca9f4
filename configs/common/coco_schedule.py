"""Learning rate schedules. "1x" is about 12 epochs of COCO with a batch size of 16."""

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detlib.config import LazyCall as L
from detlib.solver import WarmupParamScheduler


def steps(milestones, max_iter, warmup_length, warmup_factor=0.001):
    """Return a schedule with a decay by 10 at two milestones, after a linear warmup.

    Args:
        milestones: steps of the decays, and optionally the last step.
        max_iter: number of steps of the run.
        warmup_length: length of the warmup, as a fraction of the run.
        warmup_factor: learning rate factor at the start of the warmup.
    """
    end = {} if milestones[-1] == max_iter else {"num_updates": max_iter}
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=milestones, **end),
        warmup_length=warmup_length,
        warmup_factor=warmup_factor,
    )


def schedule_of_length(times):
    """Return the schedule `times` as long as 1x. From 3x on, decays are at a fixed distance from the end."""
    end = 90000 * times
    # Milestones are relative to the last one, so those of 1x also apply to 2x.
    milestones = [60000, 80000, 90000] if times <= 2 else [end - 60000, end - 20000, end]
    schedule = steps(milestones, milestones[-1], warmup_length=1000 / end)
    schedule.warmup_method = "linear"
    return schedule


lr_multiplier_1x = schedule_of_length(1)
lr_multiplier_2x = schedule_of_length(2)
lr_multiplier_3x = schedule_of_length(3)
lr_multiplier_6x = schedule_of_length(6)
lr_multiplier_9x = schedule_of_length(9)
