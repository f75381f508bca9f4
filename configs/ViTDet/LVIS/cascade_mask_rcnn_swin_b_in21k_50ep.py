"""Cascade Mask R-CNN with a Swin-B on LVIS v1, trained for 50 epochs."""

from ..cascade_mask_rcnn_swin_b_in21k_50ep import dataloader, model, optimizer, train
from ..common.lvis import schedule_50ep, use_lvis

use_lvis(dataloader, model)
lr_multiplier = schedule_50ep(train)
optimizer.lr = 1e-4
model.backbone.bottom_up.drop_path_rate = 0.3
