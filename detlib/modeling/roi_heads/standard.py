"""Second stage whose heads each pool features of their own from the backbone's maps."""

import inspect

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.config_checks import take_features
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    check_given_boxes,
    select_foreground_proposals,
)
from detlib.modeling.roi_heads.box_head import build_box_head
from detlib.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detlib.modeling.roi_heads.head_pooler import pooler_from_config
from detlib.modeling.roi_heads.keypoint_head import (
    build_keypoint_head,
    select_proposals_with_visible_keypoints,
)
from detlib.modeling.roi_heads.mask_head import build_mask_head
from detlib.structures import ImageList, Instances

__all__ = ["StandardROIHeads"]

BOX_IN_FEATURES = "box_in_features (MODEL.ROI_HEADS.IN_FEATURES)"


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """Heads that each pool their own features: the usual choice on a feature pyramid.

    Args:
        box_in_features: names of the feature maps of the box head, finest first.
        box_pooler: pools region features for it.
        box_head: (R, C, H, W) to features of regions.
        box_predictor: class scores and boxes, see `FastRCNNOutputLayers`.
        mask_in_features: names of the feature maps of the mask head; None for no masks.
        mask_pooler: pools region features for it; None hands the dict of maps to the head.
        mask_head: see `BaseMaskRCNNHead`.
        keypoint_in_features: names of the feature maps of the keypoint head; None for no keypoints.
        keypoint_pooler: pools region features for it; None hands the dict of maps to the head.
        keypoint_head: see `BaseKeypointRCNNHead`.
        train_on_pred_boxes: train the other heads on the box head's boxes in place of the proposals.
        **kwargs: `ROIHeads`'s.
    """

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: list[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.in_features = self.box_in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_on = mask_in_features is not None
        if self.mask_on:
            self.mask_in_features = mask_in_features
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head
        self.keypoint_on = keypoint_in_features is not None
        if self.keypoint_on:
            self.keypoint_in_features = keypoint_in_features
            self.keypoint_pooler = keypoint_pooler
            self.keypoint_head = keypoint_head
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        args = super().from_config(cfg)
        args["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        for init_head in (cls._init_box_head, cls._init_mask_head, cls._init_keypoint_head):
            # A subclass may have methods of instances here, which its own __init__ calls later.
            if inspect.ismethod(init_head):
                args |= init_head(cfg, input_shape)
        return args

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        pooler, shape = pooler_from_config(cfg, "ROI_BOX_HEAD", input_shape)
        head = build_box_head(cfg, shape)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": head,
            "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.MASK_ON:
            return {}
        pooler, shape = pooler_from_config(cfg, "ROI_MASK_HEAD", input_shape)
        return {
            "mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "mask_pooler": pooler,
            "mask_head": build_mask_head(cfg, shape),
        }

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.KEYPOINT_ON:
            return {}
        pooler, shape = pooler_from_config(cfg, "ROI_KEYPOINT_HEAD", input_shape)
        return {
            "keypoint_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "keypoint_pooler": pooler,
            "keypoint_head": build_keypoint_head(cfg, shape),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See `ROIHeads.forward`. Detections have `pred_boxes`, `scores` and `pred_classes`; with a mask
        head also `pred_masks` (R_i, 1, M, M) float32 probabilities, with a keypoint head `pred_keypoints`
        (R_i, keypoints, 3) float32: x, y in pixels of the input, and a score."""
        if not self.training:
            pred_instances = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, pred_instances), {}
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training.")
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, proposals)
        # The other heads train on the proposals that the box head was trained on, so that in inference,
        # where they work on its detections, they see boxes of the same kind.
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Run the heads other than the box head on boxes that are known.

        Args:
            features: as `forward`'s.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same `Instances` with `pred_masks` and `pred_keypoints`, when there are such heads.

        Raises:
            ValueError: in training, or when a field is missing.
        """
        check_given_boxes(self, instances)
        instances = self._forward_mask(features, instances)
        return self._forward_keypoint(features, instances)

    def _forward_box(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """The box branch: losses in training, else detections. Parts of models are run by this name, see the
        documentation on using models."""
        maps = take_features(features, self.box_in_features, BOX_IN_FEATURES)
        # Linear layers need contiguous features, and box heads may flatten them with view().
        pooled = self.box_pooler(maps, [x.proposal_boxes for x in proposals]).contiguous()
        box_features = self.box_head(pooled)
        predictions = self.box_predictor(box_features)
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0]
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
                for x, boxes_per_image in zip(proposals, boxes):
                    x.proposal_boxes = type(x.proposal_boxes)(boxes_per_image)
        return losses

    def _forward_mask(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """The mask branch: losses in training, else `instances` with masks."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        x = self._pool(features, instances, self.mask_in_features, self.mask_pooler)
        return self.mask_head(x, instances)

    def _forward_keypoint(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """The keypoint branch: losses in training, else `instances` with keypoints."""
        if not self.keypoint_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
            instances = select_proposals_with_visible_keypoints(instances)
        x = self._pool(features, instances, self.keypoint_in_features, self.keypoint_pooler)
        return self.keypoint_head(x, instances)

    def _pool(
        self,
        features: dict[str, torch.Tensor],
        instances: list[Instances],
        names: list[str],
        pooler: ROIPooler | None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        maps = take_features(features, names, "in_features of a head (MODEL.ROI_HEADS.IN_FEATURES)")
        if pooler is None:
            return dict(zip(names, maps))
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        return pooler(maps, boxes)
