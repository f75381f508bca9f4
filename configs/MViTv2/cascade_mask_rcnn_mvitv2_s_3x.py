"""Like the recipe with MViTv2-T, but with an MViTv2-S."""

from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_t_3x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = mvitv2("S")
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_S_in1k.pyth"
