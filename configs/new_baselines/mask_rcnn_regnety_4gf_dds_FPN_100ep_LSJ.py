"""Like the recipe with R-50, but with a RegNetY-4GF."""

from ..common.models.regnet import pixel_std as _pixel_std
from ..common.models.regnet import regnety_4gf as _regnet
from .mask_rcnn_R_50_FPN_100ep_LSJ import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = _regnet
model.backbone.bottom_up.norm = "SyncBN"
model.pixel_std = _pixel_std

train.cudnn_benchmark = True
