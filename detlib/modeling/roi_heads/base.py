"""What all second stages share: their registry, and matching and sampling of regions.

Shape legend: N images, R_i regions of one image, K classes (label K is the background).
"""

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.config_checks import check_count, config_keys
from detlib.modeling.matcher import Matcher
from detlib.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detlib.modeling.roi_heads.training_stats import put_scalars, to_floats
from detlib.modeling.sampling import label_and_sample
from detlib.structures import ImageList, Instances
from detlib.utils.events import has_event_storage
from detlib.utils.registry import Registry

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "build_roi_heads",
    "check_given_boxes",
    "select_foreground_proposals",
]

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = """
Second stages of R-CNN models: `ROIHeads`. An entry is called as `entry(cfg, input_shape)` with a dict from
feature name to `ShapeSpec`.
"""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the heads that `cfg.MODEL.ROI_HEADS.NAME` names."""
    name = cfg.MODEL.ROI_HEADS.NAME
    return ROI_HEADS_REGISTRY.get(name, key="MODEL.ROI_HEADS.NAME")(cfg, input_shape)


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Keep the regions that are matched to an object.

    Args:
        proposals: N `Instances` with `gt_classes`.
        bg_label: the label of the background, K; -1 is a region to ignore.

    Returns:
        N `Instances`, and for each a (R_i,) bool tensor that says which regions they are.
    """
    for x in proposals:
        if not x.has("gt_classes"):
            raise ValueError("select_foreground_proposals needs proposals with 'gt_classes'.")
    masks = [(x.gt_classes != -1) & (x.gt_classes != bg_label) for x in proposals]
    return [x[mask.nonzero()[:, 0]] for x, mask in zip(proposals, masks)], masks


def check_given_boxes(heads: nn.Module, instances: list[Instances]) -> None:
    """Raise ValueError unless `heads` can run its other heads on the boxes of `instances`."""
    if heads.training:
        raise ValueError("forward_with_given_boxes is for inference; call eval() first.")
    for x in instances:
        if not (x.has("pred_boxes") and x.has("pred_classes")):
            raise ValueError(
                "forward_with_given_boxes needs instances with 'pred_boxes' and 'pred_classes'; got "
                f"{sorted(x.get_fields())}."
            )


class ROIHeads(nn.Module):
    """What all second stages share: matching regions with true boxes and sampling a set to train on.

    Args:
        num_classes: K, the background not counted.
        batch_size_per_image: regions sampled from each image.
        positive_fraction: at most this part of them is foreground.
        proposal_matcher: gives each region a true box, or calls it background.
        proposal_append_gt: let the true boxes be regions too.
    """

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
        """Match each image's regions with its objects and sample regions to train on.

        Args:
            proposals: N `Instances` with `proposal_boxes` and `objectness_logits`.
            targets: N `Instances` with `gt_boxes`, `gt_classes` and any other `gt_` fields.

        Returns:
            N `Instances` of at most `batch_size_per_image` regions with `proposal_boxes`, `gt_classes`
            (int64, K for background) and, when the image has objects, every other `gt_` field of the object
            that the region was matched with. A background region's matched object means nothing.
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
            sampled = proposals_per_image[sampled_idxs]
            sampled.gt_classes = sample.labels[sampled_idxs]
            if len(targets_per_image) > 0:
                matched = sample.matched_idxs[sampled_idxs]
                for name, value in targets_per_image.get_fields().items():
                    if name.startswith("gt_") and not sampled.has(name):
                        sampled.set(name, value[matched])
            sampled_proposals.append(sampled)
        self._log_sample_stats(sampled_proposals)
        return sampled_proposals

    def _log_sample_stats(self, proposals: list[Instances]) -> None:
        if not has_event_storage():
            return
        is_background = torch.cat([p.gt_classes for p in proposals]) == self.num_classes
        (num_background,) = to_floats(is_background.sum())
        put_scalars(
            "roi_head",
            num_fg_samples=(len(is_background) - num_background) / len(proposals),
            num_bg_samples=num_background / len(proposals),
        )

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
            targets: N `Instances` with the truth (`gt_boxes`, `gt_classes`, ...); training only.

        Returns:
            In training the sampled proposals and a dict of losses, else detections and an empty dict.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward.")
