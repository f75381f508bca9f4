"""DINO: DETR with improved denoising anchor boxes (Zhang et al., arXiv:2203.03605).

Shape legend: N images, C channels, Q queries, D denoising queries, K classes, L feature levels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detlib.modeling.detr.denoising import make_denoising_queries
from detlib.modeling.detr.multi_scale_detector import MultiScaleQueryDetector
from detlib.modeling.detr.query_detector import stack_layers
from detlib.structures import ImageList

__all__ = ["DINO"]


class DINO(MultiScaleQueryDetector):
    """DINO: queries start from the encoder's best boxes, and every decoder layer refines them.

    In training, additional denoising queries learn to reconstruct ground-truth boxes from noised ones.
    """

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
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        aux_loss: bool = True,
        select_box_nums_for_evaluation: int = 300,
        device: str | torch.device | None = None,
        dn_number: int = 100,
        label_noise_ratio: float = 0.2,
        box_noise_scale: float = 1.0,
        input_format: str | None = "RGB",
        vis_period: int = 0,
        *,
        mask_padding_at_test: bool = False,
    ):
        """
        Args:
            backbone: a module that maps images to a dict of feature maps.
            position_embedding: a module that maps (N, H, W) masks to (N, C, H, W) embeddings.
            neck: a module that maps the backbone's features to L feature maps (N, C, H, W), such as
                `ChannelMapper`.
            transformer: a `DINOTransformer`.
            embed_dim: C.
            num_classes: K.
            num_queries: Q, must equal `transformer.two_stage_num_proposals`.
            criterion: a `DINOCriterion`.
            pixel_mean: mean of each channel, in the unit of the pixels.
            pixel_std: standard deviation of each channel.
            aux_loss: whether all decoder layers contribute to the loss, or only the last.
            select_box_nums_for_evaluation: the number of detections per image.
            device: ignored; move the model with `to`.
            dn_number: half the approximate number of denoising queries, see `num_denoising_groups`; 0
                disables denoising.
            label_noise_ratio: twice the probability that the class of a denoising query is replaced.
            box_noise_scale: scale of the noise on the boxes of denoising queries, see `apply_box_noise`.
            input_format: order of the input's channels, "RGB" or "BGR"; used only for visualization.
            vis_period: ignored; models do not draw visualizations.
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
        if transformer.two_stage_num_proposals != num_queries:
            raise ValueError(
                f"num_queries is {num_queries}, but the transformer's two_stage_num_proposals is "
                f"{transformer.two_stage_num_proposals}; they must be the same"
            )
        self.label_enc = nn.Embedding(num_classes, embed_dim)
        self.dn_number = dn_number
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.input_format = input_format
        self.make_heads(transformer.decoder.num_layers + 1, is_shared=False)
        self.init_neck()
        # The decoder refines boxes with the same heads; the last heads are for the encoder's proposals.
        transformer.decoder.class_embed = self.class_embed
        transformer.decoder.bbox_embed = self.bbox_embed

    def prepare_for_cdn(
        self,
        targets: Sequence[Mapping],
        dn_number: int,
        label_noise_ratio: float,
        box_noise_scale: float,
        num_queries: int,
        num_classes: int,
        hidden_dim: int,
        label_enc: nn.Embedding,
    ):
        """Build the denoising queries of a batch; see `make_denoising_queries`. `hidden_dim` is ignored."""
        return make_denoising_queries(
            targets, dn_number, label_noise_ratio, box_noise_scale, num_queries, num_classes, label_enc
        )

    def dn_post_process(
        self, outputs_class: torch.Tensor, outputs_coord: torch.Tensor, dn_metas: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split off the predictions of denoising queries and store them in `dn_metas`.

        Args:
            outputs_class: (layers, N, D + Q, K).
            outputs_coord: (layers, N, D + Q, 4).
            dn_metas: a dict with "single_padding" and "dn_num"; "output_known_lbs_bboxes" is added to it.

        Returns:
            (layers, N, Q, K) and (layers, N, Q, 4).
        """
        count = dn_metas["single_padding"] * dn_metas["dn_num"]
        dn_metas["output_known_lbs_bboxes"] = stack_layers(
            outputs_class[:, :, :count], outputs_coord[:, :, :count], self.aux_loss
        )
        return outputs_class[:, :, count:], outputs_coord[:, :, count:]

    def predict(self, images: ImageList, targets: Sequence[Mapping] | None = None) -> dict:
        """See `QueryDetector.predict`; the result also has "dn_metas", see `DINOCriterion.forward`."""
        maps = self.multi_level_features(images)
        contents = box_logits = attn_mask = dn_metas = None
        if targets is not None:
            contents, box_logits, attn_mask, dn_metas = self.prepare_for_cdn(
                targets,
                self.dn_number,
                self.label_noise_ratio,
                self.box_noise_scale,
                self.num_queries,
                self.num_classes,
                self.embed_dim,
                self.label_enc,
            )
        states, init_reference, references, enc_state, enc_reference = self.transformer(
            *maps, (contents, box_logits), attn_masks=[attn_mask, None]
        )
        logits, boxes = self.predict_layers(states, init_reference, references)
        if targets is not None:
            # Give `label_enc` a gradient in every process, even without objects, as DDP requires.
            logits = logits + 0 * self.label_enc.weight[0, 0]
        if dn_metas is not None:
            logits, boxes = self.dn_post_process(logits, boxes, dn_metas)
        outputs = stack_layers(logits, boxes, self.aux_loss)
        outputs["enc_outputs"] = {
            "pred_logits": self.class_embed[-1](enc_state),
            "pred_boxes": enc_reference,
        }
        outputs["dn_metas"] = dn_metas
        return outputs

    def losses(self, outputs: Mapping, targets: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """See `QueryDetector.losses`."""
        return self.criterion(outputs, targets, outputs["dn_metas"])
