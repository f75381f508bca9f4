"""Mask R-CNN trained from scratch for 100 epochs, with SyncBN and large-scale jitter."""

from functools import partial

import detlib.data.transforms as T
from detlib.config import LazyCall as L
from detlib.layers.batch_norm import NaiveSyncBatchNorm

from ..common.coco_schedule import steps
from ..common.data.coco import dataloader
from ..common.models.edits import deepen_heads
from ..common.models.mask_rcnn_fpn import model
from ..common.optim import SGD as optimizer
from ..common.train import train

image_size = 1024
dataloader.train.total_batch_size = 64
dataloader.train.mapper.augmentations = [
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size)),
    L(T.RandomFlip)(horizontal=True),
]
# Compute boxes from the cropped masks.
dataloader.train.mapper.recompute_boxes = True

model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = model.backbone.norm = "SyncBN"
model.backbone.bottom_up.freeze_at = 0
# The number of boxes differs between GPUs, so statistics are weighted by it.
deepen_heads(model, norm=partial(NaiveSyncBatchNorm, stats_mode="N"))

optimizer.lr = 0.1
optimizer.weight_decay = 4e-5

train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 184375  # 100 epochs of 118 000 images
lr_multiplier = steps(
    [163889, 177546], train.max_iter, warmup_length=500 / train.max_iter, warmup_factor=0.067
)
