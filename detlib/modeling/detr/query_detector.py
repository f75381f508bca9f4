"""The base of DETR-like models: preprocessing, targets, weighted losses and detections.

Shape legend: N images of H x W padded pixels, Q queries, K classes.
"""

import logging
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.logger import log_first_n

__all__ = [
    "QueryDetector",
    "check_embed_dim",
    "padding_masks",
    "stack_layers",
]


def check_embed_dim(embed_dim: int, position_embedding: nn.Module, transformer: nn.Module) -> None:
    """Raise ValueError if a module declares another number of channels than `embed_dim`."""
    if getattr(transformer, "embed_dim", embed_dim) != embed_dim:
        raise ValueError(
            f"embed_dim is {embed_dim}, but the transformer's encoder has {transformer.embed_dim}"
        )
    decoder_dim = getattr(getattr(transformer, "decoder", None), "embed_dim", embed_dim)
    if decoder_dim != embed_dim:
        raise ValueError(f"embed_dim is {embed_dim}, but the transformer's decoder has {decoder_dim}")
    half = getattr(position_embedding, "num_pos_feats", None)
    if half is not None and 2 * half != embed_dim:
        raise ValueError(
            f"position_embedding's num_pos_feats must be half of embed_dim = {embed_dim}, got {half}"
        )


def padding_masks(images: ImageList) -> torch.Tensor:
    """Return the padding mask of a batch of images: (N, H, W) bool, true in the padding."""
    height, width = images.tensor.shape[-2:]
    device = images.tensor.device
    heights, widths = torch.tensor(images.image_sizes).t()[:, :, None].to(device, non_blocking=True)
    rows = torch.arange(height, device=device) >= heights
    columns = torch.arange(width, device=device) >= widths
    return rows[:, :, None] | columns[:, None, :]


def stack_layers(logits: torch.Tensor, boxes: torch.Tensor, aux_loss: bool) -> dict:
    """Return the inputs of the criterion, from (layers, N, Q, K) logits and (layers, N, Q, 4) boxes."""
    outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
    if aux_loss:
        outputs["aux_outputs"] = [
            {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1])
        ]
    return outputs


