"""The transformer of Deformable DETR (Zhu et al., arXiv:2010.04159), and the base that DINO's shares with it.

Shape legend: N images, C channels, L feature levels of H x W cells, S cells over all levels, Q queries,
K classes.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from detlib.layers import MultiScaleDeformableAttention, get_sine_pos_embed
from detlib.modeling.detr.deformable_layers import Levels, cell_centers, flatten_levels, valid_ratio

__all__ = ["DeformableDetrTransformer", "DeformableTransformer"]


class DeformableTransformer(nn.Module):
    """The base of the transformers of Deformable DETR and DINO: encoder, decoder and proposals."""

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_feature_levels: int, two_stage_num_proposals: int
    ):
        """
        Args:
            encoder: a `DeformableDetrTransformerEncoder`, applied to the cells of all levels.
            decoder: a `DeformableDecoder`.
            num_feature_levels: L.
            two_stage_num_proposals: number of the encoder's proposals that become queries.
        """
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.num_feature_levels = num_feature_levels
        self.two_stage_num_proposals = two_stage_num_proposals
        self.embed_dim = encoder.embed_dim
        self.level_embeds = nn.Parameter(torch.empty(num_feature_levels, self.embed_dim))

    def init_weights(self):
        """Initialize matrices from Xavier's uniform distribution, and deformable attention in its own way."""
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        for module in self.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.init_weights()
        nn.init.normal_(self.level_embeds)

    def add_proposal_head(self):
        """Add the projection of encoded cells from which proposals are predicted."""
        self.enc_output = nn.Linear(self.embed_dim, self.embed_dim)
        self.enc_output_norm = nn.LayerNorm(self.embed_dim)

    def encode(
        self, feats: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], pos_embeds: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Levels]:
        """Encode L feature maps.

        Args:
            feats, masks, pos_embeds: see `flatten_levels`.

        Returns:
            The encoded cells, (N, S, C), and the levels that they belong to.

        Raises:
            ValueError: the number of feature maps is not `num_feature_levels`.
        """
        if len(feats) != self.num_feature_levels:
            raise ValueError(
                f"the transformer's num_feature_levels is {self.num_feature_levels}, but the neck gives "
                f"{len(feats)} feature maps (num_outs)"
            )
        levels = flatten_levels(feats, masks, pos_embeds, self.level_embeds)
        memory = self.encoder(
            levels.cells,
            query_pos=levels.pos,
            query_key_padding_mask=levels.mask,
            reference_points=levels.centers[:, :, None] * levels.valid_ratios[:, None],
            spatial_shapes=levels.spatial_shapes,
            level_start_index=levels.level_start_index,
        )
        return memory, levels

    def decode(self, levels: Levels, memory: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the decoder to the encoded cells."""
        return self.decoder(
            key=memory,
            value=memory,
            key_padding_mask=levels.mask,
            spatial_shapes=levels.spatial_shapes,
            level_start_index=levels.level_start_index,
            valid_ratios=levels.valid_ratios,
            **kwargs,
        )

    def propose(
        self, memory: torch.Tensor, levels: Levels
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict a class and a box from every cell, with the last of the decoder's heads.

        Args:
            memory: (N, S, C) encoded cells.
            levels: the levels that the cells belong to.

        Returns:
            The inputs of the heads, (N, S, C); class logits, (N, S, K); and boxes as logits, (N, S, 4), which
            are infinite for cells in the padding and near the border.
        """
        cells, anchors = self._proposals(memory, levels.mask, levels.centers, levels.shapes)
        head = self.decoder.num_layers
        logits = self.decoder.class_embed[head](cells)
        return cells, logits, self.decoder.bbox_embed[head](cells) + anchors

    def best_proposals(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the cells with the highest of (N, S) scores, (N, `two_stage_num_proposals`) int64.

        Raises:
            ValueError: the images have fewer cells than that.
        """
        if scores.shape[1] < self.two_stage_num_proposals:
            raise ValueError(
                f"num_queries (two_stage_num_proposals) is {self.two_stage_num_proposals}, but these "
                f"images have {scores.shape[1]} cells on all levels; use larger images or fewer queries"
            )
        return scores.topk(self.two_stage_num_proposals, dim=1).indices

    def _proposals(self, memory, mask, centers, shapes):
        sides = [centers.new_full((h * w,), 0.05 * 2.0**i) for i, (h, w) in enumerate(shapes)]
        sides = torch.cat(sides)[:, None].expand(len(centers), -1, 2)
        boxes = torch.cat([centers, sides], dim=2)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(dim=2, keepdim=True) & ~mask[..., None]
        anchors = torch.logit(boxes).masked_fill(~usable, float("inf"))
        return self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0))), anchors

    def gen_encoder_output_proposals(
        self,
        memory: torch.Tensor,
        memory_padding_mask: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]] | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a proposal box around every cell; boxes are larger on coarser levels.

        Args:
            memory: (N, S, C) encoded cells.
            memory_padding_mask: (N, S) bool, true for cells in the padding.
            spatial_shapes: height and width of each level.

        Returns:
            The inputs of the heads, (N, S, C), and the boxes' cx, cy, w, h as logits, (N, S, 4), which are
            infinite for cells in the padding and near the border.
        """
        shapes = [(int(h), int(w)) for h, w in spatial_shapes]
        sizes = [h * w for h, w in shapes]
        masks = [m.unflatten(1, shape) for m, shape in zip(memory_padding_mask.split(sizes, dim=1), shapes)]
        ratios = torch.stack([valid_ratio(m, memory.dtype) for m in masks], dim=1)
        return self._proposals(memory, memory_padding_mask, cell_centers(shapes, ratios), shapes)

    @staticmethod
    def get_reference_points(
        spatial_shapes: Sequence[tuple[int, int]] | torch.Tensor, valid_ratios: torch.Tensor, device=None
    ) -> torch.Tensor:
        """Return the center of every cell, as fractions of each level's width and height: (N, S, L, 2).

        Args:
            spatial_shapes: height and width of each level.
            valid_ratios: (N, L, 2), the fractions of each level's width and height that the image fills.
            device: ignored; the result is on the device of `valid_ratios`.
        """
        shapes = [(int(h), int(w)) for h, w in spatial_shapes]
        return cell_centers(shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]

    def get_valid_ratio(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the fractions of width and height that are not padding, in float32; see `valid_ratio`."""
        return valid_ratio(mask, torch.float32)


class DeformableDetrTransformer(DeformableTransformer):
    """The transformer of Deformable DETR."""

    def __init__(
        self,
        encoder: Any = None,
        decoder: Any = None,
        num_feature_levels: int = 4,
        as_two_stage: bool = False,
        two_stage_num_proposals: int = 300,
    ):
        """
        Args:
            encoder: a `DeformableDetrTransformerEncoder`.
            decoder: a `DeformableDetrTransformerDecoder`.
            num_feature_levels: L.
            as_two_stage: whether queries come from the encoder's proposals; otherwise they are learned.
            two_stage_num_proposals: number of proposals that become queries.
        """
        super().__init__(encoder, decoder, num_feature_levels, two_stage_num_proposals)
        self.as_two_stage = as_two_stage
        if as_two_stage:
            self.add_proposal_head()
            self.pos_trans = nn.Linear(self.embed_dim * 2, self.embed_dim * 2)
            self.pos_trans_norm = nn.LayerNorm(self.embed_dim * 2)
        else:
            self.reference_points = nn.Linear(self.embed_dim, 2)
        self.init_weights()

    def init_weights(self):
        """See `DeformableTransformer.init_weights`."""
        super().init_weights()
        if not self.as_two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def get_proposal_pos_embed(
        self, proposals: torch.Tensor, num_pos_feats: int = 128, temperature: int = 10000
    ) -> torch.Tensor:
        """Return the sine embedding of (N, Q, 4) box logits: (N, Q, 4 * num_pos_feats)."""
        return get_sine_pos_embed(proposals.sigmoid(), num_pos_feats, temperature, exchange_xy=False)

    def forward(
        self,
        multi_level_feats: Sequence[torch.Tensor],
        multi_level_masks: Sequence[torch.Tensor],
        multi_level_pos_embeds: Sequence[torch.Tensor],
        query_embed: torch.Tensor | None,
        **kwargs,
    ):
        """Apply the encoder and the decoder.

        Args:
            multi_level_feats: L feature maps (N, C, H, W).
            multi_level_masks: L masks (N, H, W) bool, true for the padding.
            multi_level_pos_embeds: L position embeddings (N, C, H, W).
            query_embed: (Q, 2 * C), the position embeddings of the queries and the queries; None for a
                two-stage model.
            **kwargs: ignored.

        Returns:
            states: (layers, N, Q, C).
            init_reference: (N, Q, 2 or 4), the references before the first layer.
            references: (layers, N, Q, 2 or 4), the references after each layer.
            enc_class, enc_boxes: (N, S, K) class logits and (N, S, 4) box logits of the encoder; None for a
                one-stage model.
        """
        memory, levels = self.encode(multi_level_feats, multi_level_masks, multi_level_pos_embeds)
        enc_class = enc_boxes = None
        if self.as_two_stage:
            _, enc_class, enc_boxes = self.propose(memory, levels)
            best = self.best_proposals(enc_class[..., 0])
            proposals = enc_boxes.take_along_dim(best[:, :, None], dim=1).detach()
            references = proposals.sigmoid()
            embedded = self.get_proposal_pos_embed(proposals, self.embed_dim // 2).to(memory.dtype)
            query_pos, query = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=2)
        else:
            query_pos, query = cast(torch.Tensor, query_embed).expand(len(memory), -1, -1).chunk(2, dim=2)
            dtype = levels.centers.dtype
            references = self.reference_points(query_pos).to(dtype).sigmoid()
        states, inter_references = self.decode(
            levels, memory, query=query, query_pos=query_pos, reference_points=references
        )
        return states, references, inter_references, enc_class, enc_boxes
