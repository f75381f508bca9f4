"""Cascade Mask R-CNN with a ResNet-50 and FPN."""

from .edits import make_cascade
from .mask_rcnn_fpn import model

make_cascade(model)
