"""Like the recipe with ViT-B, but with a ViT-H, and trained for 75 epochs."""

from ..common.coco_schedule import steps
from .cascade_mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, train
from .common.vit import use_vit_huge

use_vit_huge(model, optimizer, train)
train.max_iter = 138281
lr_multiplier = steps([122916, 133159], train.max_iter, warmup_length=250 / 184375)
