"""Changes to a model that multiple recipes share."""

import copy

from detlib.config import LazyCall as L
from detlib.modeling.matcher import Matcher
from detlib.modeling.roi_heads import CascadeROIHeads

from ..data.constants import constants as _constants


def use_rgb(model):
    """Set RGB input with ImageNet's statistics, which newer backbones were trained on."""
    model.pixel_mean = _constants.imagenet_rgb256_mean
    model.pixel_std = _constants.imagenet_rgb256_std
    model.input_format = "RGB"


def deepen_heads(model, norm):
    """Add a convolution to the RPN, and replace a linear layer of the box head by four convolutions."""
    model.proposal_generator.head.conv_dims = [-1, -1]
    for head in model.roi_heads.get("box_heads") or [model.roi_heads.box_head]:
        head.update(conv_dims=[256, 256, 256, 256], fc_dims=[1024], conv_norm=norm)
    model.roi_heads.mask_head.conv_norm = norm


def make_cascade(model):
    """Replace the box head by three stages with increasing IoU thresholds (Cascade R-CNN)."""
    heads = model.roi_heads
    heads._target_ = CascadeROIHeads
    del heads["proposal_matcher"]
    head, predictor = heads.pop("box_head"), heads.pop("box_predictor")
    predictor.update(cls_agnostic_bbox_reg=True, num_classes="${...num_classes}")
    heads.box_heads = [copy.deepcopy(head) for _ in range(3)]
    heads.box_predictors = [copy.deepcopy(predictor) for _ in range(3)]
    for stage, weights in zip(heads.box_predictors, [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]):
        stage.box2box_transform.weights = weights
    heads.proposal_matchers = [
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ]
