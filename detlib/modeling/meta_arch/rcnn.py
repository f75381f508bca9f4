"""Two-stage detectors (backbone, proposal generator, ROI heads), and the first stage on its own.

Shape legend: N images, C channels, H_i and W_i the size of one image before padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.modeling.backbone import Backbone, build_backbone
from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY
from detlib.modeling.proposal_generator import build_proposal_generator
from detlib.modeling.roi_heads import build_roi_heads
from detlib.structures import ImageList, Instances

__all__ = ["GeneralizedRCNN", "ProposalNetwork"]


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(MetaArchitecture):
    """Faster and Mask R-CNN: a backbone, a proposal generator and ROI heads."""

    compile_modules = ("backbone", "proposal_generator.rpn_head", "roi_heads.box_head")
    supports_tta = True

    @classmethod
    def num_classes_keys(cls, cfg: CfgNode) -> dict[str, str]:
        """See `MetaArchitecture.num_classes_keys`."""
        keys = {"thing_classes": "MODEL.ROI_HEADS.NUM_CLASSES"}
        if cfg.MODEL.KEYPOINT_ON:
            keys["keypoint_names"] = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        return keys

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        return frozenset({"instances", "masks"} if cfg.MODEL.MASK_ON else {"instances"})

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            proposal_generator: maps feature maps to proposals; None if each input dict has "proposals" (Fast
                R-CNN).
            roi_heads: maps proposals to detections.
            pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.
            input_format: order of the channels, such as "BGR", for visualization.
            vis_period: iterations between visualizations; read by a hook, as models do not draw.
        """
        super().__init__()
        if vis_period > 0 and input_format is None:
            raise ValueError(
                "GeneralizedRCNN: vis_period needs input_format, to draw the inputs in their colors."
            )
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.input_format = input_format
        self.vis_period = vis_period
        self.register_pixel_stats(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "roi_heads": build_roi_heads(cfg, backbone.output_shape()),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training, detections otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (C, H_i, W_i) uint8 or float tensor, channels in the order of `input_format`;
                * "instances": `Instances` with the ground truth in pixels of "image"; training only;
                * "proposals": `Instances` with `proposal_boxes` and `objectness_logits`, for models without a
                  proposal generator;
                * "height", "width": the output size; by default the image's own.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with "instances": `pred_boxes`, `scores`,
            `pred_classes`, and with a mask head `pred_masks` (detections, height, width) bool.

        Raises:
            TypeError, ValueError: an input is malformed; the message names the item and the problem.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        gt_instances = self._take_ground_truth(batched_inputs)
        features = self.backbone(images.tensor)
        return self._losses(images, features, batched_inputs, gt_instances)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Detect objects, or run only the heads that follow the boxes.

        Args:
            batched_inputs: as for `forward`.
            detected_instances: N `Instances` with `pred_boxes` and `pred_classes` in pixels of "image". If
                given, boxes are not predicted.
            do_postprocess: whether to scale the results to the output size and paste masks.

        Returns:
            As for `forward`; without `do_postprocess` the N `Instances` themselves, in pixels of "image",
            with `pred_masks` (detections, 1, M, M).
        """
        if self.training:
            raise ValueError("GeneralizedRCNN.inference: the model is in training mode; call eval() first.")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        results = self._detect(images, features, batched_inputs, detected_instances)
        if not do_postprocess:
            return results
        return self._postprocess(results, batched_inputs, images.image_sizes)

    def _detect(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
    ) -> list[Instances]:
        """Run the model after the backbone in inference, and return N `Instances` in pixels of "image"."""
        if detected_instances is not None:
            detected_instances = [x.to(self.device) for x in detected_instances]
            return self.roi_heads.forward_with_given_boxes(features, detected_instances)
        if self.proposal_generator is not None:
            proposals, _ = self.proposal_generator(images, features, None)
        else:
            proposals = self._given_proposals(batched_inputs)
        results, _ = self.roi_heads(images, features, proposals, None)
        return results

    def _losses(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        batched_inputs: list[dict],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """Run the model after the backbone in training, and return the losses."""
        if self.proposal_generator is not None:
            proposals, losses = self.proposal_generator(images, features, gt_instances)
        else:
            proposals, losses = self._given_proposals(batched_inputs), {}
        _, head_losses = self.roi_heads(images, features, proposals, gt_instances)
        return {**head_losses, **losses}

    @staticmethod
    def _postprocess(
        instances: list[Instances], batched_inputs: list[dict], image_sizes: list[tuple[int, int]]
    ) -> list[dict]:
        """Scale detections to the output size and wrap each in a dict; for overrides of `inference`."""
        results = MetaArchitecture.scale_to_output_size(instances, batched_inputs, image_sizes)
        return [{"instances": r} for r in results]

    def tta_predict(self, batched_inputs: list[dict]) -> list[dict]:
        """Predict boxes, without the heads that follow them. See `MetaArchitecture.tta_predict`."""
        heads = self.roi_heads
        before = {name: getattr(heads, name) for name in ("mask_on", "keypoint_on") if hasattr(heads, name)}
        try:
            for name in before:
                setattr(heads, name, False)
            return self._tta_predict(batched_inputs)
        finally:
            for name, value in before.items():
                setattr(heads, name, value)

    def _tta_predict(self, batched_inputs: list[dict]) -> list[dict]:
        return [{"instances": r} for r in self.inference(batched_inputs, do_postprocess=False)]

    def tta_fields(self) -> tuple[str, ...]:
        """Return the fields of the mask and keypoint heads, if any. See `MetaArchitecture.tta_fields`."""
        fields = {"mask_on": "pred_masks", "keypoint_on": "pred_keypoint_heatmaps"}
        return tuple(field for name, field in fields.items() if getattr(self.roi_heads, name, False))

    def tta_predict_for_boxes(
        self, batched_inputs: list[dict], instances: list[Instances]
    ) -> list[Instances]:
        """See `MetaArchitecture.tta_predict_for_boxes`."""
        return GeneralizedRCNN.inference(self, batched_inputs, instances, do_postprocess=False)

    def _given_proposals(self, batched_inputs: list[dict]) -> list[Instances]:
        return self.take_instances(batched_inputs, "proposals", "A model without a proposal generator")

    def _take_ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        """Return the checked "instances" of every dict, on the model's device."""
        num_classes = getattr(self.roi_heads, "num_classes", None)
        return self.take_ground_truth(batched_inputs, num_classes, "MODEL.ROI_HEADS.NUM_CLASSES")


@META_ARCH_REGISTRY.register()
class ProposalNetwork(MetaArchitecture):
    """A backbone and a proposal generator: the first stage of a two-stage detector on its own."""

    compile_modules = ("backbone", "proposal_generator.rpn_head")

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        return frozenset({"proposals"})

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            proposal_generator: maps feature maps to proposals.
            pixel_mean: mean of each channel.
            pixel_std: standard deviation of each channel.
        """
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.register_pixel_stats(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training, proposals otherwise.

        Args:
            batched_inputs: as for `GeneralizedRCNN.forward`; only `gt_boxes` of "instances" are used.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with "proposals": `proposal_boxes` in
            pixels of the output size and `objectness_logits`, in descending score order.
        """
        images = self.preprocess_image(batched_inputs)
        gt_instances = self.take_ground_truth(batched_inputs) if self.training else None
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, gt_instances)
        if self.training:
            return losses
        proposals = self.scale_to_output_size(proposals, batched_inputs, images.image_sizes)
        return [{"proposals": r} for r in proposals]
