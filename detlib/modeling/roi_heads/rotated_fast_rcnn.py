"""ROI heads for rotated boxes.

`StandardROIHeads`, `FastRCNNOutputLayers` and the inference work on any type of boxes. This file defines
the names for YAML configs, with their checks, and detectron2's functions.

Shape legend: R_i regions of one image, K classes.
"""

import torch

from detlib.config import CfgNode, configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.box_regression import Box2BoxTransformRotated, check_loss_of_boxes
from detlib.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    fast_rcnn_inference,
    fast_rcnn_inference_single_image,
)
from detlib.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detlib.structures import Instances, RotatedBoxes

__all__ = [
    "RROIHeads",
    "RotatedFastRCNNOutputLayers",
    "fast_rcnn_inference_rotated",
    "fast_rcnn_inference_single_image_rotated",
]


def fast_rcnn_inference_rotated(
    boxes: list[torch.Tensor],
    scores: list[torch.Tensor],
    image_shapes: list[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Call `fast_rcnn_inference` for rotated boxes, (R_i, K * 5) or (R_i, 5) per image."""
    return fast_rcnn_inference(
        boxes, scores, image_shapes, score_thresh, nms_thresh, topk_per_image, RotatedBoxes
    )


def fast_rcnn_inference_single_image_rotated(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, torch.Tensor]:
    """Call `fast_rcnn_inference_single_image` for rotated boxes, (R_i, K * 5) or (R_i, 5)."""
    return fast_rcnn_inference_single_image(
        boxes, scores, image_shape, score_thresh, nms_thresh, topk_per_image, RotatedBoxes
    )


class RotatedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """`FastRCNNOutputLayers` whose `box2box_transform` is a `Box2BoxTransformRotated`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Translate as `FastRCNNOutputLayers.from_config`, with five BBOX_REG_WEIGHTS.

        Raises:
            ValueError: there are not five weights, or the box loss is not defined for rotated boxes.
        """
        head = cfg.MODEL.ROI_BOX_HEAD
        key = "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"
        check_loss_of_boxes(head.BBOX_REG_LOSS_TYPE, RotatedBoxes.box_dim, key)
        args = super().from_config(cfg, input_shape)
        args["box2box_transform"] = Box2BoxTransformRotated(weights=head.BBOX_REG_WEIGHTS)
        return args


@ROI_HEADS_REGISTRY.register()
class RROIHeads(StandardROIHeads):
    """`StandardROIHeads` for rotated boxes, with a box head only.

    Arguments are those of `StandardROIHeads`.
    """

    @configurable
    def __init__(self, **kwargs):
        """
        Raises:
            ValueError: there is a mask or keypoint head, `train_on_pred_boxes` is set, or the pooler is for
                axis-aligned boxes. Rotated boxes support none of these.
        """
        super().__init__(**kwargs)
        wrong = {
            "a mask head (MODEL.MASK_ON)": self.mask_on,
            "a keypoint head (MODEL.KEYPOINT_ON)": getattr(self, "keypoint_on", False),
            "train_on_pred_boxes (MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES)": self.train_on_pred_boxes,
        }
        if any(wrong.values()):
            raise ValueError(
                f"RROIHeads, the heads for rotated boxes, do not support {next(k for k in wrong if wrong[k])}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Translate as `StandardROIHeads.from_config`, with the pooler type ROIAlignRotated."""
        if cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE != "ROIAlignRotated":
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE must be 'ROIAlignRotated' for RROIHeads, got "
                f"{cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE!r}"
            )
        return super().from_config(cfg, input_shape)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        args = super()._init_box_head(cfg, input_shape)
        args["box_predictor"] = RotatedFastRCNNOutputLayers(cfg, args["box_head"].output_shape)
        return args
