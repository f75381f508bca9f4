"""The encoder and decoder layers of Deformable DETR (Zhu et al., arXiv:2010.04159), which DINO shares.

Shape legend: N images, C channels, L feature levels, S cells over all levels, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detlib.layers import (
    FFN,
    BaseTransformerLayer,
    MultiheadAttention,
    MultiScaleDeformableAttention,
    TransformerLayerSequence,
    inverse_sigmoid,
)

__all__ = [
    "DeformableDecoder",
    "DeformableDetrTransformerDecoder",
    "DeformableDetrTransformerEncoder",
    "Levels",
    "cell_centers",
    "flatten_levels",
    "refine_boxes",
    "valid_ratio",
]


@dataclass
class Levels:
    """The cells of L feature maps in one sequence: level after level, each in row-major order.

    Attributes:
        cells: (N, S, C).
        mask: (N, S) bool, true for cells in the padding.
        pos: (N, S, C) position embeddings.
        shapes: L pairs (height, width).
        spatial_shapes: (L, 2) int64, `shapes` as a tensor on the device.
        level_start_index: (L,) int64, the index of the first cell of each level.
        valid_ratios: (N, L, 2), the fractions of each level's width and height that the image fills.
        centers: (N, S, 2), x and y of each cell's center as fractions of the image; above 1 in the padding.
    """

    cells: torch.Tensor
    mask: torch.Tensor
    pos: torch.Tensor
    shapes: list[tuple[int, int]]
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    valid_ratios: torch.Tensor
    centers: torch.Tensor


def valid_ratio(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the unpadded fractions of width and height of (N, H, W) bool masks: (N, 2) of `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    width = (~mask[:, 0]).sum(dim=1, dtype=exact) / mask.shape[2]
    height = (~mask[:, :, 0]).sum(dim=1, dtype=exact) / mask.shape[1]
    return torch.stack([width, height], dim=1).to(dtype)


def cell_centers(shapes: Sequence[tuple[int, int]], valid_ratios: torch.Tensor) -> torch.Tensor:
    """Return the center of every cell, in coordinates of its image.

    Args:
        shapes: L pairs (height, width).
        valid_ratios: (N, L, 2), the fractions of each level's width and height that the image fills.

    Returns:
        (N, S, 2) with the dtype of `valid_ratios`: x and y as fractions of the image.
    """
    like: dict[str, Any] = {"dtype": valid_ratios.dtype, "device": valid_ratios.device}
    centers = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(height, **like) + 0.5, torch.arange(width, **like) + 0.5, indexing="ij"
        )
        filled = valid_ratios[:, level] * valid_ratios.new_tensor([width, height])
        centers.append(torch.stack([x, y], dim=2).flatten(0, 1) / filled[:, None])
    return torch.cat(centers, dim=1)


def flatten_levels(
    feats: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    pos_embeds: Sequence[torch.Tensor],
    level_embeds: torch.Tensor,
) -> Levels:
    """Flatten L feature maps into one sequence of cells.

    Args:
        feats: L feature maps (N, C, H, W).
        masks: L masks (N, H, W) bool, true for the padding.
        pos_embeds: L position embeddings (N, C, H, W).
        level_embeds: (L, C), added to the position embeddings of each level.
    """
    shapes = [(x.shape[2], x.shape[3]) for x in feats]
    pos = [p.flatten(2).transpose(1, 2) + e for p, e in zip(pos_embeds, level_embeds)]
    # Half precision is too coarse for the coordinates of cells.
    dtype = torch.promote_types(level_embeds.dtype, torch.float32)
    ratios = torch.stack([valid_ratio(m, dtype) for m in masks], dim=1)
    spatial_shapes = torch.tensor(shapes, device=feats[0].device)
    sizes = spatial_shapes.prod(1)
    return Levels(
        cells=torch.cat([x.flatten(2).transpose(1, 2) for x in feats], dim=1),
        mask=torch.cat([m.flatten(1) for m in masks], dim=1),
        pos=torch.cat(pos, dim=1),
        shapes=shapes,
        spatial_shapes=spatial_shapes,
        level_start_index=sizes.cumsum(0) - sizes,
        valid_ratios=ratios,
        centers=cell_centers(shapes, ratios),
    )


def refine_boxes(deltas: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Add predicted deltas to references, in logit space.

    Args:
        deltas: (N, Q, 4).
        references: (N, Q, 4) cx, cy, w, h or (N, Q, 2) cx, cy, as fractions of the image. For points, the
            first two deltas move the center and the last two are the logits of the size.

    Returns:
        (N, Q, 4) cx, cy, w, h.
    """
    logits = inverse_sigmoid(references)
    if logits.shape[-1] == 2:
        logits = nn.functional.pad(logits, (0, 2))
    return (deltas + logits).sigmoid()


