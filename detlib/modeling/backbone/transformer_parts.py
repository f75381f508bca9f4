"""Modules and rules that every transformer backbone needs: MLP, stochastic depth, initial weights."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["DropPath", "Mlp", "drop_path_rates", "init_transformer_weights", "run_block"]


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drop a residual branch for some of the pictures.

    The branches that stay are divided by the probability to stay, so that the mean does not change.
    """

    def __init__(self, drop_prob=0.0):
        """
        Args:
            drop_prob: probability that a picture's branch is dropped, in [0, 1].

        Raises:
            ValueError: a probability outside that range.
        """
        super().__init__()
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must lie in [0, 1], got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x):
        """Map (N, ...) to the same shape; N pictures are drawn independently."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0 else mask)

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU):
        """
        Args:
            in_features: channels that go in and come out.
            hidden_features: channels in between.
            act_layer: called without arguments, makes the activation.
        """
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        """Map (..., in_features) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The probability to drop each of `depth` blocks: rising linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def init_transformer_weights(module: nn.Module) -> None:
    """Set the weights of one linear layer or layer norm; for `nn.Module.apply`.

    Linear weights are drawn from a normal distribution of standard deviation 0.02, biases are 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def run_block(block: nn.Module, x: torch.Tensor, use_act_checkpoint: bool) -> torch.Tensor:
    """Apply a block; with `use_act_checkpoint` its inner activations are computed again in backward."""
    if use_act_checkpoint and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)
