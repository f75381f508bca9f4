"""Like the recipe with MViTv2-T, but with an MViTv2-B pretrained on ImageNet-21k."""

from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_t_3x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = mvitv2("B")
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_B_in21k.pyth"
