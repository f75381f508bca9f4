"""The C4 second stage (arXiv:1512.03385, appendix A): the last stage of the backbone as the heads' body."""

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.backbone.resnet import BottleneckBlock, ResNet
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    check_given_boxes,
    select_foreground_proposals,
)
from detlib.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detlib.modeling.roi_heads.head_pooler import pooler_from_config
from detlib.modeling.roi_heads.mask_head import build_mask_head
from detlib.structures import Boxes, ImageList, Instances

__all__ = ["Res5ROIHeads"]


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """One stage of residual blocks over each pooled region, shared by the box and the mask head.

    Args:
        in_features: name of the feature map to pool from, in a list.
        pooler: pools region features from it.
        res5: the stage, a module or the list of its blocks: (R, C, H, W) to (R, C', H/2, W/2).
        box_predictor: class scores and boxes from (R, C') averages, see `FastRCNNOutputLayers`.
        mask_head: works on what `res5` gives, see `BaseMaskRCNNHead`; None for no masks.
        **kwargs: `ROIHeads`'s.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module | list[nn.Module],
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = nn.Sequential(*res5) if isinstance(res5, (list, tuple)) else res5
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if self.mask_on:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("MODEL.KEYPOINT_ON = True: Res5ROIHeads has no keypoint head.")
        if len(cfg.MODEL.ROI_HEADS.IN_FEATURES) > 1:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES must name one feature map for Res5ROIHeads, got "
                f"{list(cfg.MODEL.ROI_HEADS.IN_FEATURES)}."
            )
        pooler, pooled = pooler_from_config(cfg, "ROI_BOX_HEAD", input_shape)
        if pooler is None:
            raise ValueError("MODEL.ROI_BOX_HEAD.POOLER_TYPE is empty, but Res5ROIHeads pools its features.")
        res5, channels = cls._build_res5_block(cfg)
        if pooled.channels != channels // 2:
            raise ValueError(
                f"Res5ROIHeads needs a feature map of {channels // 2} channels (half of 8 x "
                f"MODEL.RESNETS.RES2_OUT_CHANNELS); {cfg.MODEL.ROI_HEADS.IN_FEATURES[0]!r} of "
                f"MODEL.ROI_HEADS.IN_FEATURES has {pooled.channels}."
            )
        args = super().from_config(cfg) | {
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "pooler": pooler,
            "res5": res5,
            "box_predictor": FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels, height=1, width=1)),
        }
        if cfg.MODEL.MASK_ON:
            shape = ShapeSpec(channels=channels, height=pooled.height, width=pooled.width)
            args["mask_head"] = build_mask_head(cfg, shape)
        return args

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        """Three bottleneck blocks that halve the side, and the number of channels that they give."""
        resnets = cfg.MODEL.RESNETS
        if resnets.DEFORM_ON_PER_STAGE[-1]:
            raise ValueError(
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for a deformable res5, which Res5ROIHeads does not "
                "have."
            )
        out_channels = resnets.RES2_OUT_CHANNELS * 8  # channels double from stage to stage
        blocks = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[2, 1, 1],
            in_channels=out_channels // 2,
            bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 8,
            out_channels=out_channels,
            num_groups=resnets.NUM_GROUPS,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
        )
        return nn.Sequential(*blocks), out_channels

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See `ROIHeads.forward`. Detections have `pred_boxes`, `scores` and `pred_classes`; with a mask
        head also `pred_masks` (R_i, 1, M, M) float32 probabilities."""
        if self.training:
            if targets is None:
                raise ValueError(f"{type(self).__name__} needs targets in training.")
            proposals = self.label_and_sample_proposals(proposals, targets)
        region_features = self._shared_roi_transform(
            [features[name] for name in self.in_features], [x.proposal_boxes for x in proposals]
        )
        predictions = self.box_predictor(region_features.mean(dim=[2, 3]))
        if not self.training:
            pred_instances, _ = self.box_predictor.inference(predictions, proposals)
            return self.forward_with_given_boxes(features, pred_instances), {}
        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            foreground, is_foreground = select_foreground_proposals(proposals, self.num_classes)
            # The regions were pooled and transformed for the boxes already.
            region_features = region_features[torch.cat(is_foreground)]
            losses.update(self.mask_head(region_features, foreground))
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Run the mask head on boxes that are known, whose features are pooled anew.

        Args:
            features: as `forward`'s.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same `Instances` with `pred_masks`, when there is a mask head.

        Raises:
            ValueError: in training, or when a field is missing.
        """
        check_given_boxes(self, instances)
        if not self.mask_on:
            return instances
        region_features = self._shared_roi_transform(
            [features[name] for name in self.in_features], [x.pred_boxes for x in instances]
        )
        return self.mask_head(region_features, instances)

    def _shared_roi_transform(self, features: list[torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Pool and run the shared stage: (R, C', H/2, W/2). Parts of models are run by this name."""
        return self.res5(self.pooler(features, boxes))