class DeformableDetrTransformerEncoder(TransformerLayerSequence):
    """The encoder of Deformable DETR: each cell attends to a few sampling points on all levels."""

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 1024,
        attn_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        num_layers: int = 6,
        post_norm: bool = False,
        num_feature_levels: int = 4,
        use_checkpoint: bool = False,
    ):
        """
        Args:
            embed_dim: C.
            num_heads: number of attention heads; must divide C.
            feedforward_dim: hidden channels of the feed-forward networks.
            attn_dropout, ffn_dropout: dropout probabilities of the attention and the feed-forward networks.
            num_layers: number of layers.
            post_norm: whether a norm follows the last layer.
            num_feature_levels: L.
            use_checkpoint: see `TransformerLayerSequence`.
        """
        layer = BaseTransformerLayer(
            attn=MultiScaleDeformableAttention(
                embed_dim, num_heads, num_feature_levels, dropout=attn_dropout, batch_first=True
            ),
            ffn=FFN(embed_dim, feedforward_dim, ffn_drop=ffn_dropout),
            norm=nn.LayerNorm(embed_dim),
            operation_order=("self_attn", "norm", "ffn", "norm"),
        )
        super().__init__(layer, num_layers)
        self.embed_dim = embed_dim
        self.use_checkpoint = use_checkpoint
        if post_norm:
            self.post_norm_layer = nn.LayerNorm(embed_dim)


class DeformableDecoder(TransformerLayerSequence):
    """The base of the decoders: queries attend to each other and to a few points around their references.

    With `bbox_embed`, every layer refines the references. Subclasses override `query_pos`, `state` and
    `next_references`.

    Attributes:
        bbox_embed: the model's box heads, one for each layer; None keeps the references fixed.
        class_embed: the model's class heads, or None.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        attn_dropout: float,
        ffn_dropout: float,
        num_layers: int,
        return_intermediate: bool,
        num_feature_levels: int,
        use_checkpoint: bool = False,
    ):
        """
        Args:
            embed_dim, num_heads, feedforward_dim, attn_dropout, ffn_dropout, num_layers, num_feature_levels,
                use_checkpoint: see `DeformableDetrTransformerEncoder`.
            return_intermediate: whether to return the queries and references of all layers, or only of the
                last.
        """
        layer = BaseTransformerLayer(
            attn=[
                MultiheadAttention(embed_dim, num_heads, attn_drop=attn_dropout, batch_first=True),
                MultiScaleDeformableAttention(
                    embed_dim, num_heads, num_feature_levels, dropout=attn_dropout, batch_first=True
                ),
            ],
            ffn=FFN(embed_dim, feedforward_dim, ffn_drop=ffn_dropout),
            norm=nn.LayerNorm(embed_dim),
            operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
        )
        super().__init__(layer, num_layers)
        self.embed_dim = embed_dim
        self.return_intermediate = return_intermediate
        self.use_checkpoint = use_checkpoint
        self.bbox_embed: nn.ModuleList | None = None
        self.class_embed: nn.ModuleList | None = None

    def query_pos(self, references: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        """Return the position embedding of the queries.

        Args:
            references: (N, Q, 2 or 4), the references in coordinates of level 0.
            given: the `query_pos` argument of `forward`.
        """
        return given

    def state(self, query: torch.Tensor) -> torch.Tensor:
        """Return the input of the heads for a layer's queries."""
        return query

    def next_references(self, refined: torch.Tensor) -> torch.Tensor:
        """Return the boxes that the next layer's heads refine, detached to stop the gradients there."""
        return refined.detach()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_pos: torch.Tensor | None = None,
        key_pos: torch.Tensor | None = None,
        attn_masks: Sequence[torch.Tensor | None] | None = None,
        query_key_padding_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        reference_points: torch.Tensor | None = None,
        valid_ratios: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply all layers.

        Args:
            query: (N, Q, C).
            key, value: (N, S, C), the cells of all levels.
            query_pos: (N, Q, C), or None.
            key_pos: ignored.
            attn_masks: masks of the self-attention and the cross-attention, or None.
            query_key_padding_mask: (N, Q) bool, true for queries that are not attended to, or None.
            key_padding_mask: (N, S) bool, true for cells in the padding.
            reference_points: (N, Q, 2) cx, cy or (N, Q, 4) cx, cy, w, h, as fractions of the image.
            valid_ratios: (N, L, 2), the fractions of each level's width and height that the image fills.
            **kwargs: `spatial_shapes` and `level_start_index` for `MultiScaleDeformableAttention`.

        Returns:
            The queries, (layers, N, Q, C), and the references, (layers, N, Q, 2 or 4), after each layer.
            Without `return_intermediate`, those of the last layer, without the first dimension.
        """
        assert reference_points is not None and valid_ratios is not None, (
            "the decoder needs reference_points and valid_ratios"
        )
        ratios = valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)[:, None]
        states: list[torch.Tensor] = []
        references: list[torch.Tensor] = []
        for index in range(self.num_layers):
            on_levels = reference_points[:, :, None] * ratios
            query = self.run_layer(
                index,
                query,
                key,
                value,
                query_pos=self.query_pos(on_levels[:, :, 0], query_pos),
                attn_masks=attn_masks,
                query_key_padding_mask=query_key_padding_mask,
                key_padding_mask=key_padding_mask,
                reference_points=on_levels,
                **kwargs,
            )
            kept = reference_points
            if self.bbox_embed is not None:
                refined = refine_boxes(self.bbox_embed[index](query), reference_points)
                kept, reference_points = self.next_references(refined), refined.detach()
                if ratios.shape[-1] == 2:
                    ratios = ratios.repeat(1, 1, 1, 2)
            states.append(self.state(query))
            references.append(kept)
        if not self.return_intermediate:
            return states[-1], references[-1]
        return torch.stack(states), torch.stack(references)


class DeformableDetrTransformerDecoder(DeformableDecoder):
    """The decoder of Deformable DETR; see `DeformableDecoder` for its arguments."""

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
        use_checkpoint: bool = False,
    ):
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
