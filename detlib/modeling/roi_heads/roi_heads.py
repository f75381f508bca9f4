"""The second stages of R-CNN models: sampling of regions, and the heads that work on them.

Shape legend: N images, R regions of all images together, R_i those of one image, C channels, K classes (label
K is the background), M side of a predicted mask.
"""

import inspect
from typing import Any, cast

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers import ShapeSpec
from detlib.modeling.backbone.resnet import BottleneckBlock, ResNet
from detlib.modeling.config_checks import check_count, check_features, config_keys
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler, pooler_from_config
from detlib.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detlib.modeling.roi_heads.box_head import build_box_head
from detlib.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detlib.modeling.roi_heads.keypoint_head import (
    build_keypoint_head,
    select_proposals_with_visible_keypoints,
)
from detlib.modeling.roi_heads.mask_head import build_mask_head
from detlib.modeling.sampling import label_and_sample
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import get_event_storage, has_event_storage
from detlib.utils.registry import Registry

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_roi_heads",
    "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = """
Second stages of R-CNN models: `ROIHeads`. An entry is called as `entry(cfg, input_shape)` with a dict from
feature name to `ShapeSpec`.
"""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the ROI heads `cfg.MODEL.ROI_HEADS.NAME`."""
    name = cfg.MODEL.ROI_HEADS.NAME
    return ROI_HEADS_REGISTRY.get(name, key="MODEL.ROI_HEADS.NAME")(cfg, input_shape)


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Select the regions that are matched to an object.

    Args:
        proposals: N `Instances` with `gt_classes`.
        bg_label: the label of the background, K; regions labeled -1 are ignored.

    Returns:
        N `Instances`, and for each image a (R_i,) bool mask of the selected regions.
    """
    selected, masks = [], []
    for x in proposals:
        gt_classes = x.get_fields().get("gt_classes")
        if gt_classes is None:
            raise ValueError("select_foreground_proposals needs proposals with 'gt_classes'.")
        mask = (gt_classes != -1) & (gt_classes != bg_label)
        selected.append(x[mask.nonzero()[:, 0]])
        masks.append(mask)
    return selected, masks


class ROIHeads(nn.Module):
    """Base class of second stages: matches regions to ground truth and samples those to train on."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ):
        """
        Args:
            num_classes: K, without the background.
            batch_size_per_image: number of regions to sample per image.
            positive_fraction: largest fraction of foreground among them.
            proposal_matcher: assigns each region a ground-truth box or the background.
            proposal_append_gt: whether to add the ground-truth boxes to the regions.
        """
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        heads = cfg.MODEL.ROI_HEADS
        check_count(heads.NUM_CLASSES, "MODEL.ROI_HEADS.NUM_CLASSES")
        with config_keys("MODEL.ROI_HEADS.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_LABELS"):
            matcher = Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False)
        return {
            "num_classes": heads.NUM_CLASSES,
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
            "proposal_matcher": matcher,
        }

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Match each image's regions to its objects and sample regions to train on.

        Args:
            proposals: N `Instances` with `proposal_boxes` and `objectness_logits`.
            targets: N `Instances` with `gt_boxes`, `gt_classes` and any other `gt_` fields.

        Returns:
            N `Instances` of at most `batch_size_per_image` regions with `proposal_boxes`, `gt_classes`
            (int64, K for background) and, if the image has objects, all other `gt_` fields of the matched
            object. These are undefined for background.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled_proposals = []
        for proposals_per_image, targets_per_image in zip(proposals, targets):
            sample = label_and_sample(
                proposals_per_image.proposal_boxes,
                targets_per_image.gt_boxes,
                self.proposal_matcher,
                num_samples=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
                bg_label=self.num_classes,
                gt_classes=targets_per_image.gt_classes,
            )
            sampled_idxs = torch.cat([sample.fg_idxs, sample.bg_idxs])
            fields = proposals_per_image[sampled_idxs].get_fields()
            fields["gt_classes"] = sample.labels[sampled_idxs]
            if len(targets_per_image) > 0:
                matched = sample.matched_idxs[sampled_idxs]
                for name, value in targets_per_image.get_fields().items():
                    if name.startswith("gt_") and name not in fields:
                        fields[name] = value[matched]
            sampled_proposals.append(Instances(proposals_per_image.image_size, **fields))
        self._log_sample_stats(sampled_proposals)
        return sampled_proposals

    def _log_sample_stats(self, proposals: list[Instances]) -> None:
        if not has_event_storage():
            return
        is_background = torch.cat([p.gt_classes for p in proposals]) == self.num_classes
        num_background = float(is_background.sum())
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", (len(is_background) - num_background) / len(proposals))
        storage.put_scalar("roi_head/num_bg_samples", num_background / len(proposals))

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Run the second stage.

        Args:
            images: the network input, N images.
            features: feature maps (N, C, H, W) by name.
            proposals: N `Instances` with `proposal_boxes` and `objectness_logits`, absolute pixels of the
                input.
            targets: N `Instances` with the ground truth (`gt_boxes`, `gt_classes`, ...); training only.

        Returns:
            In training the sampled proposals and a dict of losses, otherwise detections and an empty dict.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward.")

    def _check_given_boxes(self, instances: list[Instances]) -> None:
        """Raise ValueError unless `forward_with_given_boxes` can process `instances`."""
        if self.training:
            raise ValueError("forward_with_given_boxes is for inference; call eval() first.")
        for x in instances:
            if not (x.has("pred_boxes") and x.has("pred_classes")):
                raise ValueError(
                    "forward_with_given_boxes needs instances with 'pred_boxes' and 'pred_classes'; got "
                    f"{sorted(x.get_fields())}."
                )


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """Heads that each pool their own features: the usual choice for a feature pyramid."""

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
        mask_head: Any = None,
        keypoint_in_features: list[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: Any = None,
        train_on_pred_boxes: bool = False,
        **kwargs,
    ):
        """
        Args:
            box_in_features: names of the feature maps of the box head, finest first.
            box_pooler: pools the features of the box head.
            box_head: maps pooled features (R, C, H, W) to region features.
            box_predictor: predicts class scores and boxes, see `FastRCNNOutputLayers`.
            mask_in_features: names of the feature maps of the mask head; None for no masks.
            mask_pooler: pools the features of the mask head; None passes the dict of feature maps to it.
            mask_head: see `BaseMaskRCNNHead`.
            keypoint_in_features: names of the feature maps of the keypoint head; None for no keypoints.
            keypoint_pooler: pools the features of the keypoint head; None passes the dict of feature maps to
                it.
            keypoint_head: see `BaseKeypointRCNNHead`.
            train_on_pred_boxes: whether to train the other heads on the box head's boxes instead of the
                proposals.
            **kwargs: arguments of `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = self.box_in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_on = mask_in_features is not None
        if self.mask_on:
            self.mask_in_features = cast(list[str], mask_in_features)
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head
        self.keypoint_on = keypoint_in_features is not None
        if self.keypoint_on:
            self.keypoint_in_features = cast(list[str], keypoint_in_features)
            self.keypoint_pooler = keypoint_pooler
            self.keypoint_head = keypoint_head
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        args = super().from_config(cfg)
        args["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        for init_head in (cls._init_box_head, cls._init_mask_head, cls._init_keypoint_head):
            # In older third-party code these are instance methods, called by the subclass's own __init__.
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
        """Run the second stage. See `ROIHeads.forward`.

        Detections have `pred_boxes`, `scores` and `pred_classes`; with a mask head also `pred_masks`
        (R_i, 1, M, M) float32 probabilities, with a keypoint head `pred_keypoints` (R_i, keypoints, 3)
        float32: x, y in pixels of the network input, and a score.
        """
        if not self.training:
            pred_instances = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, pred_instances), {}
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training.")
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, proposals)
        # The other heads train on the same proposals as the box head. In inference they get its detections,
        # which are distributed like these.
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Run the heads other than the box head on given boxes.

        Args:
            features: as for `forward`.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same `Instances` with `pred_masks` and `pred_keypoints`, if there are such heads.

        Raises:
            ValueError: the heads are in training mode, or a field is missing.
        """
        self._check_given_boxes(instances)
        instances = self._forward_mask(features, instances)
        return self._forward_keypoint(features, instances)

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> Any:
        """Run the box head; return losses in training, detections otherwise.

        User code calls this method by name.
        """
        maps = self._select_maps(features, self.box_in_features)
        # Linear layers need contiguous features, and third-party box heads may flatten them with view().
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

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]) -> Any:
        """Run the mask head; return losses in training, `instances` with masks otherwise."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        x = self._pool(features, instances, self.mask_in_features, self.mask_pooler)
        return self.mask_head(x, instances)

    def _forward_keypoint(self, features: dict[str, torch.Tensor], instances: list[Instances]) -> Any:
        """Run the keypoint head; return losses in training, `instances` with keypoints otherwise."""
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
        maps = self._select_maps(features, names)
        if pooler is None:
            return dict(zip(names, maps))
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        return pooler(maps, boxes)

    @staticmethod
    def _select_maps(features: dict[str, torch.Tensor], names: list[str]) -> list[torch.Tensor]:
        """Return the feature maps with the given names; raise ValueError if the backbone lacks one."""
        if any(name not in features for name in names):
            check_features(names, features, "in_features of a head (MODEL.ROI_HEADS.IN_FEATURES)")
        return [features[name] for name in names]


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """The C4 second stage (arXiv:1512.03385, appendix A): res5 of the ResNet runs on each pooled region.

    Its features are shared by the box and the mask head.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module | list[nn.Module],
        box_predictor: nn.Module,
        mask_head: Any = None,
        **kwargs,
    ):
        """
        Args:
            in_features: a list with the name of the feature map to pool from.
            pooler: pools the region features.
            res5: a module or the list of its blocks, which maps (R, C, H, W) to (R, C', H/2, W/2).
            box_predictor: predicts class scores and boxes from the (R, C') averages, see
                `FastRCNNOutputLayers`.
            mask_head: works on the output of `res5`, see `BaseMaskRCNNHead`; None for no masks.
            **kwargs: arguments of `ROIHeads`.
        """
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
        """Build three bottleneck blocks with stride 2; return them and their output channels."""
        resnets = cfg.MODEL.RESNETS
        if resnets.DEFORM_ON_PER_STAGE[-1]:
            raise ValueError(
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE: Res5ROIHeads does not support deformable convolutions "
                "in res5."
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
        """Run the second stage. See `ROIHeads.forward`.

        Detections have `pred_boxes`, `scores` and `pred_classes`; with a mask head also `pred_masks`
        (R_i, 1, M, M) float32 probabilities.
        """
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
            # Their features were computed for the box predictor already.
            region_features = region_features[torch.cat(is_foreground)]
            losses.update(self.mask_head(region_features, foreground))
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Run the mask head on given boxes, whose features are pooled again.

        Args:
            features: as for `forward`.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same `Instances` with `pred_masks`, if there is a mask head.

        Raises:
            ValueError: the heads are in training mode, or a field is missing.
        """
        self._check_given_boxes(instances)
        if not self.mask_on:
            return instances
        region_features = self._shared_roi_transform(
            [features[name] for name in self.in_features], [x.pred_boxes for x in instances]
        )
        return self.mask_head(region_features, instances)

    def _shared_roi_transform(self, features: list[torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Pool the boxes and run `res5`; return (R, C', H/2, W/2). User code calls this method by name."""
        return self.res5(self.pooler(features, boxes))
