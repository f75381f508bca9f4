"""Cascade Mask R-CNN with an MViTv2-L on LVIS v1, trained for 50 epochs."""

from ..cascade_mask_rcnn_mvitv2_l_in21k_50ep import dataloader, model, optimizer, train
from ..common.lvis import schedule_50ep, use_lvis

use_lvis(dataloader, model)
lr_multiplier = schedule_50ep(train)
optimizer.lr = 4e-5
