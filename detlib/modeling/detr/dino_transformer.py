"""The transformer of DINO (Zhang et al., arXiv:2203.03605): mixed query selection and look forward twice.

Shape legend: N images, C channels, L feature levels, S cells over all levels, Q queries, D denoising queries,
K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detlib.layers import MLP, get_sine_pos_embed
from detlib.modeling.detr.deformable_layers import DeformableDecoder, DeformableDetrTransformerEncoder
from detlib.modeling.detr.deformable_transformer import DeformableTransformer

__all__ = ["DINOTransformer", "DINOTransformerDecoder", "DINOTransformerEncoder"]


class DINOTransformerEncoder(DeformableDetrTransformerEncoder):
    """The encoder of DINO, identical to `DeformableDetrTransformerEncoder`."""


class DINOTransformerDecoder(DeformableDecoder):
    """The decoder of DINO: queries get their position embeddings from their reference boxes."""

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 1024,
        attn_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        num_layers: int = 6,
        return_intermediate: bool = True,
        num_feature_levels: int = 4,
        look_forward_twice: bool = True,
        use_checkpoint: bool = True,
    ):
        """
        Args:
            embed_dim, num_heads, feedforward_dim, attn_dropout, ffn_dropout, num_layers, return_intermediate,
                num_feature_levels: see `DeformableDecoder`.
            look_forward_twice: whether gradients of the next layer's boxes reach this layer.
            use_checkpoint: whether to use activation checkpointing: the inner activations of a layer are
                recomputed in the backward pass, which saves memory.

        Raises:
            ValueError: `embed_dim` is not a multiple of 4.
        """
        if embed_dim % 4:
            raise ValueError(f"DINOTransformerDecoder's embed_dim must be a multiple of 4, got {embed_dim}")
        super().__init__(
            embed_dim=embed_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            attn_dropout=attn_dropout,
            ffn_dropout=ffn_dropout,
            num_layers=num_layers,
            return_intermediate=return_intermediate,
            num_feature_levels=num_feature_levels,
            use_checkpoint=use_checkpoint,
        )
        self.look_forward_twice = look_forward_twice
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.norm = nn.LayerNorm(embed_dim)

    def query_pos(self, references: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Return the embedding of the references; see `DeformableDecoder.query_pos`."""
        embedding = get_sine_pos_embed(references, self.embed_dim // 2)  # float32 in half-precision models
        return self.ref_point_head(embedding.to(self.norm.weight.dtype))

    def state(self, query: torch.Tensor) -> torch.Tensor:
        """Return the normalized queries."""
        return self.norm(query)

    def next_references(self, refined: torch.Tensor) -> torch.Tensor:
        """See `DeformableDecoder.next_references`."""
        return refined if self.look_forward_twice else refined.detach()


class DINOTransformer(DeformableTransformer):
    """The transformer of DINO: query boxes come from the encoder's proposals, query contents are learned."""

    def __init__(
        self,
        encoder: Any = None,
        decoder: Any = None,
        num_feature_levels: int = 4,
        two_stage_num_proposals: int = 900,
        learnt_init_query: bool = True,
    ):
        """
        Args:
            encoder: a `DINOTransformerEncoder`.
            decoder: a `DINOTransformerDecoder`.
            num_feature_levels: L.
            two_stage_num_proposals: Q, the number of proposals that become queries.
            learnt_init_query: whether the query contents are learned; otherwise they are the features of the
                proposals' cells.
        """
        super().__init__(encoder, decoder, num_feature_levels, two_stage_num_proposals)
        self.learnt_init_query = learnt_init_query
        if learnt_init_query:
            self.tgt_embed = nn.Embedding(two_stage_num_proposals, self.embed_dim)
        self.add_proposal_head()
        self.init_weights()

    def forward(
        self,
        multi_level_feats: Sequence[torch.Tensor],
        multi_level_masks: Sequence[torch.Tensor],
        multi_level_pos_embeds: Sequence[torch.Tensor],
        query_embed: tuple[torch.Tensor | None, torch.Tensor | None],
        attn_masks: Sequence[torch.Tensor | None] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """Apply the encoder and the decoder.

        Args:
            multi_level_feats: L feature maps (N, C, H, W).
            multi_level_masks: L masks (N, H, W) bool, true for the padding.
            multi_level_pos_embeds: L position embeddings (N, C, H, W).
            query_embed: contents (N, D, C) and box logits (N, D, 4) of denoising queries, which are placed
                before the other queries; or (None, None).
            attn_masks: masks of the decoder's self-attention and cross-attention, or None.
            **kwargs: ignored.

        Returns:
            states: (layers, N, D + Q, C).
            init_reference: (N, D + Q, 4), the boxes before the first layer.
            references: (layers, N, D + Q, 4), the boxes after each layer.
            enc_state: (N, Q, C), the cells from which the proposals are predicted.
            enc_reference: (N, Q, 4), the proposals.

        Raises:
            ValueError: the images have fewer cells than `two_stage_num_proposals`.
        """
        memory, levels = self.encode(multi_level_feats, multi_level_masks, multi_level_pos_embeds)
        cells, logits, boxes = self.propose(memory, levels)
        best = self.best_proposals(logits.amax(dim=2))
        enc_state = cells.take_along_dim(best[:, :, None], dim=1)
        enc_reference = boxes.take_along_dim(best[:, :, None], dim=1).sigmoid()
        references = enc_reference.detach()
        if self.learnt_init_query:
            query = self.tgt_embed.weight.expand(len(memory), -1, -1)
        else:
            query = enc_state.detach()
        contents, box_logits = query_embed
        if contents is not None and box_logits is not None:
            query = torch.cat([contents, query], dim=1)
            references = torch.cat([box_logits.to(references.dtype).sigmoid(), references], dim=1)
        states, inter_references = self.decode(
            levels, memory, query=query, reference_points=references, attn_masks=attn_masks
        )
        return states, references, inter_references, enc_state, enc_reference
