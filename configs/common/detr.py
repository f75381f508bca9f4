"""Training settings, optimizer and schedules of DETR-like models."""

import functools

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detlib.config import LazyCall as L
from detlib.modeling.backbone import get_backbone_lr_factor
from detlib.solver import WarmupParamScheduler

from .optim import AdamW as optimizer
from .train import train

train.update(
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    clip_grad=dict(enabled=True, params=dict(max_norm=0.1, norm_type=2)),
    seed=-1,
    # 20 steps and two evaluations, to check that a recipe runs.
    fast_dev_run=dict(enabled=False),
    wandb=dict(enabled=False, params=dict(dir="./wandb_output", project="detlib", name="detlib_experiment")),
    # The averaged weights, if enabled, are always evaluated and are on the device of the model. The last two
    # entries have no effect.
    model_ema=dict(enabled=False, decay=0.999, device="", use_ema_weights_for_eval_only=False),
    device="auto",
)

optimizer.update(lr=1e-4, weight_decay=1e-4)
# The pretrained backbone has a tenth of the learning rate.
optimizer.params.lr_factor_func = functools.partial(get_backbone_lr_factor, factor=0.1)


def decay_at(milestone, end):
    """Return a schedule with one decay by 10 and no warmup."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[milestone, end]),
        warmup_length=0.0,
        warmup_method="linear",
        warmup_factor=0.001,
    )


# An epoch of COCO has 7500 steps with a batch size of 16. For the last schedule, it has 1848 with a batch
# size of 64.
lr_multiplier_12ep = decay_at(82500, 90000)
lr_multiplier_24ep = decay_at(150000, 180000)
lr_multiplier_50ep = decay_at(300000, 375000)
lr_multiplier_300ep = decay_at(369600, 554400)
