"""DETR: end-to-end object detection with transformers (Carion et al., arXiv:2005.12872).

Shape legend: N images, C channels, Q queries, K classes, H x W cells of the feature map.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import MLP
from detlib.modeling.config_checks import check_features, take_features
from detlib.modeling.detr.query_detector import QueryDetector, check_embed_dim, stack_layers
from detlib.structures import ImageList, Instances

__all__ = ["DETR"]


class DETR(QueryDetector):
    """DETR: queries attend to all cells of one feature map."""

    reference_lr_per_image = 1e-4 / 64  # for AdamW

    def __init__(
        self,
        backbone: nn.Module,
        in_features: Sequence[str],
        in_channels: int,
        position_embedding: nn.Module,
        transformer: nn.Module,
        embed_dim: int,
        num_classes: int,
        num_queries: int,
        criterion: nn.Module,
        aux_loss: bool = True,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        device: str | torch.device | None = None,
        *,
        mask_padding_at_test: bool = False,
    ):
        """
        Args:
            backbone: a module that maps images to a dict of feature maps.
            in_features: names of feature maps; only the last one is used.
            in_channels: channels of that feature map.
            position_embedding: a module that maps (N, H, W) masks to (N, C, H, W) embeddings.
            transformer: a `DetrTransformer`.
            embed_dim: C.
            num_classes: K.
            num_queries: Q.
            criterion: a `SetCriterion` with the "ce_loss".
            aux_loss: whether all decoder layers contribute to the loss, or only the last.
            pixel_mean: mean of each channel, in the unit of the pixels.
            pixel_std: standard deviation of each channel.
            device: ignored; move the model with `to`.
            mask_padding_at_test: see `QueryDetector`.

        Raises:
            ValueError: the modules do not fit together, or the backbone does not have one of `in_features`.
        """
        super().__init__(backbone, criterion, num_classes, pixel_mean, pixel_std, mask_padding_at_test)
        check_embed_dim(embed_dim, position_embedding, transformer)
        self.in_features = list(in_features)
        if hasattr(backbone, "output_shape"):
            shapes = backbone.output_shape()
            check_features(self.in_features, shapes, "DETR's in_features")
            channels = shapes[self.in_features[-1]].channels
            if channels not in (None, in_channels):
                raise ValueError(
                    f"in_channels is {in_channels}, but {self.in_features[-1]!r}, the last of in_features, "
                    f"has {channels} channels"
                )
        self.position_embedding = position_embedding
        self.input_proj = nn.Conv2d(in_channels, embed_dim, kernel_size=1)
        self.transformer = transformer
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.bbox_embed = MLP(embed_dim, embed_dim, 4, 3)
        self.num_queries = num_queries
        self.aux_loss = aux_loss

    def predict(self, images: ImageList, targets: Sequence[Mapping] | None = None) -> dict:
        """See `QueryDetector.predict`."""
        features = take_features(self.backbone(images.tensor), self.in_features, "DETR's in_features")[-1]
        x = self.input_proj(features)
        mask = F.interpolate(self.padding_mask(images)[None].to(torch.float32), size=x.shape[-2:])[0].bool()
        pos_embed = self.position_embedding(mask).to(x.dtype)
        states, _ = self.transformer(x, mask, self.query_embed.weight, pos_embed)
        boxes = self.bbox_embed(states)
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).sigmoid()
        return stack_layers(self.class_embed(states), boxes, self.aux_loss)

    def inference(
        self, box_cls: torch.Tensor, box_pred: torch.Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """See `QueryDetector.inference`: each query's best class other than the background."""
        probabilities = box_cls.to(self._dtype).softmax(dim=-1)
        scores, classes = probabilities[..., :-1].max(dim=-1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        boxes = box_pred.gather(1, order[..., None].expand_as(box_pred))
        return self._detections(boxes, scores, classes.gather(1, order), image_sizes)
