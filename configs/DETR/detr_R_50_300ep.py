"""DETR with a ResNet-50, trained for 300 epochs of COCO."""

import functools

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detlib.config import LazyCall as L
from detlib.modeling.backbone import get_backbone_lr_factor
from detlib.solver import WarmupParamScheduler

from ..common.data.coco import dataloader
from ..common.optim import AdamW as optimizer
from ..common.train import train
from .models.detr_r50 import model

train.update(
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    output_dir="./output/detr_r50_300ep",
    max_iter=554400,
    clip_grad=dict(enabled=False, params=dict(max_norm=0.1, norm_type=2)),
)
optimizer.update(lr=1e-4, weight_decay=1e-4)
optimizer.params.lr_factor_func = functools.partial(get_backbone_lr_factor, factor=0.1)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[369600, 554400]),
    warmup_length=0.0,
    warmup_method="linear",
    warmup_factor=0.001,
)
dataloader.train.mapper.update(image_format="RGB", use_instance_mask=False)
