"""Mask R-CNN with an MViTv2-T, trained with the 3x schedule."""

from ..common.coco_schedule import steps
from ..common.data.constants import constants
from ..common.models.edits import use_rgb
from ..common.models.mask_rcnn_fpn import model
from ..common.models.mvitv2 import mvitv2
from ..common.optim import AdamW as optimizer
from ..common.train import train
from .common.coco_loader import dataloader

use_rgb(model)
model.backbone.bottom_up = mvitv2("T")
dataloader.train.total_batch_size = 64

train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_T_in1k.pyth"
train.max_iter = 67500  # 3x with a batch size of 64
lr_multiplier = steps([52500, 62500, 67500], train.max_iter, warmup_length=250 / train.max_iter)

optimizer.params.overrides = {
    "pos_embed": {"weight_decay": 0.0},
    "rel_pos_h": {"weight_decay": 0.0},
    "rel_pos_w": {"weight_decay": 0.0},
}
optimizer.lr = 1.6e-4
