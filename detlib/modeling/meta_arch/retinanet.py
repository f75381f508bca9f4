"""RetinaNet (arXiv:1708.02002): an anchor-based one-stage detector with the focal loss.

Shape legend: N images, C channels, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A
anchors of one level (or of all), K classes (label K is the background), B = 4 numbers per box.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.layers import CycleBatchNormList, ShapeSpec, get_norm
from detlib.modeling.anchor_generator import build_anchor_generator, check_rows, same_on_all_levels
from detlib.modeling.backbone import Backbone, build_backbone
from detlib.modeling.box_regression import BOX_LOSS_TYPES, Box2BoxTransform, dense_box_regression_loss
from detlib.modeling.config_checks import check_choice, check_count, check_features, check_norm, config_keys
from detlib.modeling.matcher import Matcher
from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY
from detlib.modeling.meta_arch.dense_detector import DenseDetector, candidates_from_logits, sigmoid_float32
from detlib.modeling.sampling import label_boxes
from detlib.structures import Boxes, ImageList, Instances

__all__ = ["RetinaNet", "RetinaNetHead"]

logger = logging.getLogger(__name__)

_PER_LEVEL_NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


@META_ARCH_REGISTRY.register()
class RetinaNet(DenseDetector):
    """A detector that classifies and refines anchors on every pixel of a feature pyramid."""

    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"

    @classmethod
    def num_classes_keys(cls, cfg: CfgNode) -> dict[str, str]:
        """See `MetaArchitecture.num_classes_keys`."""
        return {"thing_classes": cls.num_classes_key}

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            head: maps L feature maps to L class logits (N, A*K, H, W) and L deltas (N, A*4, H, W).
            head_in_features: names of the features for the head, in the order of the generator's levels.
            anchor_generator: maps L feature maps to L sets of anchors.
            box2box_transform: encoding of the boxes.
            anchor_matcher: labels anchors foreground (1), background (0) or ignored (-1) by their IoU.
            num_classes: K, without the background.
            focal_loss_alpha: weight of the foreground in the focal loss; negative for no weights.
            focal_loss_gamma: focusing parameter of the focal loss.
            smooth_l1_beta: transition point from quadratic to linear; 0 is the L1 loss.
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            test_score_thresh: detections must score above this.
            test_topk_candidates: maximum number of predictions of each level and image before NMS.
            test_nms_thresh: IoU above which the lower scoring of two boxes of a class is dropped.
            max_detections_per_image: maximum number of detections per image; negative for all.
            pixel_mean: mean of each channel, in the pixels' own unit.
            pixel_std: standard deviation of each channel.
            vis_period: iterations between visualizations; read by a hook, as models do not draw.
            input_format: order of the channels, such as "BGR", for visualization.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        check_choice(
            box_reg_loss_type, BOX_LOSS_TYPES, "box_reg_loss_type (MODEL.RETINANET.BBOX_REG_LOSS_TYPE)"
        )
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Translate `cfg.MODEL.RETINANET`."""
        retinanet = cfg.MODEL.RETINANET
        check_count(retinanet.NUM_CLASSES, "MODEL.RETINANET.NUM_CLASSES")
        with config_keys("MODEL.RETINANET.IOU_THRESHOLDS", "MODEL.RETINANET.IOU_LABELS"):
            matcher = Matcher(retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, allow_low_quality_matches=True)
        with config_keys("MODEL.RETINANET.BBOX_REG_WEIGHTS"):
            transform = Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        check_features(retinanet.IN_FEATURES, shapes, "MODEL.RETINANET.IN_FEATURES")
        shapes = [shapes[name] for name in retinanet.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": RetinaNetHead(cfg, shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": transform,
            "anchor_matcher": matcher,
            "num_classes": retinanet.NUM_CLASSES,
            "focal_loss_alpha": retinanet.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": retinanet.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": retinanet.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": retinanet.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def _anchors_for(self, features: list[torch.Tensor], logits: list[torch.Tensor]) -> list[Boxes]:
        anchors = self.anchor_generator(features)
        check_rows(anchors, logits, "the head's num_anchors must be the anchor generator's")
        return anchors

    def forward_training(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """Compute `losses`. See `DenseDetector.forward_training`."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self._anchors_for(features, logits)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Compute the losses, summed over anchors and divided by the average number of foreground anchors.

        This number is averaged over the last iterations, so that batches with few objects weigh less than
        those with many.

        Args:
            anchors: anchors of each level.
            pred_logits: L tensors (N, R, K).
            gt_labels: N tensors (R,) over all levels, see `label_anchors`.
            pred_anchor_deltas: L tensors (N, R, B).
            gt_boxes: N tensors (R, B), see `label_anchors`.

        Returns:
            dict[str, Tensor]: the scalars "loss_cls" and "loss_box_reg".
        """
        labels, fg_idxs, normalizer = self._count_foreground(gt_labels, initial_normalizer=100)
        loss_cls = self._classification_loss(pred_logits, labels)
        loss_box_reg = dense_box_regression_loss(
            type(anchors[0]).cat(anchors),
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            fg_idxs,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box_reg / normalizer}

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Compute the target class and box of each anchor.

        Args:
            anchors: anchors of each level.
            gt_instances: N `Instances` with `gt_boxes` and `gt_classes`.

        Returns:
            gt_labels: N tensors (R,) int64 over all levels: a class in [0, K), K for background, -1 for
            ignored anchors.
            gt_boxes: N tensors (R, B): each anchor's best ground truth; undefined unless it is foreground.
        """
        anchors = type(anchors[0]).cat(anchors)
        gt_labels, matched_gt_boxes = [], []
        for gt in gt_instances:
            matched_idxs, labels = label_boxes(
                anchors,
                gt.gt_boxes,
                self.anchor_matcher,
                gt_classes=gt.gt_classes,
                bg_label=self.num_classes,
            )
            gt_labels.append(labels)
            matched_gt_boxes.append(
                gt.gt_boxes.tensor[matched_idxs] if len(gt) else torch.zeros_like(anchors.tensor)
            )
        return gt_labels, matched_gt_boxes

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detect objects, in boxes that are not clipped. See `DenseDetector.forward_inference`."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self._anchors_for(features, logits)
        if self._has_own_inference:
            scores = [sigmoid_float32(x) for x in logits]
            return self._detect_one_by_one(anchors, scores, deltas, images.image_sizes)
        candidates = [candidates_from_logits(x, self.test_score_thresh) for x in logits]
        return self._detect(anchors, candidates, deltas, images.image_sizes)


def _subnet_norm(norm: str | Callable, num_levels: int) -> str | Callable:
    """Return the norm argument for the head's subnets; BN and SyncBN get separate statistics per level."""
    if isinstance(norm, str) and norm in _PER_LEVEL_NORMS:
        logger.info("RetinaNetHead: %s keeps separate statistics for each of %d levels", norm, num_levels)
        bn_class = _PER_LEVEL_NORMS[norm]
        return lambda channels: CycleBatchNormList(num_levels, bn_class=bn_class, num_features=channels)
    name = norm if isinstance(norm, str) else getattr(norm, "__name__", type(norm).__name__)
    if "BN" in name or "BatchNorm" in name:
        logger.warning(
            "RetinaNetHead: one %s shared by all levels mixes their statistics; GN, BN or SyncBN may work "
            "better",
            name,
        )
    return norm


class RetinaNetHead(nn.Module):
    """Two stacks of 3x3 convolutions, for class logits and for box deltas, shared by all levels."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str | Callable[[int], nn.Module] = "",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            input_shape: channels of each level, the same on all.
            num_classes: K, without the background.
            num_anchors: anchors per pixel, A.
            conv_dims: output channels of each 3x3 convolution before the last; may be empty.
            norm: their normalization, see `detlib.layers.get_norm`. "BN" and "SyncBN" keep separate
                statistics for each level.
            prior_prob: the initial score of every class.

        Raises:
            ValueError: channels differ between levels, or the prior is outside (0, 1).
        """
        super().__init__()
        channels = same_on_all_levels([s.channels for s in input_shape], "channels (of head_in_features)")
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob (MODEL.RETINANET.PRIOR_PROB) must be in (0, 1), got {prior_prob}")
        self._num_features = len(input_shape)
        conv_dims = list(conv_dims)
        norm = _subnet_norm(norm, self._num_features)
        self.cls_subnet = self._subnet(channels, conv_dims, norm)
        self.bbox_subnet = self._subnet(channels, conv_dims, norm)
        self._out_channels = conv_dims[-1] if conv_dims else channels
        self.cls_score = self._predictor(num_anchors * num_classes)
        self.bbox_pred = self._predictor(num_anchors * 4)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Translate `cfg.MODEL.RETINANET`; the number of anchors comes from the anchor generator."""
        retinanet = cfg.MODEL.RETINANET
        check_norm(retinanet.NORM, "MODEL.RETINANET.NORM")
        channels = same_on_all_levels(
            [s.channels for s in input_shape], "the number of channels (MODEL.RETINANET.IN_FEATURES)"
        )
        return {
            "input_shape": input_shape,
            "num_classes": retinanet.NUM_CLASSES,
            "num_anchors": same_on_all_levels(
                build_anchor_generator(cfg, input_shape).num_anchors,
                "the number of anchors (MODEL.ANCHOR_GENERATOR)",
            ),
            "conv_dims": [channels] * retinanet.NUM_CONVS,
            "norm": retinanet.NORM,
            "prior_prob": retinanet.PRIOR_PROB,
        }

    @staticmethod
    def _subnet(channels: int, conv_dims: list[int], norm: str | Callable) -> nn.Sequential:
        layers = []
        for dim in conv_dims:
            conv = nn.Conv2d(channels, dim, kernel_size=3, padding=1)
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
            layers += [conv, get_norm(norm, dim), nn.ReLU()]
            channels = dim
        return nn.Sequential(*(layer for layer in layers if layer is not None))

    def _predictor(self, num_outputs: int) -> nn.Conv2d:
        conv = nn.Conv2d(self._out_channels, num_outputs, kernel_size=3, padding=1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        return conv

    def _check_levels(self, features: list[torch.Tensor]) -> None:
        if len(features) != self._num_features:
            raise ValueError(
                f"the head is built for {self._num_features} levels, got {len(features)} feature maps"
            )

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Predict on each level.

        Args:
            features: L feature maps (N, C, H, W).

        Returns:
            L class logits (N, A*K, H, W), and L deltas (N, A*4, H, W).

        Raises:
            ValueError: the number of feature maps differs from `input_shape`.
        """
        self._check_levels(features)
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        deltas = [self.bbox_pred(self.bbox_subnet(x)) for x in features]
        return logits, deltas
