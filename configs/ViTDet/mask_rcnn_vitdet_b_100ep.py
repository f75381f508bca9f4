"""ViTDet: Mask R-CNN with a ViT-B, trained for 100 epochs."""

from functools import partial

from detlib.modeling import get_vit_lr_decay_rate

from ..common.coco_schedule import steps
from ..common.models.mask_rcnn_vitdet import model
from ..common.optim import AdamW as optimizer
from ..common.train import train
from .common.coco_loader_lsj import dataloader

train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.max_iter = 184375  # 100 epochs of 118 000 images with a batch size of 64
lr_multiplier = steps([163889, 177546], train.max_iter, warmup_length=250 / train.max_iter)

optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
