"""FCOS with a ResNet-50 and FPN, based on RetinaNet without anchors."""

from detlib.modeling import FCOS
from detlib.modeling.meta_arch.fcos import FCOSHead

from .retinanet import model

model._target_ = FCOS
for key in ("anchor_generator", "box2box_transform", "anchor_matcher", "input_format"):
    del model[key]

# The coarse levels are computed from p5 instead of res5.
model.backbone.top_block.update(in_channels=256, in_feature="p5")
model.head._target_ = FCOSHead
model.head.norm = "GN"
del model.head["num_anchors"]
model.update(test_score_thresh=0.2, test_nms_thresh=0.6)
