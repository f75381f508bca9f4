"""The region proposal network of Faster R-CNN (arXiv:1506.01497).

Shape legend: N images, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A anchors of
one level (or of all), B numbers per box.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import configurable
from detlib.layers import Conv2d, ShapeSpec
from detlib.modeling.anchor_generator import build_anchor_generator, permute_to_N_HWA_K, same_on_all_levels
from detlib.modeling.box_regression import (
    BOX_LOSS_TYPES,
    Box2BoxTransform,
    box2box_transform_for,
    dense_box_regression_loss,
)
from detlib.modeling.config_checks import check_choice, check_features, config_keys
from detlib.modeling.matcher import Matcher
from detlib.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detlib.modeling.proposal_generator.proposal_utils import decode_top_predictions, filter_and_nms
from detlib.modeling.sampling import label_and_sample
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import get_event_storage, has_event_storage
from detlib.utils.registry import Registry

__all__ = ["RPN", "RPN_HEAD_REGISTRY", "StandardRPNHead", "build_rpn_head"]

RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
RPN_HEAD_REGISTRY.__doc__ = """
Classes called as `cls(cfg, input_shape: list[ShapeSpec])`, found by `cfg.MODEL.RPN.HEAD_NAME`. A head maps
L feature maps to L objectness maps (N, A, H, W) and L delta maps (N, A*B, H, W).
"""


def build_rpn_head(cfg, input_shape):
    """Build the RPN head `cfg.MODEL.RPN.HEAD_NAME` for features with the shapes `input_shape`."""
    return RPN_HEAD_REGISTRY.get(cfg.MODEL.RPN.HEAD_NAME, key="MODEL.RPN.HEAD_NAME")(cfg, input_shape)


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then 1x1 convolutions for objectness and box deltas, shared by all levels."""

    @configurable
    def __init__(
        self, *, in_channels: int, num_anchors: int, box_dim: int = 4, conv_dims: Sequence[int] = (-1,)
    ):
        """
        Args:
            in_channels: channels of every feature map, C.
            num_anchors: anchors per pixel, A.
            box_dim: numbers per box, B.
            conv_dims: output channels of each 3x3 convolution; -1 keeps the number of input channels.

        Raises:
            ValueError: `conv_dims` is empty or has numbers other than -1 and positive ones.
        """
        super().__init__()
        conv_dims = list(conv_dims)
        if not conv_dims or any(dim != -1 and dim <= 0 for dim in conv_dims):
            raise ValueError(
                f"conv_dims (MODEL.RPN.CONV_DIMS) must contain -1 or positive numbers, got {conv_dims}"
            )
        convs: list[nn.Module] = []
        channels = in_channels
        for dim in conv_dims:
            out_channels = channels if dim == -1 else dim
            convs.append(Conv2d(channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU()))
            channels = out_channels
        self.conv: nn.Module
        if len(convs) == 1:
            self.conv = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * box_dim, kernel_size=1)
        for conv in (*convs, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Translate `cfg.MODEL.RPN.CONV_DIMS`; number and type of anchors come from the anchor generator."""
        anchor_generator = build_anchor_generator(cfg, input_shape)
        return {
            "in_channels": same_on_all_levels(
                [s.channels for s in input_shape], "channels (MODEL.RPN.IN_FEATURES)"
            ),
            "num_anchors": same_on_all_levels(
                anchor_generator.num_anchors, "the number of anchors (MODEL.ANCHOR_GENERATOR)"
            ),
            "box_dim": anchor_generator.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Predict on each level.

        Args:
            features: L feature maps (N, C, H, W).

        Returns:
            L objectness logits (N, A, H, W), and L deltas (N, A*B, H, W).
        """
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(t) for t in hidden], [self.anchor_deltas(t) for t in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Scores and refines anchors, and returns the best as proposals.

    The boxes have the type of the anchors, a class that implements IoU, clipping and NMS. `box2box_transform`
    must support that type.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        anchor_boundary_thresh: float = -1.0,
        loss_weight: float | dict[str, float] = 1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ):
        """
        Args:
            in_features: names of the backbone's features to use, in the order of the generator's levels.
            head: see `RPN_HEAD_REGISTRY`.
            anchor_generator: maps L feature maps to L sets of anchors.
            anchor_matcher: labels anchors foreground (1), background (0) or ignored (-1) by their IoU.
            box2box_transform: encoding of the boxes.
            batch_size_per_image: number of anchors per image that enter the losses.
            positive_fraction: largest fraction of foreground among them.
            pre_nms_topk: number of boxes per level and image to keep before NMS, in training and in
                inference.
            post_nms_topk: number of boxes per image to keep after NMS, in training and in inference.
            nms_thresh: IoU above which the lower scoring of two boxes is dropped.
            min_box_size: boxes must be wider and higher than this, in pixels of the network input.
            anchor_boundary_thresh: anchors that extend beyond the image by more than this, in pixels, are
                ignored in training; negative for none.
            loss_weight: factor of the losses, one for all or by name: "loss_rpn_cls", "loss_rpn_loc".
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            smooth_l1_beta: transition point from quadratic to linear; 0 is the L1 loss.

        Raises:
            ValueError: `box2box_transform` is for another type of boxes than the anchors.
        """
        super().__init__()
        box_dim = getattr(box2box_transform, "box_dim", anchor_generator.box_dim)
        if box_dim != anchor_generator.box_dim:
            raise ValueError(
                f"{type(box2box_transform).__name__} (MODEL.RPN.BBOX_REG_WEIGHTS) is for boxes of {box_dim} "
                f"numbers, {type(anchor_generator).__name__} (MODEL.ANCHOR_GENERATOR.NAME) generates "
                f"boxes of {anchor_generator.box_dim}"
            )
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}  # by self.training
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = float(min_box_size)
        self.anchor_boundary_thresh = anchor_boundary_thresh
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_rpn_cls": loss_weight, "loss_rpn_loc": loss_weight}
        self.loss_weight = loss_weight
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        """Translate `cfg.MODEL.RPN` and `cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE`."""
        rpn = cfg.MODEL.RPN
        check_choice(rpn.BBOX_REG_LOSS_TYPE, BOX_LOSS_TYPES, "MODEL.RPN.BBOX_REG_LOSS_TYPE")
        check_features(rpn.IN_FEATURES, input_shape, "MODEL.RPN.IN_FEATURES")
        with config_keys("MODEL.RPN.IOU_THRESHOLDS", "MODEL.RPN.IOU_LABELS"):
            matcher = Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True)
        with config_keys("MODEL.RPN.BBOX_REG_WEIGHTS"):
            transform = box2box_transform_for(rpn.BBOX_REG_WEIGHTS)
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        return {
            "in_features": rpn.IN_FEATURES,
            "head": build_rpn_head(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": matcher,
            "box2box_transform": transform,
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ):
        """Propose boxes, and compute the losses in training.

        Args:
            images: N images; only their sizes before padding are used.
            features: feature maps (N, C, H, W) by name.
            gt_instances: N `Instances` with `gt_boxes`; required in training.

        Returns:
            proposals: list[Instances], N with `proposal_boxes` and `objectness_logits` in descending score
                order.
            losses: dict[str, Tensor], empty unless in training.

        Raises:
            ValueError: there is no ground truth in training.
        """
        if any(name not in features for name in self.in_features):
            check_features(self.in_features, features, "in_features of the RPN (MODEL.RPN.IN_FEATURES)")
        features = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(features)
        logits, deltas = self.rpn_head(features)
        logits = [permute_to_N_HWA_K(x, 1).squeeze(2) for x in logits]
        deltas = [permute_to_N_HWA_K(x, self.anchor_generator.box_dim) for x in deltas]
        losses = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("RPN needs gt_instances in training; each input dict must have 'instances'")
            gt_labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Sample the anchors that enter the losses, and compute their targets.

        Args:
            anchors: anchors of each level.
            gt_instances: N `Instances` with `gt_boxes`.

        Returns:
            gt_labels: N tensors (R,) int8 over all levels: 1 foreground, 0 background, -1 not sampled.
            gt_boxes: N tensors (R, B): each anchor's best ground truth; undefined unless the label is 1.
        """
        anchors = type(anchors[0]).cat(anchors)
        gt_labels, matched_gt_boxes = [], []
        for gt in gt_instances:
            ignore = None
            if self.anchor_boundary_thresh >= 0:
                ignore = ~anchors.inside_box(gt.image_size, self.anchor_boundary_thresh)
            gt_boxes = gt.gt_boxes
            sample = label_and_sample(
                anchors,
                gt_boxes,
                self.anchor_matcher,
                num_samples=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
                bg_label=0,
                ignore=ignore,
            )
            labels = torch.full_like(sample.labels, -1, dtype=torch.int8)
            labels[sample.fg_idxs] = 1
            labels[sample.bg_idxs] = 0
            gt_labels.append(labels)
            if gt_boxes.tensor.shape[0]:
                matched_gt_boxes.append(gt_boxes.tensor[sample.matched_idxs])
            else:
                matched_gt_boxes.append(torch.zeros_like(anchors.tensor))
        return gt_labels, matched_gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Compute the losses, summed over the sampled anchors and divided by `batch_size_per_image * N`.

        Args:
            anchors: anchors of each level.
            pred_objectness_logits: L tensors (N, R).
            gt_labels: N tensors (R,) over all levels, see `label_and_sample_anchors`.
            pred_anchor_deltas: L tensors (N, R, B).
            gt_boxes: N tensors (R, B), see `label_and_sample_anchors`.

        Returns:
            dict[str, Tensor]: the scalars "loss_rpn_cls" and "loss_rpn_loc".
        """
        num_images = len(gt_labels)
        labels = torch.stack(gt_labels)
        sampled = (labels >= 0).nonzero(as_tuple=True)
        sampled_labels = labels[sampled]
        is_fg = (sampled_labels == 1).nonzero().flatten()
        if has_event_storage():
            storage = get_event_storage()
            num_fg, num_sampled = len(is_fg), len(sampled_labels)
            storage.put_scalar("rpn/num_pos_anchors", num_fg / num_images)
            storage.put_scalar("rpn/num_neg_anchors", (num_sampled - num_fg) / num_images)
        box_loss = dense_box_regression_loss(
            type(anchors[0]).cat(anchors),
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            (sampled[0][is_fg], sampled[1][is_fg]),
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        logits = torch.cat(pred_objectness_logits, dim=1)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(
            logits, sampled_labels.to(logits.dtype), reduction="sum"
        )
        normalizer = self.batch_size_per_image * num_images
        losses = {"loss_rpn_cls": objectness_loss / normalizer, "loss_rpn_loc": box_loss / normalizer}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decode the best predictions of each level and apply NMS.

        No gradient flows through the coordinates of the proposals.

        Args:
            anchors: anchors of each level.
            pred_objectness_logits: L tensors (N, R).
            pred_anchor_deltas: L tensors (N, R, B).
            image_sizes: N pairs (height, width) of the images before padding.

        Returns:
            list[Instances]: see `forward`.

        Raises:
            FloatingPointError: predictions are not finite in training.
        """
        boxes, scores, level_ids = decode_top_predictions(
            anchors,
            pred_objectness_logits,
            pred_anchor_deltas,
            self.box2box_transform,
            self.pre_nms_topk[self.training],
        )
        return filter_and_nms(
            boxes,
            scores,
            level_ids,
            image_sizes,
            self.nms_thresh,
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
            type(anchors[0]),
        )
