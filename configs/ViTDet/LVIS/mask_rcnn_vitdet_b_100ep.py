"""ViTDet on LVIS v1: Mask R-CNN with a ViT-B, trained for 100 epochs."""

from ..common.lvis import schedule_100ep, use_lvis
from ..mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, train

use_lvis(dataloader, model)
lr_multiplier = schedule_100ep(train)
optimizer.lr = 2e-4