class QueryDetector(MetaArchitecture, metaclass=ABCMeta):
    """A detector with object queries, each of which predicts one object or background.

    Subclasses implement `predict`, from images to predictions, and `inference`, from predictions to
    detections.
    """

    reference_lr_per_image = 1e-4 / 16  # for AdamW
    compile_modules = ("backbone", "transformer")
    # On a CPU, channels_last gains nothing, as transformers take most of the time. Contiguous feature maps
    # equal those of detrex bit for bit, and a match may depend on the last bit.
    channels_last_on = ("cuda",)

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        return frozenset({"instances"})

    def __init__(
        self,
        backbone: nn.Module,
        criterion: nn.Module,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        mask_padding_at_test: bool = False,
    ):
        """
        Args:
            backbone: a module that maps images to a dict of feature maps.
            criterion: a module that computes the losses, with their weights in `weight_dict`.
            num_classes: K.
            pixel_mean: mean of each channel, in the unit of the pixels (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.
            mask_padding_at_test: whether padding is masked in inference too. The published models treat it
                as part of the image, which is harmless for single images, as they are not padded. In a batch
                of images of different sizes, boxes are correct only with True.

        Raises:
            ValueError: the criterion's number of classes differs from `num_classes`.
        """
        super().__init__()
        if getattr(criterion, "num_classes", num_classes) != num_classes:
            raise ValueError(
                f"the model's num_classes is {num_classes}, but its criterion's num_classes is "
                f"{criterion.num_classes}; they must be the same"
            )
        self.backbone = backbone
        self.criterion = criterion
        self.num_classes = num_classes
        self.mask_padding_at_test = mask_padding_at_test
        self.register_pixel_stats(pixel_mean, pixel_std)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of boxes and scores: float32, or float64 for a float64 model."""
        return torch.promote_types(self.pixel_mean.dtype, torch.float32)

    def padding_mask(self, images: ImageList) -> torch.Tensor:
        """Return the padding mask of the model: (N, H, W) bool, true in padding that is masked.

        In inference, nothing is masked unless `mask_padding_at_test` is set.
        """
        if self.training or self.mask_padding_at_test:
            return padding_masks(images)
        if len(set(images.image_sizes)) > 1:
            log_first_n(
                logging.WARNING,
                "A batch has images of different sizes and the padding is not masked, so the boxes of the "
                "smaller ones are inaccurate: set mask_padding_at_test, or predict one image at a time.",
            )
        return images.tensor.new_zeros((len(images), *images.tensor.shape[-2:]), dtype=torch.bool)

    def prepare_targets(self, targets: list[Instances]) -> list[dict[str, torch.Tensor]]:
        """Convert ground truth to the targets of the criterion.

        Args:
            targets: N `Instances` with `gt_boxes` and `gt_classes` in pixels.

        Returns:
            N dicts with "labels" (M_i,) int64 and "boxes" (M_i, 4): cx, cy, w, h as fractions of the image.
        """
        prepared = []
        for instances in targets:
            height, width = instances.image_size
            boxes = instances.gt_boxes.tensor.to(self._dtype)
            boxes = boxes / boxes.new_tensor([width, height, width, height])
            prepared.append({"labels": instances.gt_classes.long(), "boxes": box_xyxy_to_cxcywh(boxes)})
        return prepared

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Return the losses in training, and detections otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (3, H_i, W_i) uint8 or float tensor;
                * "instances": `Instances` with `gt_boxes` and `gt_classes` in pixels of "image"; only in
                  training. An image may have no objects;
                * "height", "width": the size of the output; defaults to the size of "image".

        Returns:
            In training, a dict of weighted scalar losses. Otherwise, N dicts with "instances", which has
            `pred_boxes`, `scores` and `pred_classes` in descending score order.

        Raises:
            TypeError, ValueError: an input has the wrong type, or a label is out of range; the message names
                the item and the problem.
        """
        images = self.preprocess_image(batched_inputs)
        if self.training:
            targets = self.prepare_targets(
                self.take_ground_truth(batched_inputs, self.num_classes, "num_classes")
            )
            weights = self.criterion.weight_dict
            losses = self.losses(self.predict(images, targets), targets)
            return {name: loss * weights.get(name, 1) for name, loss in losses.items()}
        outputs = self.predict(images)
        results = self.inference(outputs["pred_logits"], outputs["pred_boxes"], images.image_sizes)
        results = self.scale_to_output_size(results, batched_inputs, images.image_sizes)
        return [{"instances": r} for r in results]

    @abstractmethod
    def predict(self, images: ImageList, targets: Sequence[Mapping] | None = None) -> dict:
        """Predict on a batch.

        Args:
            images: N images, as `preprocess_image` returns them.
            targets: the ground truth, see `prepare_targets`; None in inference.

        Returns:
            The predictions, see `outputs` of `SetCriterion.forward`.
        """

    def losses(self, outputs: Mapping, targets: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Return the losses without their weights."""
        return self.criterion(outputs, targets)

    @abstractmethod
    def inference(
        self, box_cls: torch.Tensor, box_pred: torch.Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Convert predictions to detections.

        Args:
            box_cls: (N, Q, K) logits, or (N, Q, K + 1) with the background last.
            box_pred: (N, Q, 4) cx, cy, w, h as fractions of the image.
            image_sizes: N pairs (height, width), without padding.

        Returns:
            N `Instances` in pixels of the network's input, in descending score order.
        """

    def _detections(self, boxes, scores, classes, image_sizes) -> list[Instances]:
        """Return `Instances` from (N, R, 4) predicted boxes, (N, R) scores and (N, R) classes."""
        found = []
        for i, (height, width) in enumerate(image_sizes):
            pred_boxes = Boxes(box_cxcywh_to_xyxy(boxes[i].to(self._dtype)))
            pred_boxes.scale(width, height)
            found.append(
                Instances((height, width), pred_boxes=pred_boxes, scores=scores[i], pred_classes=classes[i])
            )
        return found
