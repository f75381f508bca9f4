"""Cascade Mask R-CNN with an MViTv2-T, trained with the 3x schedule."""

from functools import partial

from detlib.layers.batch_norm import NaiveSyncBatchNorm

from ..common.models.edits import deepen_heads, make_cascade
from .mask_rcnn_mvitv2_t_3x import dataloader, lr_multiplier, model, optimizer, train

make_cascade(model)
# The number of boxes differs between GPUs, so statistics are weighted by it.
deepen_heads(model, norm=partial(NaiveSyncBatchNorm, stats_mode="N"))
