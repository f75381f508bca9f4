"""The base class of one-stage detectors, and the selection of detections from dense predictions.

Shape legend: N images, C channels, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A
anchors of one level (or of all), K classes (or numbers per anchor), B numbers per box, P selected predictions
of all images together.
"""

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.modeling.anchor_generator import permute_to_N_HWA_K
from detlib.modeling.backbone import Backbone
from detlib.modeling.config_checks import check_features
from detlib.modeling.focal_loss import focal_loss_sum
from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import get_event_storage, has_event_storage

__all__ = [
    "Candidates",
    "DenseDetector",
    "best_candidates",
    "candidates_from_logits",
    "candidates_from_scores",
    "decode_candidates",
    "detections_per_image",
    "permute_to_N_HWA_K",
    "sigmoid_float32",
]


class DenseDetector(MetaArchitecture, metaclass=ABCMeta):
    """A backbone and a head that predicts on every pixel of the backbone's features.

    A subclass implements the losses (`forward_training`) and the detections (`forward_inference`).
    """

    num_classes_key = "num_classes"
    """The name of the number of classes in error messages."""

    reference_lr_per_image = 0.01 / 16
    compile_modules = ("backbone", "head")
    supports_tta = True

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        return frozenset({"instances"})

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            head: maps L feature maps to a tuple of predictions, each L tensors (N, ..., H, W).
            head_in_features: names of the features that the head takes; by default all, in ascending stride
                order.
            pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.

        Raises:
            ValueError: the backbone has no feature of a name.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if head_in_features is None:
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride)
        check_features(list(head_in_features), shapes, "head_in_features")
        self.backbone = backbone
        self.head = head
        self.head_in_features = list(head_in_features)
        self._averages: set[str] = set()  # names of the attributes that `_ema_update` keeps
        self.register_pixel_stats(pixel_mean, pixel_std)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training, detections otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (C, H_i, W_i) uint8 or float tensor;
                * "instances": `Instances` with `gt_boxes` and `gt_classes` in pixels of "image"; training
                  only;
                * "height", "width": the output size; by default the image's own.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with "instances": `pred_boxes`, `scores`
            and `pred_classes`, in descending score order.

        Raises:
            TypeError, ValueError: an input is malformed; the message names the item and the problem.
        """
        images = self.preprocess_image(batched_inputs)
        gt_instances = None
        if self.training:
            num_classes = getattr(self, "num_classes", None)
            gt_instances = self.take_ground_truth(batched_inputs, num_classes, self.num_classes_key)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        predictions = self.head(features)
        if self.training:
            return self.forward_training(images, features, predictions, gt_instances)
        results = self.forward_inference(images, features, predictions)
        results = self.scale_to_output_size(results, batched_inputs, images.image_sizes)
        return [{"instances": r} for r in results]

    def tta_merge_limits(self, cfg: CfgNode) -> tuple[float, int]:
        """See `MetaArchitecture.tta_merge_limits`; the limits are the model's own."""
        return self.test_nms_thresh, self.max_detections_per_image

    @abstractmethod
    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        """Compute the losses.

        Args:
            images: N images, as returned by `preprocess_image`.
            features: L feature maps (N, C, H, W).
            predictions: the head's output for `features`.
            gt_instances: N `Instances`, on the model's device.

        Returns:
            Scalar losses by name.
        """

    @abstractmethod
    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Turn the head's predictions into detections.

        Args:
            images, features, predictions: see `forward_training`.

        Returns:
            N `Instances` in pixels of the network input.
        """

    def _transpose_dense_predictions(
        self, predictions: list[list[torch.Tensor]], dims_per_anchor: list[int]
    ) -> list[list[torch.Tensor]]:
        """Rearrange each prediction of K numbers per anchor from L (N, A*K, H, W) to L (N, R, K)."""
        return [
            [permute_to_N_HWA_K(x, numbers) for x in levels]
            for levels, numbers in zip(predictions, dims_per_anchor)
        ]

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        """Update the moving average in the attribute `name` with `value`, and return it.

        It is a plain number, separate in each process, not a parameter. It starts at `initial_value`.
        """
        average = getattr(self, name, initial_value) * momentum + value * (1 - momentum)
        setattr(self, name, average)
        self._averages.add(name)
        return average

    def training_state(self) -> dict[str, float]:
        """Return the moving averages, which checkpoints store for resuming."""
        # A validation before the first step removes the averages that it added.
        return {name: getattr(self, name) for name in sorted(self._averages) if hasattr(self, name)}

    def load_training_state(self, state: dict[str, float]) -> None:
        """Restore the result of `training_state`."""
        for name, average in state.items():
            setattr(self, name, average)
        self._averages = set(state)

    def _count_foreground(self, gt_labels: list[torch.Tensor], initial_normalizer: float):
        """Find the foreground anchors of a batch, log their number, and update the losses' normalizer.

        Args:
            gt_labels: N tensors (R,) int64; K is background, negative labels are ignored.
            initial_normalizer: the initial average number of foreground anchors per batch.

        Returns:
            labels: (N, R) int64.
            fg_idxs: two int64 tensors, the image and the anchor of each foreground anchor.
            normalizer: a plain number.
        """
        labels = torch.stack(gt_labels)
        fg_idxs = ((labels >= 0) & (labels != self.num_classes)).nonzero(as_tuple=True)
        num_fg = len(fg_idxs[0])
        if has_event_storage():
            get_event_storage().put_scalar("num_pos_anchors", num_fg / len(gt_labels))
        return labels, fg_idxs, self._ema_update("loss_normalizer", max(num_fg, 1), initial_normalizer)

    def _classification_loss(self, pred_logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return the summed focal loss of L tensors (N, R, K) for the (N, R) labels of all levels."""
        by_level = labels.split([x.shape[1] for x in pred_logits], dim=1)
        return sum(  # type: ignore[return-value]  # there is a level
            focal_loss_sum(x, y, self.focal_loss_alpha, self.focal_loss_gamma)
            for x, y in zip(pred_logits, by_level)
        )

    def _detect(self, anchors, candidates, deltas, image_sizes) -> list[Instances]:
        """Return the detections of each image, given the candidates of each level."""
        best = [best_candidates(c, self.test_topk_candidates) for c in candidates]
        boxes, images, classes, scores = decode_candidates(
            anchors, deltas, best, self.box2box_transform, self.test_score_thresh
        )
        return detections_per_image(
            boxes,
            images,
            classes,
            scores,
            image_sizes,
            type(anchors[0]),
            self.test_nms_thresh,
            self.max_detections_per_image,
        )

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[torch.Tensor],
        box_delta: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Turn the predictions for one image into detections.

        By default the images of a batch are processed together. If a subclass overrides this method, it is
        called for each image.

        Args:
            anchors: anchors of each level; squares around the points in models without anchors.
            box_cls: L tensors (R, K) of scores in [0, 1], which include the centerness if there is one.
            box_delta: L tensors (R, B).
            image_size: (height, width) of the image before padding.

        Returns:
            `Instances` with `pred_boxes` (not clipped), `scores` and `pred_classes`, in descending score
            order.
        """
        candidates = [candidates_from_scores(scores[None], self.test_score_thresh) for scores in box_cls]
        return self._detect(anchors, candidates, [d[None] for d in box_delta], [image_size])[0]

    @property
    def _has_own_inference(self) -> bool:
        """Whether a subclass overrides `inference_single_image`, as code written for detectron2 may."""
        return type(self).inference_single_image is not DenseDetector.inference_single_image

    def _detect_one_by_one(self, anchors, scores, deltas, image_sizes) -> list[Instances]:
        return [
            self.inference_single_image(anchors, [x[i] for x in scores], [x[i] for x in deltas], size)
            for i, size in enumerate(image_sizes)
        ]


class Candidates(NamedTuple):
    """P predictions of one level that score above a threshold, of all images of a batch, in their order."""

    images: torch.Tensor
    """(P,) int64 in [0, N), ascending."""
    rows: torch.Tensor
    """(P,) int64 in [0, R), the anchor of the level."""
    classes: torch.Tensor
    """(P,) int64 in [0, K)."""
    scores: torch.Tensor
    """(P,) float32, or float64 if the predictions are."""


def candidates_from_scores(scores: torch.Tensor, threshold: float) -> Candidates:
    """Select the scores above `threshold` from the (N, R, K) scores of one level."""
    # Most anchors have no such class. Finding the others first takes a third of the time.
    images, rows = (scores.amax(dim=2) > threshold).nonzero(as_tuple=True)
    chosen = scores[images, rows]
    index, classes = (chosen > threshold).nonzero(as_tuple=True)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return Candidates(images[index], rows[index], classes, chosen[index, classes].to(dtype))


def candidates_from_logits(
    logits: torch.Tensor, threshold: float, quality_logits: torch.Tensor | None = None
) -> Candidates:
    """Select the predictions of one level that may score above a threshold.

    The scores of the other predictions are not computed.

    Args:
        logits: (N, R, K) class logits; their sigmoid is the score.
        threshold: the score to exceed. A few candidates may fall short of it; `decode_candidates` drops them.
        quality_logits: (N, R, 1) logits of the box quality, such as the centerness. If given, the score is
            the geometric mean of both sigmoids.

    Returns:
        Candidates: those of this level, with their exact scores.
    """
    # A quality is at most 1, so the class score alone must exceed the square of the threshold.
    least = threshold if quality_logits is None else threshold * abs(threshold)
    if least <= 0:
        least_logit = -math.inf
    else:
        least_logit = math.log(least / (1 - least)) if least < 1 else math.inf
        least_logit -= 0.01 * (1 + abs(least_logit))  # a margin for rounding
    found = candidates_from_scores(logits, least_logit)
    scores = found.scores.sigmoid()
    if quality_logits is not None:
        quality = quality_logits[found.images, found.rows, 0].to(scores.dtype).sigmoid()
        scores = (scores * quality).sqrt()
    return found._replace(scores=scores)


def best_candidates(candidates: Candidates, topk: int) -> Candidates:
    """Select the `topk` best candidates of each image; all if there are fewer."""
    if len(candidates.scores) <= topk:
        return candidates
    chosen, start = [], 0
    for count in torch.bincount(candidates.images).tolist():
        scores = candidates.scores[start : start + count]
        chosen.append(scores.topk(min(topk, count)).indices + start)
        start += count
    index = torch.cat(chosen)
    return Candidates(*(x[index] for x in candidates))


def decode_candidates(anchors, deltas, levels: list[Candidates], box2box_transform, threshold: float):
    """Decode the boxes of the candidates of all levels in one call.

    Args:
        anchors: L sets of R boxes, the same for all images.
        deltas: L tensors (N, R, B).
        levels: L sets of candidates, P in total.
        box2box_transform: encoding of the boxes.
        threshold: candidates with lower or equal scores are dropped.

    Returns:
        boxes: (P, B) float32, in the anchors' frame; boxes that are not finite are dropped.
        images: (P,) int64, the image of each box.
        classes: (P,) int64, its class.
        scores: (P,) float32, its score.
    """
    chosen_anchors = torch.cat([a.tensor[c.rows] for a, c in zip(anchors, levels)])
    chosen_deltas = torch.cat([d[c.images, c.rows] for d, c in zip(deltas, levels)])
    boxes = box2box_transform.apply_deltas(chosen_deltas, chosen_anchors)
    images, _, classes, scores = (torch.cat(field) for field in zip(*levels))
    keep = (torch.isfinite(boxes).all(dim=1) & (scores > threshold)).nonzero().flatten()
    return boxes[keep], images[keep], classes[keep], scores[keep]


def detections_per_image(
    boxes: torch.Tensor,
    images: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    image_sizes: list[tuple[int, int]],
    box_type: type,
    nms_thresh: float,
    max_detections: int,
) -> list[Instances]:
    """Apply NMS to each class of each image, and keep the best detections.

    Args:
        boxes: (P, B) boxes, in pixels of the images.
        images: (P,) int64 in [0, N).
        classes: (P,) int64.
        scores: (P,) float.
        image_sizes: N pairs (height, width) of the images before padding.
        box_type: the class of the boxes, with `batched_nms`.
        nms_thresh: IoU above which the lower scoring of two boxes of a class is dropped.
        max_detections: maximum number per image; negative for all.

    Returns:
        list[Instances]: N with `pred_boxes` (not clipped), `scores` and `pred_classes`, in descending score
        order.
    """
    order = images.argsort(stable=True)
    counts = torch.bincount(images, minlength=len(image_sizes)).tolist()
    parts = (x[order].split(counts) for x in (boxes, classes, scores))
    results = []
    for image_boxes, image_classes, image_scores, size in zip(*parts, image_sizes):
        typed = box_type(image_boxes)
        keep = typed.batched_nms(image_scores, image_classes, nms_thresh)
        if max_detections >= 0:
            keep = keep[:max_detections]
        results.append(
            Instances(
                size, pred_boxes=typed[keep], scores=image_scores[keep], pred_classes=image_classes[keep]
            )
        )
    return results


def sigmoid_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid in float32 (float64 for float64 logits); in half precision scores would tie."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
