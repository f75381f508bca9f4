"""The region proposal network of rotated boxes (arXiv:1703.01086).

`RPN` works on any type of boxes. This file defines the name for YAML configs and detectron2's function.
"""

import torch

from detlib.config import configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.box_regression import Box2BoxTransformRotated, check_loss_of_boxes
from detlib.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detlib.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detlib.modeling.proposal_generator.rpn import RPN
from detlib.structures import Instances, RotatedBoxes

__all__ = ["RRPN", "find_top_rrpn_proposals"]


def find_top_rrpn_proposals(
    proposals: list[torch.Tensor],
    pred_objectness_logits: list[torch.Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Call `find_top_rpn_proposals` for rotated boxes, (N, R, 5) per level."""
    return find_top_rpn_proposals(
        proposals,
        pred_objectness_logits,
        image_sizes,
        nms_thresh,
        pre_nms_topk,
        post_nms_topk,
        min_box_size,
        training,
        RotatedBoxes,
    )


@PROPOSAL_GENERATOR_REGISTRY.register()
class RRPN(RPN):
    """`RPN` with rotated anchors: a `RotatedAnchorGenerator` and a `Box2BoxTransformRotated`.

    `anchor_boundary_thresh` applies to the anchors' centers. Arguments are those of `RPN`.
    """

    @configurable
    def __init__(self, *args, **kwargs):
        """
        Raises:
            ValueError: the anchors are not rotated, there are not five BBOX_REG_WEIGHTS, or the box
                loss is not defined for rotated boxes.
        """
        super().__init__(*args, **kwargs)
        if self.anchor_generator.box_dim != RotatedBoxes.box_dim:
            raise ValueError(
                "RRPN needs rotated anchors, of MODEL.ANCHOR_GENERATOR.NAME 'RotatedAnchorGenerator', not "
                f"{type(self.anchor_generator).__name__!r}"
            )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        """Translate as `RPN.from_config`, with five numbers in `cfg.MODEL.RPN.BBOX_REG_WEIGHTS`."""
        rpn = cfg.MODEL.RPN
        check_loss_of_boxes(rpn.BBOX_REG_LOSS_TYPE, RotatedBoxes.box_dim, "MODEL.RPN.BBOX_REG_LOSS_TYPE")
        args = super().from_config(cfg, input_shape)
        args["box2box_transform"] = Box2BoxTransformRotated(weights=rpn.BBOX_REG_WEIGHTS)
        return args
