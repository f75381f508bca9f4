"""ViTDet on LVIS v1: Cascade Mask R-CNN with a ViT-B, trained for 100 epochs."""

from ...common.models.edits import make_cascade
from .mask_rcnn_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

make_cascade(model)
