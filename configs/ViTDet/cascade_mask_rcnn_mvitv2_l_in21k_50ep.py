"""Like the recipe with MViTv2-B, but with an MViTv2-L, and trained for 50 epochs."""

from ..common.coco_schedule import steps
from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_b_in21k_100ep import dataloader, model, optimizer, train

model.backbone.bottom_up = mvitv2("L")
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_L_in21k.pyth"
train.max_iter = 92187
lr_multiplier = steps([81944, 88773], train.max_iter, warmup_length=250 / 184375)
