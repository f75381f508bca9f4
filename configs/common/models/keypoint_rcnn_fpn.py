"""Keypoint R-CNN with a ResNet-50 and FPN."""

from detlib.config import LazyCall as L
from detlib.layers import ShapeSpec
from detlib.modeling.roi_heads import KRCNNConvDeconvUpsampleHead

from .mask_rcnn_fpn import model, pooler

for key in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[key]

model.roi_heads.update(
    num_classes=1,
    keypoint_in_features=["p2", "p3", "p4", "p5"],
    keypoint_pooler=pooler(14),
    keypoint_head=L(KRCNNConvDeconvUpsampleHead)(
        input_shape=ShapeSpec(channels=256, height=14, width=14),
        num_keypoints=17,
        conv_dims=[512] * 8,
        loss_normalizer="visible",
    ),
)
# With a single class of hard examples, keep more proposals and use a smoother box loss.
model.proposal_generator.post_nms_topk = (1500, 1000)
model.roi_heads.box_predictor.smooth_l1_beta = 0.5
