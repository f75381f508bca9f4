"""The transformer of DETR (Carion et al., arXiv:2005.12872).

Shape legend: N images, C channels, H x W cells of the feature map, Q queries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detlib.layers import FFN, BaseTransformerLayer, MultiheadAttention, TransformerLayerSequence

__all__ = ["DetrTransformer", "DetrTransformerDecoder", "DetrTransformerEncoder"]


class DetrTransformerEncoder(TransformerLayerSequence):
    """The encoder of DETR: each cell attends to all cells."""

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        attn_dropout: float = 0.1,
        feedforward_dim: int = 2048,
        ffn_dropout: float = 0.1,
        num_layers: int = 6,
        post_norm: bool = True,
        batch_first: bool = False,
    ):
        """
        Args:
            embed_dim: C.
            num_heads: number of attention heads; must divide C.
            attn_dropout: dropout probability of the attention weights.
            feedforward_dim: hidden channels of the feed-forward networks.
            ffn_dropout: dropout probability of the feed-forward networks.
            num_layers: number of layers.
            post_norm: whether a norm follows the last layer.
            batch_first: whether tensors are (N, H * W, C) instead of (H * W, N, C).
        """
        layer = BaseTransformerLayer(
            attn=MultiheadAttention(embed_dim, num_heads, attn_drop=attn_dropout, batch_first=batch_first),
            ffn=FFN(embed_dim, feedforward_dim, ffn_drop=ffn_dropout),
            norm=nn.LayerNorm(embed_dim),
            operation_order=("self_attn", "norm", "ffn", "norm"),
        )
        super().__init__(layer, num_layers)
        self.embed_dim = embed_dim
        self.batch_first = batch_first
        if post_norm:
            self.post_norm_layer = nn.LayerNorm(embed_dim)


class DetrTransformerDecoder(TransformerLayerSequence):
    """The decoder of DETR: queries attend to each other and to the encoded cells."""

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        attn_dropout: float = 0.1,
        feedforward_dim: int = 2048,
        ffn_dropout: float = 0.1,
        num_layers: int = 6,
        post_norm: bool = True,
        return_intermediate: bool = True,
        batch_first: bool = False,
    ):
        """
        Args:
            embed_dim, num_heads, attn_dropout, feedforward_dim, ffn_dropout, num_layers, batch_first: see
                `DetrTransformerEncoder`.
            post_norm: whether a norm follows each layer whose queries are returned.
            return_intermediate: whether to return the queries of all layers, or only of the last.
        """
        layer = BaseTransformerLayer(
            attn=MultiheadAttention(embed_dim, num_heads, attn_drop=attn_dropout, batch_first=batch_first),
            ffn=FFN(embed_dim, feedforward_dim, ffn_drop=ffn_dropout),
            norm=nn.LayerNorm(embed_dim),
            operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
        )
        super().__init__(layer, num_layers)
        self.embed_dim = embed_dim
        self.batch_first = batch_first
        self.return_intermediate = return_intermediate
        if post_norm:
            self.post_norm_layer = nn.LayerNorm(embed_dim)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_pos: torch.Tensor | None = None,
        attn_masks: Sequence[torch.Tensor | None] | torch.Tensor | None = None,
        query_key_padding_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Apply all layers; see `BaseTransformerLayer.forward` for the arguments.

        Returns:
            The queries after each layer, (layers, *query.shape); without `return_intermediate` only those of
            the last layer, (1, *query.shape).
        """
        given = (query_pos, key_pos, attn_masks, query_key_padding_mask, key_padding_mask)
        norm = self.post_norm_layer or nn.Identity()
        states = []
        for index in range(self.num_layers):
            query = self.run_layer(index, query, key, value, *given, **kwargs)
            if self.return_intermediate or index == self.num_layers - 1:
                states.append(norm(query))
        return torch.stack(states)


class DetrTransformer(nn.Module):
    """The transformer of DETR: an encoder and a decoder."""

    def __init__(self, encoder: Any = None, decoder: Any = None):
        """
        Args:
            encoder: a `DetrTransformerEncoder`.
            decoder: a `DetrTransformerDecoder`.
        """
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.embed_dim = encoder.embed_dim
        self.init_weights()

    def init_weights(self):
        """Initialize matrices from Xavier's uniform distribution."""
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, query_embed: torch.Tensor, pos_embed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the encoder and the decoder.

        Args:
            x: (N, C, H, W).
            mask: (N, H, W) bool, true for the padding.
            query_embed: (Q, C), the position embeddings of the queries, which are initially zero.
            pos_embed: (N, C, H, W).

        Returns:
            The queries after each layer, (layers, N, Q, C), and the encoded cells, (N, C, H, W).
        """
        height, width = x.shape[2:]

        def as_sequence(tensor, batch_first):  # from (N, S, C)
            return tensor if batch_first else tensor.transpose(0, 1)

        mask = mask.flatten(1)
        x, pos = (tensor.flatten(2).transpose(1, 2) for tensor in (x, pos_embed))
        query_pos = query_embed.expand(len(x), -1, -1)
        first = self.encoder.batch_first
        memory = self.encoder(
            as_sequence(x, first), query_pos=as_sequence(pos, first), query_key_padding_mask=mask
        )
        memory = as_sequence(memory, first)
        first = self.decoder.batch_first
        query_pos, pos, cells = (as_sequence(tensor, first) for tensor in (query_pos, pos, memory))
        states = self.decoder(
            torch.zeros_like(query_pos),
            cells,
            cells,
            query_pos=query_pos,
            key_pos=pos,
            key_padding_mask=mask,
        )
        if not first:
            states = states.transpose(1, 2)
        return states, memory.transpose(1, 2).unflatten(2, (height, width))
