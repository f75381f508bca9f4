"""Cascade Mask R-CNN with an MViTv2-H on LVIS v1, trained for 50 epochs."""

from ..cascade_mask_rcnn_mvitv2_h_in21k_36ep import dataloader, model, optimizer, train
from ..common.lvis import schedule_50ep, use_lvis

use_lvis(dataloader, model)
lr_multiplier = schedule_50ep(train)
optimizer.lr = 2e-5
