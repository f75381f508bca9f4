"""Mask R-CNN with a RegNetY-4GF, trained with the 1x schedule."""

from ..common.coco_schedule import lr_multiplier_1x as lr_multiplier
from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_fpn import model
from ..common.models.regnet import pixel_std as _pixel_std
from ..common.models.regnet import regnety_4gf as _regnet
from ..common.optim import SGD as optimizer
from ..common.train import train

model.backbone.bottom_up = _regnet
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.norm = "FrozenBN"
model.pixel_std = _pixel_std

optimizer.weight_decay = 5e-5
train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906838/RegNetY-4.0GF_dds_8gpu.pyth"
)
# Image sizes vary little, so cuDNN's benchmark pays off.
train.cudnn_benchmark = True
