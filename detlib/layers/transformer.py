"""A transformer layer put together from its operations, and a stack of such layers."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["BaseTransformerLayer", "TransformerLayerSequence"]

_OPERATIONS = {"self_attn", "norm", "cross_attn", "ffn"}


class BaseTransformerLayer(nn.Module):
    """Attention, feed-forward and norm layers in any order.

    Its parts are `attentions`, `ffns` and `norms`, each in the order of use. If `operation_order` begins with
    "norm", residual connections go around the norms too (pre-norm).

    Args:
        attn: one attention module for each "self_attn" and "cross_attn" in order; or one of which each gets a
            copy. They take the arguments of `detlib.layers.MultiheadAttention.forward`.
        ffn: the feed-forward module; each "ffn" gets a copy.
        norm: the norm; each "norm" gets a copy.
        operation_order: any of "self_attn", "cross_attn", "ffn" and "norm", in order.

    Raises:
        ValueError: an unknown operation, or another number of attention modules than `operation_order` has.
    """

    def __init__(
        self,
        attn: Sequence[nn.Module] | nn.Module,
        ffn: nn.Module,
        norm: nn.Module,
        operation_order: Sequence[str] | None = None,
    ):
        super().__init__()
        order = tuple(operation_order or ())
        if not order or not set(order) <= _OPERATIONS:
            raise ValueError(f"operation_order must name some of {sorted(_OPERATIONS)}, got {order}")
        num_attn = order.count("self_attn") + order.count("cross_attn")
        if isinstance(attn, nn.Module):
            attn = [copy.deepcopy(attn) for _ in range(num_attn)]
        if len(attn) != num_attn:
            raise ValueError(f"attn must be {num_attn} modules, as operation_order {order}, got {len(attn)}")
        self.operation_order = order
        self.pre_norm = order[0] == "norm"
        self.attentions = nn.ModuleList(attn)
        self.ffns = nn.ModuleList(copy.deepcopy(ffn) for _ in range(order.count("ffn")))
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(order.count("norm")))
        self.embed_dim = self.attentions[0].embed_dim if num_attn else None

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
        """Applies the operations.

        Args:
            query: (N, Q, C), or whatever layout the attention modules take.
            key, value: of the cross attention, (N, K, C).
            query_pos: position embedding of the queries, of `query`'s shape, or None.
            key_pos: that of the keys, of `key`'s shape, or None.
            attn_masks: a mask for each attention module; or one for all; or None. True where a query must
                not see a key.
            query_key_padding_mask: (N, Q) bool, true for queries that no other may see.
            key_padding_mask: (N, K) bool, true for keys that none may see.
            **kwargs: for the attention modules.

        Returns:
            A tensor of `query`'s shape.

        Raises:
            ValueError: another number of masks than attention modules.
        """
        if attn_masks is None or isinstance(attn_masks, torch.Tensor):
            attn_masks = [attn_masks] * len(self.attentions)
        if len(attn_masks) != len(self.attentions):
            raise ValueError(f"attn_masks must be {len(self.attentions)} masks, got {len(attn_masks)}")
        attentions, ffns, norms = iter(zip(self.attentions, attn_masks)), iter(self.ffns), iter(self.norms)
        identity = query
        for operation in self.operation_order:
            before = identity if self.pre_norm else None
            if operation == "norm":
                query = next(norms)(query)
                continue
            if operation == "ffn":
                query = next(ffns)(query, before)
            else:
                own = operation == "self_attn"
                attention, mask = next(attentions)
                query = attention(
                    query,
                    query if own else key,
                    query if own else value,
                    before,
                    query_pos=query_pos,
                    key_pos=query_pos if own else key_pos,
                    attn_mask=mask,
                    key_padding_mask=query_key_padding_mask if own else key_padding_mask,
                    **kwargs,
                )
            identity = query
        return query


class TransformerLayerSequence(nn.Module):
    """Layers, one after the other: `layers`.

    Attributes:
        post_norm_layer: applied to what the last layer gives, or None.
        use_checkpoint: whether the inner activations of a layer are computed again in the backward pass, to
            save memory.

    Args:
        transformer_layers: one layer, of which `num_layers` copies are made, or a list of `num_layers`.
        num_layers: how many layers.

    Raises:
        ValueError: another number of layers than `num_layers`.
    """

    def __init__(self, transformer_layers=None, num_layers: int | None = None):
        super().__init__()
        if isinstance(transformer_layers, nn.Module) and not isinstance(transformer_layers, nn.ModuleList):
            transformer_layers = [copy.deepcopy(transformer_layers) for _ in range(num_layers)]
        transformer_layers = list(transformer_layers or ())
        num_layers = len(transformer_layers) if num_layers is None else num_layers
        if len(transformer_layers) != num_layers:
            raise ValueError(
                f"num_layers is {num_layers}, but there are {len(transformer_layers)} transformer_layers"
            )
        self.num_layers = num_layers
        self.layers = nn.ModuleList(transformer_layers)
        self.post_norm_layer: nn.Module | None = None
        self.use_checkpoint = False

    def run_layer(self, index: int, *args, **kwargs) -> torch.Tensor:
        """Applies layer `index`, with its activations kept or not."""
        layer = self.layers[index]
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)

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
        """Applies all layers; arguments and result are those of `BaseTransformerLayer.forward`."""
        given = (query_pos, key_pos, attn_masks, query_key_padding_mask, key_padding_mask)
        for index in range(self.num_layers):
            query = self.run_layer(index, query, key, value, *given, **kwargs)
        return query if self.post_norm_layer is None else self.post_norm_layer(query)
