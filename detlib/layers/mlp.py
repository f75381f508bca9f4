"""Stacks of linear layers: a plain one, and the feed-forward part of a transformer layer."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["FFN", "MLP"]


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
