"""What DETR-like models share: images and masks in, targets, weighted losses, and detections out.

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
    """Raise ValueError unless the parts work on `embed_dim` channels, as far as they tell."""
    if getattr(transformer, "embed_dim", embed_dim) != embed_dim:
        raise ValueError(
            f"embed_dim is {embed_dim}, but that of the transformer's encoder is {transformer.embed_dim}"
        )
    decoder_dim = getattr(getattr(transformer, "decoder", None), "embed_dim", embed_dim)
    if decoder_dim != embed_dim:
        raise ValueError(f"embed_dim is {embed_dim}, but that of the transformer's decoder is {decoder_dim}")
    half = getattr(position_embedding, "num_pos_feats", None)
    if half is not None and 2 * half != embed_dim:
        raise ValueError(
            f"position_embedding's num_pos_feats must be half of embed_dim = {embed_dim}, got {half}"
        )


def padding_masks(images: ImageList) -> torch.Tensor:
    """(N, H, W) bool, true where a batch of images is padded."""
    height, width = images.tensor.shape[-2:]
    device = images.tensor.device
    heights, widths = torch.tensor(images.image_sizes).t()[:, :, None].to(device, non_blocking=True)
    rows = torch.arange(height, device=device) >= heights
    columns = torch.arange(width, device=device) >= widths
    return rows[:, :, None] | columns[:, None, :]


def stack_layers(logits: torch.Tensor, boxes: torch.Tensor, aux_loss: bool) -> dict:
    """What the criterion takes of (layers, N, Q, K) logits and (layers, N, Q, 4) boxes."""
    outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
    if aux_loss:
        outputs["aux_outputs"] = [
            {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1])
        ]
    return outputs


class QueryDetector(MetaArchitecture, metaclass=ABCMeta):
    """A backbone, and queries that each predict one object or nothing.

    A subclass says how images become predictions (`predict`) and predictions detections (`inference`).
    """

    reference_lr_per_image = 1e-4 / 16  # of AdamW
    compile_modules = ("backbone", "transformer")
    # On a CPU it gains nothing, as transformers take most of the time, and contiguous feature maps are
    # detrex's to the last bit: a matching may depend on it.
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
            backbone: images to a dict of feature maps.
            criterion: the losses, with their `weight_dict`.
            num_classes: K.
            pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.
            mask_padding_at_test: whether padding is masked outside training too. The published models see it
                as part of the image, which does no harm where images are predicted one by one: they have
                none. In a batch of several sizes, boxes are right only with True.

        Raises:
            ValueError: the criterion has another number of classes.
        """
        super().__init__()
        if getattr(criterion, "num_classes", num_classes) != num_classes:
            raise ValueError(
                f"the model's num_classes is {num_classes}, its criterion's num_classes is "
                f"{criterion.num_classes}; they must be the same"
            )
        self.backbone = backbone
        self.criterion = criterion
        self.num_classes = num_classes
        self.mask_padding_at_test = mask_padding_at_test
        self.register_pixel_stats(pixel_mean, pixel_std)

    @property
    def _dtype(self) -> torch.dtype:
        """Of boxes and scores: float32, or float64 in such a model."""
        return torch.promote_types(self.pixel_mean.dtype, torch.float32)

    def padding_mask(self, images: ImageList) -> torch.Tensor:
        """(N, H, W) bool, true where the model must see padding as such; see `mask_padding_at_test`."""
        if self.training or self.mask_padding_at_test:
            return padding_masks(images)
        if len(set(images.image_sizes)) > 1:
            log_first_n(
                logging.WARNING,
                "Images of several sizes are predicted in one batch without a mask for the padding, so the "
                "boxes of smaller ones are off: set mask_padding_at_test, or give single images.",
            )
        return images.tensor.new_zeros((len(images), *images.tensor.shape[-2:]), dtype=torch.bool)

    def prepare_targets(self, targets: list[Instances]) -> list[dict[str, torch.Tensor]]:
        """The truth as the criterion takes it.

        Args:
            targets: N `Instances` with `gt_boxes` and `gt_classes` in pixels.

        Returns:
            N dicts of "labels" (M_i,) int64 and "boxes" (M_i, 4): cx, cy, w, h as fractions of the image.
        """
        prepared = []
        for instances in targets:
            height, width = instances.image_size
            boxes = instances.gt_boxes.tensor.to(self._dtype)
            boxes = boxes / boxes.new_tensor([width, height, width, height])
            prepared.append({"labels": instances.gt_classes.long(), "boxes": box_xyxy_to_cxcywh(boxes)})
        return prepared

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Losses in training, detections otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (3, H_i, W_i) uint8 or float tensor;
                * "instances": `Instances` with `gt_boxes` and `gt_classes` in pixels of "image"; training
                  only. An image may be without objects;
                * "height", "width": the size that outputs shall have; the image's own when left out.

        Returns:
            In training a dict of scalar losses, weighted. Otherwise N dicts with "instances": `pred_boxes`,
            `scores` and `pred_classes`, by falling score.

        Raises:
            TypeError, ValueError: an input of the wrong kind, or labels beyond the classes; the message names
                the item and what is wrong.
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
            targets: the truth, see `prepare_targets`; None outside training.

        Returns:
            What the criterion takes, see `SetCriterion.forward`.
        """

    def losses(self, outputs: Mapping, targets: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """The losses without their weights."""
        return self.criterion(outputs, targets)

    @abstractmethod
    def inference(
        self, box_cls: torch.Tensor, box_pred: torch.Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Turn predictions into detections.

        Args:
            box_cls: (N, Q, K) logits, or (N, Q, K + 1) with the background last.
            box_pred: (N, Q, 4): cx, cy, w, h as fractions of the image.
            image_sizes: N pairs (height, width), without padding.

        Returns:
            N `Instances` in pixels of the network's input, by falling score.
        """

    def _detections(self, boxes, scores, classes, image_sizes) -> list[Instances]:
        """Of (N, R, 4) boxes as predicted, (N, R) scores and classes."""
        found = []
        for i, (height, width) in enumerate(image_sizes):
            pred_boxes = Boxes(box_cxcywh_to_xyxy(boxes[i].to(self._dtype)))
            pred_boxes.scale(width, height)
            found.append(
                Instances((height, width), pred_boxes=pred_boxes, scores=scores[i], pred_classes=classes[i])
            )
        return found
