"""Deformable DETR (Zhu et al., arXiv:2010.04159).

Shape legend: N images, C channels, Q queries, K classes, L feature levels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detlib.modeling.detr.multi_scale_detector import MultiScaleQueryDetector
from detlib.modeling.detr.query_detector import stack_layers
from detlib.structures import ImageList

__all__ = ["DeformableDETR"]


class DeformableDETR(MultiScaleQueryDetector):
    """Deformable DETR: queries attend to a few sampling points on several scales."""

    def __init__(
        self,
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
        aux_loss: bool = True,
        with_box_refine: bool = False,
        as_two_stage: bool = False,
        select_box_nums_for_evaluation: int = 100,
        device: str | torch.device | None = None,
        *,
        mask_padding_at_test: bool = False,
    ):
        """
        Args:
            backbone: a module that maps images to a dict of feature maps.
            position_embedding: a module that maps (N, H, W) masks to (N, C, H, W) embeddings.
            neck: a module that maps the backbone's features to L feature maps (N, C, H, W), such as
                `ChannelMapper`.
            transformer: a `DeformableDetrTransformer`.
            embed_dim: C.
            num_classes: K.
            num_queries: Q.
            criterion: a `DeformableCriterion`.
            pixel_mean: mean of each channel, in the unit of the pixels.
            pixel_std: standard deviation of each channel.
            aux_loss: whether all decoder layers contribute to the loss, or only the last.
            with_box_refine: whether each decoder layer refines the boxes of the layer before it, with
                heads of its own. Otherwise, all layers share one head and the reference points stay fixed.
            as_two_stage: whether queries come from the encoder's proposals. Must equal
                `transformer.as_two_stage`, and requires `with_box_refine`.
            select_box_nums_for_evaluation: the number of detections per image.
            device: ignored; move the model with `to`.
            mask_padding_at_test: see `QueryDetector`.

        Raises:
            ValueError: the modules do not fit together; the message names them.
        """
        super().__init__(
            backbone=backbone,
            position_embedding=position_embedding,
            neck=neck,
            transformer=transformer,
            embed_dim=embed_dim,
            num_classes=num_classes,
            num_queries=num_queries,
            criterion=criterion,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            aux_loss=aux_loss,
            select_box_nums_for_evaluation=select_box_nums_for_evaluation,
            mask_padding_at_test=mask_padding_at_test,
        )
        if as_two_stage and not with_box_refine:
            raise ValueError("as_two_stage needs with_box_refine, which is False")
        if as_two_stage != transformer.as_two_stage:
            raise ValueError(
                f"as_two_stage is {as_two_stage}, but the transformer's is {transformer.as_two_stage}"
            )
        self.with_box_refine = with_box_refine
        self.as_two_stage = as_two_stage
        decoder = transformer.decoder
        self.make_heads(decoder.num_layers + as_two_stage, is_shared=not with_box_refine)
        self.init_neck()
        if as_two_stage:
            decoder.class_embed = self.class_embed
        else:
            self.query_embedding = nn.Embedding(num_queries, embed_dim * 2)
            # Initial boxes are small: the sigmoid of -2 is 0.12.
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)
        decoder.bbox_embed = self.bbox_embed if with_box_refine else None

    def predict(self, images: ImageList, targets: Sequence[Mapping] | None = None) -> dict:
        """See `QueryDetector.predict`."""
        query_embed = None if self.as_two_stage else self.query_embedding.weight
        states, init_reference, references, enc_logits, enc_boxes = self.transformer(
            *self.multi_level_features(images), query_embed
        )
        outputs = stack_layers(*self.predict_layers(states, init_reference, references), self.aux_loss)
        if self.as_two_stage:
            outputs["enc_outputs"] = {"pred_logits": enc_logits, "pred_boxes": enc_boxes.sigmoid()}
        return outputs
