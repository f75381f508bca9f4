"""The region proposal network of rotated boxes (arXiv:1703.01086).

`RPN` works on any type of boxes, so what is here is a name for YAML configs and detectron2's function.
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
    """`find_top_rpn_proposals` of rotated boxes, (N, R, 5) a level."""
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
    """`RPN` with rotated anchors, that is with a `RotatedAnchorGenerator` and a `Box2BoxTransformRotated`.

    `anchor_boundary_thresh` looks at the anchors' centres. Arguments are those of `RPN`.

    Raises:
        ValueError: an anchor generator of other boxes, five BBOX_REG_WEIGHTS missing, or a box loss that
            rotated boxes do not have.
    """

    @configurable
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.anchor_generator.box_dim != RotatedBoxes.box_dim:
            raise ValueError(
                "RRPN needs rotated anchors, of MODEL.ANCHOR_GENERATOR.NAME 'RotatedAnchorGenerator', not "
                f"{type(self.anchor_generator).__name__!r}"
            )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        """As `RPN.from_config`, with `cfg.MODEL.RPN.BBOX_REG_WEIGHTS` of five numbers."""
        rpn = cfg.MODEL.RPN
        check_loss_of_boxes(rpn.BBOX_REG_LOSS_TYPE, RotatedBoxes.box_dim, "MODEL.RPN.BBOX_REG_LOSS_TYPE")
        args = super().from_config(cfg, input_shape)
        args["box2box_transform"] = Box2BoxTransformRotated(weights=rpn.BBOX_REG_WEIGHTS)
        return args
