"""The base of Deformable DETR and DINO: multi-scale features, prediction heads and inference.

Shape legend: N images, C channels, Q queries, K classes, L feature levels of H x W cells.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import MLP
from detlib.modeling.config_checks import check_features
from detlib.modeling.detr.deformable_layers import refine_boxes
from detlib.modeling.detr.query_detector import QueryDetector, check_embed_dim
from detlib.structures import ImageList, Instances

__all__ = ["MultiScaleQueryDetector"]

_PRIOR_PROBABILITY = 0.01
"""The initial score of every class, so that the many background queries do not dominate the loss."""


def _check_decoder(transformer: nn.Module) -> None:
    """Raise ValueError if the decoder returns only its last layer: each layer has a head and references."""
    if not getattr(transformer.decoder, "return_intermediate", True):
        raise ValueError(
            "return_intermediate of the transformer's decoder must be True, got False; to train on the "
            "last layer only, set aux_loss=False in the model"
        )


def _check_neck(neck: nn.Module, backbone: nn.Module, embed_dim: int) -> None:
    """Raise ValueError if the neck does not fit the backbone, as far as they declare their channels."""
    if getattr(neck, "out_channels", embed_dim) != embed_dim:
        raise ValueError(f"embed_dim is {embed_dim}, but the neck's out_channels is {neck.out_channels}")
    if not hasattr(neck, "in_features") or not hasattr(backbone, "output_shape"):
        return
    shapes = backbone.output_shape()
    check_features(neck.in_features, shapes, "the neck's in_features")
    for name, conv in zip(neck.in_features, getattr(neck, "convs", ())):
        expected = getattr(getattr(conv, "conv", None), "in_channels", None)
        if None not in (expected, shapes[name].channels) and expected != shapes[name].channels:
            raise ValueError(
                f"the neck's input_shapes specify {expected} channels for {name!r}, but the backbone has "
                f"{shapes[name].channels}"
            )


class MultiScaleQueryDetector(QueryDetector):
    """The base of detectors with multi-scale features, a head for each decoder layer, and sigmoid scores."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        position_embedding: nn.Module,
        neck: nn.Module,
        transformer: nn.Module,
        embed_dim: int,
        num_classes: int,
        num_queries: int,
        criterion: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        aux_loss: bool,
        select_box_nums_for_evaluation: int,
        mask_padding_at_test: bool,
    ):
        """
        Args:
            backbone, criterion, num_classes, pixel_mean, pixel_std, mask_padding_at_test: see
                `QueryDetector`.
            position_embedding: a module that maps (N, H, W) masks to (N, C, H, W) embeddings.
            neck: a module that maps the backbone's features to L feature maps (N, C, H, W).
            transformer: a `DeformableTransformer`.
            embed_dim: C.
            num_queries: Q.
            aux_loss: whether all decoder layers contribute to the loss, or only the last.
            select_box_nums_for_evaluation: the number of detections per image.

        Raises:
            ValueError: the modules do not fit together, or the backbone does not have the neck's features.
        """
        super().__init__(backbone, criterion, num_classes, pixel_mean, pixel_std, mask_padding_at_test)
        check_embed_dim(embed_dim, position_embedding, transformer)
        _check_decoder(transformer)
        _check_neck(neck, backbone, embed_dim)
        self.position_embedding = position_embedding
        self.neck = neck
        self.transformer = transformer
        self.embed_dim = embed_dim
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        self.select_box_nums_for_evaluation = select_box_nums_for_evaluation

    def make_heads(self, count: int, is_shared: bool) -> None:
        """Add `class_embed` and `bbox_embed`, `count` heads each, which share parameters if `is_shared`."""
        class_embed = nn.Linear(self.embed_dim, self.num_classes)
        bbox_embed = MLP(self.embed_dim, self.embed_dim, 4, 3)
        nn.init.constant_(class_embed.bias, -math.log((1 - _PRIOR_PROBABILITY) / _PRIOR_PROBABILITY))
        nn.init.zeros_(bbox_embed.layers[-1].weight)
        nn.init.zeros_(bbox_embed.layers[-1].bias)

        def repeat(head):
            return nn.ModuleList(head if is_shared else copy.deepcopy(head) for _ in range(count))

        self.class_embed, self.bbox_embed = repeat(class_embed), repeat(bbox_embed)

    def init_neck(self) -> None:
        """Initialize the neck's convolutions from Xavier's uniform distribution."""
        for module in self.neck.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def multi_level_features(
        self, images: ImageList
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Compute the feature maps of all levels.

        Returns:
            L feature maps (N, C, H, W), padding masks (N, H, W) bool and position embeddings (N, C, H, W).
        """
        feats = list(self.neck(self.backbone(images.tensor)))
        mask = self.padding_mask(images)[None].to(torch.float32)
        masks = [F.interpolate(mask, size=x.shape[-2:])[0].bool() for x in feats]
        return feats, masks, [self.position_embedding(m).to(x.dtype) for m, x in zip(masks, feats)]

    def predict_layers(
        self, states: torch.Tensor, init_reference: torch.Tensor, references: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the classes and boxes of every decoder layer.

        Args:
            states: (layers, N, Q, C), the queries after each layer.
            init_reference: (N, Q, 2 or 4), the references that the first layer refines.
            references: (layers, N, Q, 2 or 4), the references after each layer, which the next layer refines.

        Returns:
            (layers, N, Q, K) logits and (layers, N, Q, 4) boxes.
        """
        logits, boxes = [], []
        for i, state in enumerate(states):
            reference = references[i - 1] if i else init_reference
            logits.append(self.class_embed[i](state))
            boxes.append(refine_boxes(self.bbox_embed[i](state), reference))
        return torch.stack(logits), torch.stack(boxes)

    def inference(
        self, box_cls: torch.Tensor, box_pred: torch.Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """See `QueryDetector.inference`: the best scores over all queries and classes."""
        num_classes = box_cls.shape[2]
        probabilities = box_cls.to(self._dtype).sigmoid().flatten(1)
        count = min(self.select_box_nums_for_evaluation, probabilities.shape[1])
        scores, index = probabilities.topk(count, dim=1)
        queries = index.div(num_classes, rounding_mode="floor")
        return self._detections(
            box_pred.take_along_dim(queries[:, :, None], dim=1), scores, index % num_classes, image_sizes
        )
