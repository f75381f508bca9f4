"""Panoptic FPN: Mask R-CNN and a semantic segmentation head on a shared ResNet-50 and FPN."""

from detlib.config import LazyCall as L
from detlib.layers import ShapeSpec
from detlib.modeling import PanopticFPN
from detlib.modeling.meta_arch.semantic_seg import SemSegFPNHead

from .mask_rcnn_fpn import model

model._target_ = PanopticFPN
model.sem_seg_head = L(SemSegFPNHead)(
    input_shape={
        level: L(ShapeSpec)(stride=stride, channels="${....backbone.out_channels}")
        for level, stride in zip(["p2", "p3", "p4", "p5"], [4, 8, 16, 32])
    },
    ignore_value=255,
    num_classes=54,  # stuff classes of COCO, and one class for all things
    conv_dims=128,
    common_stride=4,
    loss_weight=0.5,
    norm="GN",
)
