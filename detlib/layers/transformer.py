"""Parts of transformers: attention, feed-forward networks, configurable layers and stacks of them."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["FFN", "MLP", "BaseTransformerLayer", "MultiheadAttention", "TransformerLayerSequence"]

_OPERATIONS = {"self_attn", "norm", "cross_attn", "ffn"}


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


class MLP(nn.Module):
    """Linear layers, the `layers`, with ReLU between them.

    Args:
        input_dim: channels that go in.
        hidden_dim: channels in between.
        output_dim: channels that come out.
        num_layers: how many linear layers, at least 1.

    Raises:
        ValueError: `num_layers` is below 1.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MLP's num_layers must be at least 1, got {num_layers}")
        self.num_layers = num_layers
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FFN(nn.Module):
    """Linear layers with an activation and dropout, whose result is added to what went in.

    The parameters are `layers.I.0` of all but the last linear layer, and `layers.I` of that.

    Args:
        embed_dim: channels that go in.
        feedforward_dim: channels in between.
        output_dim: channels that come out; None for `embed_dim`.
        num_fcs: how many linear layers, at least 2.
        activation: a module, which is copied; None for ReLU.
        ffn_drop: probability that a value is zeroed, after each linear layer.
        fc_bias: whether the linear layers have biases.
        add_identity: whether the result is added to the identity.

    Raises:
        ValueError: `num_fcs` is below 2, or there is something to add whose channels do not fit.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        feedforward_dim: int = 1024,
        output_dim: int | None = None,
        num_fcs: int = 2,
        activation: nn.Module | None = None,
        ffn_drop: float = 0.0,
        fc_bias: bool = True,
        add_identity: bool = True,
    ):
        super().__init__()
        output_dim = embed_dim if output_dim is None else output_dim
        if num_fcs < 2:
            raise ValueError(f"FFN's num_fcs must be at least 2, got {num_fcs}")
        if add_identity and output_dim != embed_dim:
            raise ValueError(
                f"FFN's output_dim must be embed_dim = {embed_dim} with add_identity, got {output_dim}"
            )
        self.embed_dim = embed_dim
        self.feedforward_dim = feedforward_dim
        self.num_fcs = num_fcs
        self.add_identity = add_identity
        activation = nn.ReLU(inplace=True) if activation is None else activation
        dims = [embed_dim, *[feedforward_dim] * (num_fcs - 1)]
        hidden = [
            nn.Sequential(nn.Linear(a, b, bias=fc_bias), copy.deepcopy(activation), nn.Dropout(ffn_drop))
            for a, b in zip(dims, dims[1:])
        ]
        last = nn.Linear(feedforward_dim, output_dim, bias=fc_bias)
        self.layers = nn.Sequential(*hidden, last, nn.Dropout(ffn_drop))

    def forward(self, x: torch.Tensor, identity: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (..., embed_dim) to (..., output_dim); `identity` is what that is added to, None for `x`."""
        # In rows, as the result of a linear layer on more dimensions is a view: an activation that works in
        # place on one makes autograd copy the gradient twice.
        out = self.layers(x.reshape(-1, x.shape[-1]))
        out = out.reshape(*x.shape[:-1], out.shape[-1])
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


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
