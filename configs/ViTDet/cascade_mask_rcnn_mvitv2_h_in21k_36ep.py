"""Like the recipe with MViTv2-B, but with an MViTv2-H, and trained for 36 epochs."""

from ..common.coco_schedule import steps
from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_b_in21k_100ep import dataloader, model, optimizer, train

model.backbone.bottom_up = mvitv2("H")
optimizer.lr = 1.6e-4
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_H_in21k.pyth"
train.max_iter = 67500
lr_multiplier = steps([52500, 62500, 67500], train.max_iter, warmup_length=250 / train.max_iter)
