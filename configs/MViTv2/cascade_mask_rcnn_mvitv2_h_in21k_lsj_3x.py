"""Like the recipe with MViTv2-T, but with an MViTv2-H and large-scale jitter."""

from ..common.models.mvitv2 import mvitv2
from .cascade_mask_rcnn_mvitv2_t_3x import lr_multiplier, model, optimizer, train
from .common.coco_loader_lsj import dataloader

model.backbone.bottom_up = mvitv2("H")
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_H_in21k.pyth"
