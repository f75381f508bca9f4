"""Cascade Mask R-CNN with an MViTv2-B pretrained on ImageNet-21k, trained for 100 epochs."""

from ..common.coco_schedule import steps
from ..common.data.constants import constants
from ..common.models.cascade_rcnn import model
from ..common.models.edits import deepen_heads, use_rgb
from ..common.models.mvitv2 import mvitv2
from ..common.optim import AdamW as optimizer
from ..common.train import train
from .common.coco_loader_lsj import dataloader

use_rgb(model)
deepen_heads(model, norm="LN")
model.backbone.bottom_up = mvitv2("B")
model.backbone.norm = "LN"
model.backbone.square_pad = 1024

train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_B_in21k.pyth"
train.max_iter = 184375
lr_multiplier = steps([163889, 177546], train.max_iter, warmup_length=250 / train.max_iter)

optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
optimizer.lr = 8e-5
