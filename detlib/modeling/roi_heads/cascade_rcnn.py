"""Cascade R-CNN (arXiv:1712.00726): a sequence of box heads, each refining the boxes of the previous one.

Shape legend: N images, R regions of all images together, R_i those of one image, K classes (label K is the
background), B numbers per box.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.box_regression import box2box_transform_for
from detlib.modeling.config_checks import config_keys
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler, pooler_from_config
from detlib.modeling.roi_heads.box_head import build_box_head
from detlib.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detlib.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detlib.modeling.sampling import label_boxes
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import get_event_storage, has_event_storage

__all__ = ["CascadeROIHeads"]


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


def _check_config(cfg: CfgNode) -> None:
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS) or not cascade.IOUS:
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS and BBOX_REG_WEIGHTS need one entry for each stage, got "
            f"{len(cascade.IOUS)} and {len(cascade.BBOX_REG_WEIGHTS)}."
        )
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            "CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True: each stage refines one "
            "box per region, predicted by the previous stage."
        )
    thresholds = list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS)
    if thresholds[0] != cascade.IOUS[0]:
        raise ValueError(
            f"The first stage of CascadeROIHeads matches with MODEL.ROI_HEADS.IOU_THRESHOLDS = {thresholds}; "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS must begin with that value, got {list(cascade.IOUS)}."
        )


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """A sequence of box heads, each trained on the boxes of the previous one with a higher IoU threshold.

    Scores are averaged over the stages, boxes are those of the last stage. The mask and keypoint heads train
    on the regions sampled for the first stage, whatever the value of `train_on_pred_boxes`.
    """

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_heads: list[nn.Module],
        box_predictors: list[nn.Module],
        proposal_matchers: list[Matcher],
        **kwargs,
    ):
        """
        Args:
            box_in_features: names of the feature maps of the box heads, finest first.
            box_pooler: pools the region features of all stages.
            box_heads: the box head of each stage, which maps (R, C, H, W) to region features.
            box_predictors: the class-agnostic box predictor of each stage, see `FastRCNNOutputLayers`.
            proposal_matchers: the matcher of each stage; the first is also used for sampling.
            **kwargs: arguments of `StandardROIHeads`, except `box_head`, `box_predictor` and
                `proposal_matcher`.

        Raises:
            ValueError: the lists differ in length, or there is also a `proposal_matcher`.
        """
        if "proposal_matcher" in kwargs:
            raise ValueError(
                "CascadeROIHeads takes proposal_matchers, one per stage, instead of proposal_matcher."
            )
        lengths = {len(box_heads), len(box_predictors), len(proposal_matchers)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "CascadeROIHeads needs as many box_heads as box_predictors and proposal_matchers, got "
                f"{len(box_heads)}, {len(box_predictors)} and {len(proposal_matchers)}."
            )
        super().__init__(
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),
            proposal_matcher=proposal_matchers[0],
            **kwargs,
        )
        self.num_cascade_stages = len(box_heads)
        self.proposal_matchers = list(proposal_matchers)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        args = super().from_config(cfg, input_shape)
        del args["proposal_matcher"]
        return args

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        _check_config(cfg)
        pooler, shape = pooler_from_config(cfg, "ROI_BOX_HEAD", input_shape)
        heads, predictors, matchers = [], [], []
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        for iou, weights in zip(cascade.IOUS, cascade.BBOX_REG_WEIGHTS):
            heads.append(build_box_head(cfg, shape))
            with config_keys(
                "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
            ):
                transform = box2box_transform_for(weights)
                matchers.append(Matcher([iou], [0, 1], allow_low_quality_matches=False))
            shape_of_head = heads[-1].output_shape
            predictors.append(FastRCNNOutputLayers(cfg, shape_of_head, box2box_transform=transform))
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_heads": heads,
            "box_predictors": predictors,
            "proposal_matchers": matchers,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Run all stages. See `StandardROIHeads.forward`; box losses are named "loss_cls_stage0" etc."""
        if not self.training:
            return super().forward(images, features, proposals)
        if targets is None:
            raise ValueError(f"{type(self).__name__} needs targets in training.")
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, proposals, targets)
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def _forward_box(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """Run the box heads of all stages; return losses in training, detections otherwise.

        Training needs `targets`. User code calls this method by name.
        """
        maps = self._select_maps(features, self.box_in_features)
        stages: list[tuple] = []
        for k, predictor in enumerate(self.box_predictor):
            if k > 0:
                previous, predictions, _ = stages[-1]
                proposals = self._refine(previous, predictions, proposals)
                if self.training:
                    proposals = self._match_and_label_boxes(proposals, k, cast(list[Instances], targets))
            stages.append((predictor, self._run_stage(maps, proposals, k), proposals))
        return self._losses(stages) if self.training else self._detections(stages)

    def _run_stage(
        self, features: list[torch.Tensor], proposals: list[Instances], stage: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predictions of a stage for the proposals."""
        # Linear layers need contiguous features, and third-party box heads may flatten them with view().
        pooled = self.box_pooler(features, [x.proposal_boxes for x in proposals]).contiguous()
        if self.training:
            # All stages contribute to the gradient of the feature maps, with a total weight of one.
            pooled = _ScaleGradient.apply(pooled, 1.0 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))  # type: ignore[index]

    @torch.no_grad()
    def _refine(
        self, predictor: nn.Module, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        """Return the boxes that a stage predicts for `proposals`, clipped to the image, as new proposals."""
        refined = []
        for x, boxes in zip(proposals, predictor.predict_boxes(predictions, proposals)):
            box_type = type(x.proposal_boxes)
            if boxes.shape[1] != box_type.box_dim:
                raise ValueError(
                    f"CascadeROIHeads needs one box per region, but a stage predicts "
                    f"{boxes.shape[1] // box_type.box_dim}: give its box_predictors "
                    "cls_agnostic_bbox_reg=True."
                )
            boxes = box_type(boxes)
            boxes.clip(x.image_size)
            refined.append(Instances(x.image_size, proposal_boxes=boxes))
        return refined

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Label the proposals of a later stage with its own matcher, and drop those without area.

        There is no sampling: all stages use the regions sampled for the first one.

        Returns:
            N `Instances` with `proposal_boxes`, `gt_classes` and, if the image has objects, `gt_boxes`.
        """
        labeled = []
        for x, target in zip(proposals, targets):
            matched, x.gt_classes = label_boxes(
                x.proposal_boxes,
                target.gt_boxes,
                self.proposal_matchers[stage],
                gt_classes=target.gt_classes,
                bg_label=self.num_classes,
            )
            if len(target):
                x.gt_boxes = target.gt_boxes[matched]
            usable = x.proposal_boxes.nonempty() & (x.gt_classes >= 0)
            labeled.append(x[usable.nonzero()[:, 0]])
        return labeled

    def _losses(self, stages: Sequence[tuple]) -> dict[str, torch.Tensor]:
        self._log_stage_samples([proposals for _, _, proposals in stages])
        losses = {}
        for k, (predictor, predictions, proposals) in enumerate(stages):
            if has_event_storage():
                with get_event_storage().name_scope(f"stage{k}"):
                    stage_losses = predictor.losses(predictions, proposals)
            else:
                stage_losses = predictor.losses(predictions, proposals)
            losses.update({f"{name}_stage{k}": loss for name, loss in stage_losses.items()})
        return losses

    def _log_stage_samples(self, stages: list[list[Instances]]) -> None:
        """Log the foreground regions per image of each stage but the first, which sampling has logged."""
        if not has_event_storage() or len(stages) < 2:
            return
        labels = [torch.cat([x.gt_classes for x in proposals]) for proposals in stages[1:]]
        num_images = len(stages[0])
        # Fetched together, which synchronizes a GPU once.
        counts = torch.stack([(y == self.num_classes).sum() for y in labels]).tolist()
        storage = get_event_storage()
        for k, (y, num_background) in enumerate(zip(labels, counts), 1):
            prefix = f"stage{k}/roi_head"
            storage.put_scalar(f"{prefix}/num_fg_samples", (len(y) - num_background) / num_images)
            storage.put_scalar(f"{prefix}/num_bg_samples", num_background / num_images)

    def _detections(self, stages: Sequence[tuple]) -> list[Instances]:
        probs = [
            predictor.predict_probs(predictions, proposals) for predictor, predictions, proposals in stages
        ]
        scores = [sum(stage_probs) / len(stages) for stage_probs in zip(*probs)]
        predictor, predictions, proposals = stages[-1]
        detections, _ = fast_rcnn_inference(
            predictor.predict_boxes(predictions, proposals),
            scores,
            [x.image_size for x in proposals],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
            type(proposals[0].proposal_boxes) if proposals else Boxes,
        )
        return detections
