"""What one-stage detectors share: pictures in, predictions on every pixel of some feature maps, results out.

Shape legend: N images, C channels, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A
anchors of one level (or of all), K classes.
"""

from abc import ABCMeta, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.modeling.backbone import Backbone
from detlib.modeling.config_checks import check_features
from detlib.modeling.dense_ops import (
    best_candidates,
    candidates_from_scores,
    decode_candidates,
    detections_per_image,
    permute_to_N_HWA_K,
)
from detlib.modeling.focal_loss import focal_loss_sum
from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import get_event_storage, has_event_storage

__all__ = ["DenseDetector"]


class DenseDetector(MetaArchitecture, metaclass=ABCMeta):
    """A backbone and a head that predicts on every pixel of the backbone's features.

    A subclass says how predictions become losses (`forward_training`) and detections (`forward_inference`).

    Args:
        backbone: pictures to a dict of feature maps.
        head: L feature maps to a tuple of predictions, each L maps (N, ..., H, W).
        head_in_features: names of the features that the head sees; by default all, by rising stride.
        pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
        pixel_std: standard deviation of each channel.

    Raises:
        ValueError: a feature that the backbone does not give.
    """

    num_classes_key = "num_classes"
    """What messages call the number of classes."""

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
        """Losses in training, detections otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (C, H_i, W_i) uint8 or float tensor;
                * "instances": `Instances` with `gt_boxes` and `gt_classes` in pixels of "image"; training
                  only;
                * "height", "width": the size that outputs shall have; the image's own when left out.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with "instances": `pred_boxes`, `scores`
            and `pred_classes`, by falling score.

        Raises:
            TypeError, ValueError: an input of the wrong kind; the message names the item and what is wrong.
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
        """See `MetaArchitecture.tta_merge_limits`: those of the model itself."""
        return self.test_nms_thresh, self.max_detections_per_image

    @abstractmethod
    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        """Compare the head's predictions with the truth.

        Args:
            images: N pictures, as `preprocess_image` returns them.
            features: L maps (N, C, H, W).
            predictions: what the head made of them.
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
            N `Instances` in pixels of the network's input.
        """

    def _transpose_dense_predictions(
        self, predictions: list[list[torch.Tensor]], dims_per_anchor: list[int]
    ) -> list[list[torch.Tensor]]:
        """For each prediction, of K numbers per anchor: L maps (N, A*K, H, W) to L tensors (N, R, K)."""
        return [
            [permute_to_N_HWA_K(x, numbers) for x in levels]
            for levels, numbers in zip(predictions, dims_per_anchor)
        ]

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        """Move the attribute `name`, an average over the last iterations, towards `value`, and return it.

        It is a plain number that each process has for itself: no parameter, and `initial_value` before the
        first call.
        """
        average = getattr(self, name, initial_value) * momentum + value * (1 - momentum)
        setattr(self, name, average)
        self._averages.add(name)
        return average

    def training_state(self) -> dict[str, float]:
        """The averages, which a resumed training must know."""
        # A validation before the first step takes its averages away again.
        return {name: getattr(self, name) for name in sorted(self._averages) if hasattr(self, name)}

    def load_training_state(self, state: dict[str, float]) -> None:
        """Restores what `training_state` gave."""
        for name, average in state.items():
            setattr(self, name, average)
        self._averages = set(state)

    def _count_foreground(self, gt_labels: list[torch.Tensor], initial_normalizer: float):
        """Find the foreground of a batch, log how much there is, and update the losses' normaliser.

        Args:
            gt_labels: N tensors (R,) int64: K and negative ones are no foreground.
            initial_normalizer: the average number of foreground anchors of a batch, before the first one.

        Returns:
            labels: (N, R) int64.
            fg_idxs: two int64 tensors, the image and the anchor of each foreground.
            normalizer: a plain number.
        """
        labels = torch.stack(gt_labels)
        fg_idxs = ((labels >= 0) & (labels != self.num_classes)).nonzero(as_tuple=True)
        num_fg = len(fg_idxs[0])
        if has_event_storage():
            get_event_storage().put_scalar("num_pos_anchors", num_fg / len(gt_labels))
        return labels, fg_idxs, self._ema_update("loss_normalizer", max(num_fg, 1), initial_normalizer)

    def _classification_loss(self, pred_logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The summed focal loss of L tensors (N, R, K) against (N, R) labels over all levels."""
        by_level = labels.split([x.shape[1] for x in pred_logits], dim=1)
        return sum(
            focal_loss_sum(x, y, self.focal_loss_alpha, self.focal_loss_gamma)
            for x, y in zip(pred_logits, by_level)
        )

    def _detect(self, anchors, candidates, deltas, image_sizes) -> list[Instances]:
        """From candidates of each level to the detections of each image."""
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
        """Turn the predictions for one picture into detections.

        Pictures of a batch go through the same steps together; where a subclass overrides this, one by one
        through its own.

        Args:
            anchors: anchors of each level; of models without, points as squares.
            box_cls: L tensors (R, K) of scores in [0, 1]; centerness, where there is one, is in them.
            box_delta: L tensors (R, B).
            image_size: (height, width) of the picture before padding.

        Returns:
            `Instances` with `pred_boxes` (not clipped), `scores` and `pred_classes`, by falling score.
        """
        candidates = [candidates_from_scores(scores[None], self.test_score_thresh) for scores in box_cls]
        return self._detect(anchors, candidates, [d[None] for d in box_delta], [image_size])[0]

    @property
    def _detects_by_picture(self) -> bool:
        return type(self).inference_single_image is not DenseDetector.inference_single_image

    def _detect_by_picture(self, anchors, scores, deltas, image_sizes) -> list[Instances]:
        return [
            self.inference_single_image(anchors, [x[i] for x in scores], [x[i] for x in deltas], size)
            for i, size in enumerate(image_sizes)
        ]
