"""Multi-scale deformable attention module (Zhu et al., Deformable DETR, 2020, arXiv:2010.04159)."""

import math

import torch
from torch import nn

from detlib.ops import ms_deform_attn
from detlib.ops.ms_deform_attn import reference_ms_deform_attn

__all__ = ["MultiScaleDeformableAttention", "multi_scale_deformable_attn_pytorch"]


def multi_scale_deformable_attn_pytorch(
    value: torch.Tensor,
    value_spatial_shapes: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute `detlib.ops.ms_deform_attn` with `grid_sample`; slower than the operator.

    The arguments are the same as for the operator, without `level_start_index`, which follows from the
    shapes.
    """
    cells = value_spatial_shapes.prod(1)
    return reference_ms_deform_attn(
        value, value_spatial_shapes, cells.cumsum(0) - cells, sampling_locations, attention_weights
    )


class MultiScaleDeformableAttention(nn.Module):
    """Attention of queries to a few learned points around a reference point, on multiple feature maps.

    Shape legend: N images, Q queries, S cells of all levels together, L levels, C = `embed_dim`.

    The linear layers are `sampling_offsets`, `attention_weights`, `value_proj` and `output_proj`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ):
        """Build the module.

        Args:
            embed_dim: C, channels of queries and values.
            num_heads: number of heads, which must divide C.
            num_levels: L, number of levels.
            num_points: points that each head samples on each level.
            img2col_step: ignored; other implementations process the images in chunks of this size.
            dropout: probability that an output is zeroed before it is added to `identity`.
            batch_first: whether the inputs are (N, Q, C); else (Q, N, C).

        Raises:
            ValueError: `num_heads` does not divide `embed_dim`.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.im2col_step = img2col_step
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.init_weights()

    def init_weights(self):
        """Initialize the parameters as in appendix A.4 of the paper.

        Offsets do not depend on the query: head m points in the direction of m / num_heads of a full turn,
        and its k-th point is k cells away, measured along the longer axis. All points have the same weight.
        """
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = (directions[:, None, None] * distances[:, None]).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        identity: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        reference_points: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        level_start_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Compute the attention, and add it to `identity`.

        Args:
            query: (Q, N, C), or (N, Q, C) with `batch_first`.
            key: ignored; the points follow from the query.
            value: (S, N, C) or (N, S, C), the cells of all levels; None for `query`.
            identity: added to the result, of the shape of `query`; None for `query`.
            query_pos: added to `query` first, of the same shape, or None.
            key_padding_mask: (N, S) bool, true for padding cells, whose values are set to zero, or None.
            reference_points: (N, Q, L, 2), x and y as fractions of the padded image, with offsets in
                cells; or (N, Q, L, 4), boxes cx, cy, w, h, with offsets in units of w / (2 * `num_points`)
                and h / (2 * `num_points`).
            spatial_shapes: (L, 2) integers, height and width of each level.
            level_start_index: (L,) integers, index of the first cell of each level among the S cells.
            **kwargs: ignored.

        Returns:
            A tensor of the shape of `query`.

        Raises:
            ValueError: an argument is missing or its shape does not fit; the message names the argument.
        """
        self._check(reference_points, spatial_shapes, level_start_index)
        assert spatial_shapes is not None and level_start_index is not None, "checked above"
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0)
        locations, weights = self._points(query, reference_points, spatial_shapes)
        output = ms_deform_attn(
            value.unflatten(2, (self.num_heads, -1)), spatial_shapes, level_start_index, locations, weights
        )
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _check(self, reference_points, spatial_shapes, level_start_index):
        required = {
            "reference_points": reference_points,
            "spatial_shapes": spatial_shapes,
            "level_start_index": level_start_index,
        }
        for name, tensor in required.items():
            if tensor is None:
                raise ValueError(f"{name} must be a tensor, got None")
        if reference_points.dim() != 4 or reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                f"reference_points must have shape (N, Q, L, 2) or (N, Q, L, 4),"
                f" got {tuple(reference_points.shape)}"
            )
        for name, size in (
            ("reference_points", reference_points.shape[2]),
            ("spatial_shapes", spatial_shapes.shape[0]),
        ):
            if size != self.num_levels:
                raise ValueError(f"{name} must have num_levels = {self.num_levels} levels, got {size}")

    def _points(self, query, reference_points, spatial_shapes):
        """Return the sampling locations of queries (N, Q, C) and their weights.

        The locations have shape (N, Q, heads, L, points, 2), the weights (N, Q, heads, L, points).
        """
        sizes = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(2, (*sizes, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1)
        # float32 also under autocast: half precision is too coarse for the cells of a large feature map.
        offsets = offsets.to(torch.promote_types(offsets.dtype, reference_points.dtype))
        centers = reference_points[:, :, None, :, None, :2]
        if reference_points.shape[-1] == 2:
            scale = 1 / spatial_shapes.flip(1).to(offsets.dtype)[:, None]
        else:
            scale = reference_points[:, :, None, :, None, 2:] * (0.5 / self.num_points)
        return centers + offsets * scale, weights.unflatten(3, sizes[1:])
