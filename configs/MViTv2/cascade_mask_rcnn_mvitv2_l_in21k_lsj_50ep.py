"""Like the recipe with MViTv2-T, but with an MViTv2-L, trained for 50 epochs with large-scale jitter."""

from ..common.coco_schedule import steps
from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_t_3x import model, optimizer, train
from .common.coco_loader_lsj import dataloader

model.backbone.bottom_up = mvitv2("L")
optimizer.lr = 1e-4
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_L_in21k.pyth"
train.max_iter = 92187
lr_multiplier = steps([81944, 88773], train.max_iter, warmup_length=250 / train.max_iter)
