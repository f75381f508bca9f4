"""FCOS (arXiv:1904.01355, with the improvements of arXiv:2006.09214): each point of a feature map predicts a
box.

Shape legend: N images, C channels, L feature levels, H and W one level's size, R = H*W points of one level
(or of all), K classes (label K is the background), M ground-truth boxes.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.anchor_generator import DefaultAnchorGenerator
from detlib.modeling.backbone import Backbone
from detlib.modeling.box_regression import Box2BoxTransformLinear, dense_box_regression_loss
from detlib.modeling.meta_arch.dense_detector import DenseDetector, candidates_from_logits, sigmoid_float32
from detlib.modeling.meta_arch.retinanet import RetinaNetHead
from detlib.structures import Boxes, ImageList, Instances, pairwise_point_box_distance

__all__ = ["FCOS", "FCOSHead"]

# (point, box) pairs per chunk: 32 MiB for a float32 (points, boxes, 4) tensor.
_MAX_PAIRS = 2**21


class FCOS(DenseDetector):
    """An anchor-free detector: each point predicts its distances to the four sides of a box.

    A point is represented by a square around it whose side is the stride of its level, so distances are in
    units of the stride.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        box2box_transform=None,
        num_classes: int,
        center_sampling_radius: float = 1.5,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        test_score_thresh: float = 0.2,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            head: maps L feature maps to L class logits (N, K, H, W), L distances (N, 4, H, W) and L
                centerness logits (N, 1, H, W).
            head_in_features: names of the features that the head takes, in ascending stride order; by default
                all.
            box2box_transform: encoding of the boxes; by default `Box2BoxTransformLinear`.
            num_classes: K, without the background.
            center_sampling_radius: maximum distance of a foreground point from the center of its box, in
                strides.
            focal_loss_alpha: weight of the foreground in the focal loss; negative for no weights.
            focal_loss_gamma: focusing parameter of the focal loss.
            test_score_thresh: detections must score above this.
            test_topk_candidates: maximum number of predictions of each level and image before NMS.
            test_nms_thresh: IoU above which the lower scoring of two boxes of a class is dropped.
            max_detections_per_image: maximum number of detections per image; negative for all.
            pixel_mean: mean of each channel, in the pixels' own unit.
            pixel_std: standard deviation of each channel.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides
        )
        self.box2box_transform = box2box_transform or Box2BoxTransformLinear(normalize_by_size=True)
        self.center_sampling_radius = float(center_sampling_radius)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def forward_training(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """Compute `losses`. See `DenseDetector.forward_training`."""
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)

    @torch.no_grad()
    def _match_points(self, anchors: list[Boxes], gt_boxes: Boxes) -> tuple[torch.Tensor, torch.Tensor]:
        """Assign each point to one of M boxes.

        A point matches the boxes that contain it, whose center is near, and whose farthest side is at a
        distance that suits its level: 4 to 8 strides, without a lower limit on the first level and an upper
        limit on the last. Of several boxes it is assigned to the smallest.

        Returns:
            (R,) int64, the box of each point, and (R,) bool, whether it has one.
        """
        points = torch.cat([a.get_centers() for a in anchors])
        strides = torch.cat([a.tensor[:, 2] - a.tensor[:, 0] for a in anchors])
        nearest, furthest = 4 * strides, 8 * strides
        nearest[: len(anchors[0])] = 0
        furthest[len(strides) - len(anchors[-1]) :] = math.inf
        best_area = torch.full_like(strides, math.inf)
        matched = torch.zeros_like(strides, dtype=torch.int64)
        step = max(1, _MAX_PAIRS // max(1, len(points)))
        for start in range(0, len(gt_boxes), step):
            part = gt_boxes[start : start + step]
            distance = pairwise_point_box_distance(points, part)  # (R, step, 4)
            to_center = (points[:, None] - part.get_centers()).abs().amax(dim=2)
            furthest_side = distance.amax(dim=2)
            fits = (
                (distance.amin(dim=2) > 0)
                & (to_center < self.center_sampling_radius * strides[:, None])
                & (furthest_side > nearest[:, None])
                & (furthest_side < furthest[:, None])
            )
            area, index = torch.where(fits, part.area().to(strides.dtype), math.inf).min(dim=1)
            smaller = area < best_area
            matched = torch.where(smaller, index + start, matched)
            best_area = torch.where(smaller, area, best_area)
        return matched, best_area < math.inf

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Compute the target class and box of each point.

        Args:
            anchors: points of each level, as squares.
            gt_instances: N `Instances` with `gt_boxes` and `gt_classes`.

        Returns:
            gt_labels: N tensors (R,) int64 over all levels: a class in [0, K), or K for background.
            gt_boxes: N tensors (R, 4): the box of each point; undefined for background.
        """
        num_points = sum(len(a) for a in anchors)
        gt_labels, matched_gt_boxes = [], []
        for gt in gt_instances:
            if len(gt):
                matched, is_fg = self._match_points(anchors, gt.gt_boxes)
                gt_labels.append(gt.gt_classes[matched].masked_fill(~is_fg, self.num_classes))
                matched_gt_boxes.append(gt.gt_boxes.tensor[matched])
            else:
                boxes = anchors[0].tensor
                gt_labels.append(boxes.new_full((num_points,), self.num_classes, dtype=torch.int64))
                matched_gt_boxes.append(boxes.new_zeros(num_points, 4))
        return gt_labels, matched_gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
        pred_centerness: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Compute the losses, summed over points and divided by the average number of foreground points.

        Args:
            anchors: points of each level, as squares.
            pred_logits: L tensors (N, R, K).
            gt_labels: N tensors (R,) over all levels, see `label_anchors`.
            pred_anchor_deltas: L tensors (N, R, 4).
            gt_boxes: N tensors (R, 4), see `label_anchors`.
            pred_centerness: L tensors (N, R, 1) of logits.

        Returns:
            dict[str, Tensor]: the scalars "loss_fcos_cls", "loss_fcos_loc" (GIoU) and "loss_fcos_ctr".
        """
        labels, fg_idxs, normalizer = self._count_foreground(gt_labels, initial_normalizer=300)
        all_anchors = Boxes.cat(anchors)
        loss_loc = dense_box_regression_loss(
            all_anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, fg_idxs, "giou"
        )
        centerness = self.compute_ctrness_targets(anchors, gt_boxes)[fg_idxs]
        logits = torch.cat(pred_centerness, dim=1)[..., 0][fg_idxs]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_ctr = F.binary_cross_entropy_with_logits(logits, centerness.to(logits.dtype), reduction="sum")
        return {
            "loss_fcos_cls": self._classification_loss(pred_logits, labels) / normalizer,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        }

    def _centerness(self, anchors: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
        """Return the (P,) centerness of (P, 4) anchors in (P, 4) boxes: 1 at the center, 0 outside."""
        sides = self.box2box_transform.get_deltas(anchors, gt_boxes)
        pairs = sides.unflatten(-1, (2, 2))  # (left, top), (right, bottom)
        near, far = pairs.amin(dim=-2).clamp(min=0), pairs.amax(dim=-2)
        ratio = torch.where(far > 0, near / far, torch.zeros_like(near))
        return ratio.prod(dim=-1).sqrt()

    def compute_ctrness_targets(self, anchors: list[Boxes], gt_boxes: list[torch.Tensor]) -> torch.Tensor:
        """Compute the centerness of each point in its box.

        It is sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)).

        Args:
            anchors: points of each level, as squares.
            gt_boxes: N tensors (R, 4), see `label_anchors`.

        Returns:
            (N, R) in [0, 1]; 0 for points outside.
        """
        points = Boxes.cat(anchors).tensor
        return torch.stack([self._centerness(points, boxes) for boxes in gt_boxes])

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detect objects; a score is the geometric mean of class and centerness.

        See `DenseDetector.forward_inference`.
        """
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        if self._has_own_inference:
            scores = [(sigmoid_float32(x) * sigmoid_float32(c)).sqrt() for x, c in zip(logits, centerness)]
            return self._detect_one_by_one(anchors, scores, deltas, images.image_sizes)
        candidates = [
            candidates_from_logits(x, self.test_score_thresh, c) for x, c in zip(logits, centerness)
        ]
        return self._detect(anchors, candidates, deltas, images.image_sizes)


class FCOSHead(RetinaNetHead):
    """RetinaNet's head for one anchor per pixel, with the centerness as a third prediction.

    Unlike in the paper there is no learned scale per level: distances are in units of the stride.
    """

    def __init__(self, *, input_shape: list[ShapeSpec], conv_dims: list[int], **kwargs):
        """
        Args:
            input_shape: channels of each level, the same on all.
            conv_dims: output channels of each 3x3 convolution before the last; may be empty.
            **kwargs: `num_classes`, `norm` and `prior_prob`, see `RetinaNetHead`.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.ctrness = self._predictor(1)

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Predict on each level.

        Args:
            features: L feature maps (N, C, H, W).

        Returns:
            L class logits (N, K, H, W), L distances (N, 4, H, W) and L centerness logits (N, 1, H, W).

        Raises:
            ValueError: the number of feature maps differs from `input_shape`.
        """
        self._check_levels(features)
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        hidden = [self.bbox_subnet(x) for x in features]
        return logits, [self.bbox_pred(h) for h in hidden], [self.ctrness(h) for h in hidden]
