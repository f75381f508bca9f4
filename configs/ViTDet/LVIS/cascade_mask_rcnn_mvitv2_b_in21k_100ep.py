"""Cascade Mask R-CNN with an MViTv2-B on LVIS v1, trained for 100 epochs."""

from ..cascade_mask_rcnn_mvitv2_b_in21k_100ep import dataloader, model, optimizer, train
from ..common.lvis import schedule_100ep, use_lvis

use_lvis(dataloader, model)
lr_multiplier = schedule_100ep(train)
optimizer.lr = 1e-4
