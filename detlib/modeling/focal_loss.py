"""A memory-efficient focal loss on integer labels (arXiv:1708.02002).

Shape legend: N images, R anchors, K classes.
"""

import torch
from torch.nn import functional as F

__all__ = ["focal_loss_sum"]


def _loss(x: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the unweighted loss. `x` is the logit of a negative entry, or minus that of a positive one."""
    return torch.sigmoid(x).pow_(gamma).mul_(F.softplus(x))


def _slope(x: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the derivative of `_loss` with respect to `x`."""
    p = torch.sigmoid(x)
    inner = F.softplus(x).mul_(1 - p).mul_(gamma).add_(p)
    return p.pow_(gamma).mul_(inner)


class _FocalLossSum(torch.autograd.Function):
    """Saves only the logits for the backward pass; autograd would save five tensors of that size."""

    @staticmethod
    def forward(ctx, logits, labels, weights, gamma):
        ctx.save_for_backward(logits, labels)
        ctx.weights, ctx.gamma = weights, gamma
        weight_fg, weight_bg = weights
        is_fg, own = _own_class(labels, logits.shape[-1])
        loss = _loss(logits, gamma).mul_(weight_bg)
        own_loss = weight_fg * _loss(-logits.gather(-1, own), gamma)
        loss.scatter_(-1, own, torch.where(is_fg, own_loss, loss.gather(-1, own)))
        return loss.sum(dim=-1).masked_fill_(labels < 0, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logits, labels = ctx.saved_tensors
        weight_fg, weight_bg = ctx.weights
        is_fg, own = _own_class(labels, logits.shape[-1])
        grad = _slope(logits, ctx.gamma).mul_(weight_bg)
        own_grad = -weight_fg * _slope(-logits.gather(-1, own), ctx.gamma)
        grad.scatter_(-1, own, torch.where(is_fg, own_grad, grad.gather(-1, own)))
        counts = (labels >= 0).to(grad.dtype)
        return grad.mul_((counts * grad_output)[..., None]), None, None, None


def _own_class(labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each row is foreground, and its class (any class otherwise), both (..., 1)."""
    is_fg = (labels >= 0) & (labels < num_classes)
    return is_fg[..., None], labels.clamp(0, num_classes - 1)[..., None]


def focal_loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Return the sigmoid focal loss, summed over all anchors and classes.

    The loss of an entry is `-w * (1 - p)**gamma * log(p)`. p is the predicted probability of the correct
    answer (the class, or not the class), w is `alpha` for the anchor's own class and `1 - alpha` for all
    others. It is computed in float32 (float64 for float64 logits) and can be differentiated once.

    Args:
        logits: (N, R, K) of any float type.
        labels: (N, R) int64: the class in [0, K), K for background, negative for ignored anchors.
        alpha: weight of the foreground, in [0, 1]; negative for no weights.
        gamma: focusing parameter, which down-weights well classified entries; 0 is the cross-entropy.

    Returns:
        A scalar; zero that still requires grad if all anchors are ignored.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels of the shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    return _FocalLossSum.apply(logits, labels, weights, gamma)
