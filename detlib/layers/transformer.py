"""Components of transformers: attention, feed-forward networks, configurable layers and layer sequences."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["FFN", "MLP", "BaseTransformerLayer", "MultiheadAttention", "TransformerLayerSequence"]

_OPERATIONS = {"self_attn", "norm", "cross_attn", "ffn"}


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` (the submodule `attn`) with position embeddings and a shortcut."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        batch_first: bool = False,
        **kwargs,
    ):
        """Build the module.

        Args:
            embed_dim: number of channels.
            num_heads: number of heads, which must divide `embed_dim`.
            attn_drop: probability that an attention weight is zeroed.
            proj_drop: probability that an output is zeroed before it is added to `identity`.
            batch_first: whether tensors are (N, Q, C); else (Q, N, C).
            **kwargs: further arguments of `torch.nn.MultiheadAttention`.

        Raises:
            ValueError: `num_heads` does not divide `embed_dim`.
        """
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
        """Compute the attention, and add it to `identity`.

        Args:
            query: (Q, N, C), or (N, Q, C) with `batch_first`.
            key: (K, N, C), or (N, K, C) with `batch_first`; None for `query`.
            value: of the shape of `key`; None for `key`.
            identity: added to the result, of the shape of `query`; None for `query`.
            query_pos: added to `query`, of the same shape, or None.
            key_pos: added to `key`; None for `query_pos` if that has the shape of `key`.
            attn_mask: (Q, K) bool, true where a query must not attend to a key; or floats that are added to
                the attention logits; or None.
            key_padding_mask: (N, K) bool, true for keys that are ignored, or None.
            **kwargs: ignored.

        Returns:
            A tensor of the shape of `query`.
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
            need_weights=False,  # PyTorch's fused kernels do not return weights
        )[0]
        return identity + self.proj_drop(out)


class MLP(nn.Module):
    """A multilayer perceptron: linear layers, the submodule `layers`, with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        """Build the module.

        Args:
            input_dim: number of input channels.
            hidden_dim: number of hidden channels.
            output_dim: number of output channels.
            num_layers: number of linear layers, at least 1.

        Raises:
            ValueError: `num_layers` is below 1.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MLP's num_layers must be at least 1, got {num_layers}")
        self.num_layers = num_layers
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FFN(nn.Module):
    """A feed-forward network with a residual connection: linear layers with activation and dropout.

    The linear layers are `layers.I.0`, except for the last one, which is `layers.I`.
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
        """Build the module.

        Args:
            embed_dim: number of input channels.
            feedforward_dim: number of hidden channels.
            output_dim: number of output channels; None for `embed_dim`.
            num_fcs: number of linear layers, at least 2.
            activation: module that is copied for each hidden layer; None for ReLU.
            ffn_drop: probability that a value is zeroed after each linear layer.
            fc_bias: whether the linear layers have biases.
            add_identity: whether to add the identity to the result.

        Raises:
            ValueError: `num_fcs` is below 2, or `output_dim` is not `embed_dim` though the identity is added.
        """
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
        """Map (..., embed_dim) to (..., output_dim), and add `identity`, which is `x` if None."""
        # Flatten to rows: for more dimensions, a linear layer returns a view, and an in-place activation of a
        # view makes autograd copy the gradient twice.
        out = self.layers(x.reshape(-1, x.shape[-1]))
        out = out.reshape(*x.shape[:-1], out.shape[-1])
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


class BaseTransformerLayer(nn.Module):
    """Attention, feed-forward and norm layers in any order.

    The submodules are `attentions`, `ffns` and `norms`, each in the order of use. If `operation_order` starts
    with "norm", residual connections also bypass the norms (pre-norm).
    """

    def __init__(
        self,
        attn: Sequence[nn.Module] | nn.Module,
        ffn: nn.Module,
        norm: nn.Module,
        operation_order: Sequence[str] | None = None,
    ):
        """Build the module.

        Args:
            attn: one attention module for each "self_attn" and "cross_attn", in order; or one module, copied
                for each. They take the arguments of `detlib.layers.MultiheadAttention.forward`.
            ffn: feed-forward module, copied for each "ffn".
            norm: norm, copied for each "norm".
            operation_order: sequence of "self_attn", "cross_attn", "ffn" and "norm".

        Raises:
            ValueError: an operation is unknown, or the number of attention modules does not fit.
        """
        super().__init__()
        order = tuple(operation_order or ())
        if not order or not set(order) <= _OPERATIONS:
            raise ValueError(f"operation_order must contain only {sorted(_OPERATIONS)}, got {order}")
        num_attn = order.count("self_attn") + order.count("cross_attn")
        if isinstance(attn, nn.Module):
            attn = [copy.deepcopy(attn) for _ in range(num_attn)]
        if len(attn) != num_attn:
            raise ValueError(f"attn must be {num_attn} modules for operation_order {order}, got {len(attn)}")
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
        """Apply the operations.

        Args:
            query: (N, Q, C), or the layout that the attention modules expect.
            key, value: (N, K, C), keys and values of the cross-attention.
            query_pos: position embedding of the queries, of the shape of `query`, or None.
            key_pos: position embedding of the keys, of the shape of `key`, or None.
            attn_masks: one mask for each attention module, or one for all, or None. True where a query must
                not attend to a key.
            query_key_padding_mask: (N, Q) bool, true for queries that are ignored as keys of self-attention.
            key_padding_mask: (N, K) bool, true for keys that are ignored in cross-attention.
            **kwargs: further arguments of the attention modules.

        Returns:
            A tensor of the shape of `query`.

        Raises:
            ValueError: the numbers of masks and attention modules differ.
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
    """A sequence of transformer layers, the submodule `layers`.

    Attributes:
        post_norm_layer: module applied to the output of the last layer, or None.
        use_checkpoint: whether activation checkpointing is used: activations inside a layer are recomputed in
            the backward pass, which saves memory.
    """

    def __init__(self, transformer_layers=None, num_layers: int | None = None):
        """Build the module.

        Args:
            transformer_layers: one layer, which is copied `num_layers` times, or a list of layers.
            num_layers: number of layers; None for the length of the list.

        Raises:
            ValueError: the list does not have `num_layers` layers.
        """
        super().__init__()
        if isinstance(transformer_layers, nn.Module) and not isinstance(transformer_layers, nn.ModuleList):
            transformer_layers = [copy.deepcopy(transformer_layers) for _ in range(num_layers or 1)]
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
        """Apply layer `index`, with activation checkpointing if that is enabled."""
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
        """Apply all layers. Arguments and result are the same as in `BaseTransformerLayer.forward`."""
        positions_and_masks = (query_pos, key_pos, attn_masks, query_key_padding_mask, key_padding_mask)
        for index in range(self.num_layers):
            query = self.run_layer(index, query, key, value, *positions_and_masks, **kwargs)
        return query if self.post_norm_layer is None else self.post_norm_layer(query)
