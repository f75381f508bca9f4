"""What the recipes of DETR-like models share: settings of the run, optimizer, schedules."""

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
    # 20 steps and two evaluations, to see whether a recipe runs.
    fast_dev_run=dict(enabled=False),
    wandb=dict(enabled=False, params=dict(dir="./wandb_output", project="detlib", name="detlib_experiment")),
    # An average of the weights is evaluated whenever there is one, and lies where the model does; the last
    # two entries have no effect.
    model_ema=dict(enabled=False, decay=0.999, device="", use_ema_weights_for_eval_only=False),
    device="auto",
)

optimizer.update(lr=1e-4, weight_decay=1e-4)
# The backbone, which is pretrained, learns ten times slower.
optimizer.params.lr_factor_func = functools.partial(get_backbone_lr_factor, factor=0.1)


def decay_at(milestone, end):
    """One tenfold decay, no warm-up."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[milestone, end]),
        warmup_length=0.0,
        warmup_method="linear",
        warmup_factor=0.001,
    )


# Epochs of COCO, 7500 steps of 16 images each; those of the last one 1848 of 64.
lr_multiplier_12ep = decay_at(82500, 90000)
lr_multiplier_24ep = decay_at(150000, 180000)
lr_multiplier_50ep = decay_at(300000, 375000)
lr_multiplier_300ep = decay_at(369600, 554400)
