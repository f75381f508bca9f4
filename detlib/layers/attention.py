"""Attention with position embeddings and a residual connection, as in DETR (arXiv:2005.12872)."""

import torch
from torch import nn

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention`, kept as `attn`, of embedded queries and keys, added to an identity.

    Args:
        embed_dim: channels.
        num_heads: heads, which divide `embed_dim`.
        attn_drop: probability that an attention weight is zeroed.
        proj_drop: probability that an output is zeroed before it is added.
        batch_first: whether tensors are (N, Q, C); else (Q, N, C).
        **kwargs: further arguments of `torch.nn.MultiheadAttention`.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        batch_first: bool = False,
        **kwargs,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=attn_drop, batch_first=batch_first, **kwargs
        )
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        identity: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_pos: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attends.

        Args:
            query: (Q, N, C), or (N, Q, C) with `batch_first`.
            key: likewise, of K keys; None for `query`.
            value: of `key`'s shape; None for `key`.
            identity: what the result is added to, of `query`'s shape; None for `query`.
            query_pos: added to `query`, of its shape, or None.
            key_pos: added to `key`; None for `query_pos` if that has `key`'s shape.
            attn_mask: (Q, K) bool, true where a query must not see a key; or floats that are added; or None.
            key_padding_mask: (N, K) bool, true for keys that none may see, or None.
            **kwargs: have no effect.

        Returns:
            A tensor of `query`'s shape.
        """
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
            key_pos = query_pos
        out = self.attn(
            query=query if query_pos is None else query + query_pos,
            key=key if key_pos is None else key + key_pos,
            value=value,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,  # they would keep PyTorch from its fused kernels
        )[0]
        return identity + self.proj_drop(out)
