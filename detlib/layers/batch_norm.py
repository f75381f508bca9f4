"""Normalization layers, and `get_norm`, which builds them from their config names.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from detlib.ops.frozen_batch_norm import apply_frozen_batch_norm, is_fast
from detlib.utils import comm
from detlib.utils.suggest import suggest

__all__ = [
    "CycleBatchNormList",
    "FrozenBatchNorm2d",
    "LayerNorm",
    "NaiveSyncBatchNorm",
    "differentiable_all_reduce",
    "get_norm",
]

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def _affine(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `x * scale + bias` for x (N, C, H, W) and scale and bias (C,), in the dtype of x."""
    # One pass over memory; only `scale` is kept for backward.
    return torch.addcmul(bias.to(x.dtype).reshape(1, -1, 1, 1), x, scale.to(x.dtype).reshape(1, -1, 1, 1))


class _BatchNormWithoutInput(torch.autograd.Function):
    """Frozen batch norm that does not keep x for backward.

    PyTorch keeps it, for the gradients of weight and bias.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, eps):
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, var, weight, _, ctx.eps = inputs
        ctx.save_for_backward(var, weight)

    @staticmethod
    def backward(ctx, grad):
        var, weight = ctx.saved_tensors
        # The norm is linear in x up to a shift, so the gradient is the same norm without the shift.
        zero = torch.zeros_like(var)
        grad_x = F.batch_norm(grad, zero, var, weight, zero, training=False, eps=ctx.eps)
        return grad_x, None, None, None, None, None


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization with constant statistics and affine parameters.

    It computes `(x - running_mean) / sqrt(running_var + eps) * weight + bias` per channel. All four are (C,)
    float32 buffers with the names of `torch.nn.BatchNorm2d`; optimizers do not see them. A new module is the
    identity. A module converted from a batch norm keeps its `num_batches_tracked`, so that the names in a
    checkpoint do not depend on which norms are frozen.
    """

    # Files written by version 1 (and files converted from Caffe2) lack the running statistics.
    _version = 3
    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor | None

    def __init__(self, num_features, eps=1e-5):
        """Build the module.

        Args:
            num_features: number of channels C.
            eps: added to the variance.
        """
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        """Map (N, C, H, W) to the same shape and dtype."""
        constants = (self.running_mean, self.running_var, self.weight, self.bias)
        if is_fast(x):
            return apply_frozen_batch_norm(x, None, *constants, self.eps, False)
        # Compilers find out themselves that x is not needed for backward.
        if x.requires_grad and not torch.compiler.is_compiling():
            return _BatchNormWithoutInput.apply(x, *constants, self.eps)
        mean, var, weight, bias = constants
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        version = local_metadata.get("version", None)
        if version is None or version < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        if self.num_batches_tracked is not None:  # unused here, so files may lack it
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self):
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module):
        """Replace every BatchNorm2d and SyncBatchNorm in `module` by a frozen one with the same values.

        Returns:
            `module`, changed in place, or the new FrozenBatchNorm2d if `module` itself is a batch norm.
        """
        return _replace_modules(
            module, _BATCH_NORMS, lambda old: _copy_norm(old, cls(old.num_features, old.eps))
        )

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """Replace every FrozenBatchNorm2d in `module` by a trainable BatchNorm2d with the same values.

        Returns:
            `module`, changed in place, or the new BatchNorm2d if `module` itself is a frozen norm.
        """
        return _replace_modules(
            module,
            (cls,),
            lambda old: _copy_norm(old, nn.BatchNorm2d(cast(int, old.num_features), cast(float, old.eps))),
        )


def _copy_norm(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy the affine parameters and running statistics of `old`, if any; keep its device and mode."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(old, name)
            if value is not None:
                new.to(value.device)
                getattr(new, name).copy_(value)
        if old.num_batches_tracked is not None:
            new.num_batches_tracked = old.num_batches_tracked.clone()
    return new.train(old.training)


def _replace_modules(module: nn.Module, types: tuple, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if isinstance(module, types):
        return replace(module)
    for name, child in module.named_children():
        new_child = _replace_modules(child, types, replace)
        if new_child is not child:
            setattr(module, name, new_child)
    return module


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        output = input.clone()
        dist.all_reduce(output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        # The loss of each process depends on the input of every process.
        grad = grad_output.clone()
        dist.all_reduce(grad)
        return grad


def differentiable_all_reduce(input: torch.Tensor) -> torch.Tensor:
    """Return the sum of `input` over all processes, with a gradient; `input` if there is one process."""
    if comm.get_world_size() == 1:
        return input
    return _AllReduceSum.apply(input)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization with statistics over all processes, by a differentiable all-reduce.

    Unlike `torch.nn.SyncBatchNorm`, it works on the CPU, and images of any size have the same weight. The
    running variance is the biased estimate.
    """

    def __init__(self, *args, stats_mode="", **kwargs):
        """Build the module.

        Args:
            stats_mode: "" averages the statistics of the processes with equal weights, and each needs at
                least one image; "N" weights them by their number of images, which may be zero.
            *args, **kwargs: arguments of `torch.nn.BatchNorm2d`.

        Raises:
            ValueError: `stats_mode` is unknown.
        """
        super().__init__(*args, **kwargs)
        if stats_mode not in ("", "N"):
            raise ValueError(f'stats_mode must be "" or "N", got {stats_mode!r}')
        self._stats_mode = stats_mode

    def forward(self, input):
        """Map (N, C, H, W) to the same shape and dtype."""
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean, mean_of_squares, momentum = self._global_statistics(x)
        var = mean_of_squares - mean * mean
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = self.weight * scale
        bias = -mean * scale if self.bias is None else self.bias - mean * scale
        if self.track_running_stats:
            self.running_mean += momentum * (mean.detach() - self.running_mean)
            self.running_var += momentum * (var.detach() - self.running_var)
        return _affine(x, scale, bias).to(input.dtype)

    def _global_statistics(self, x):
        """Return mean and mean of squares over all processes, (C,) each, and the momentum of this update."""
        num_images, num_channels = x.shape[:2]
        if num_images == 0:
            if self._stats_mode == "":
                raise ValueError(
                    'NaiveSyncBatchNorm(stats_mode="") got an empty batch; use stats_mode="N" (naiveSyncBN_N)'
                )
            # The sum connects the zeros to the graph: the all-reduce of backward must run on every process.
            stats = x.new_zeros(2 * num_channels) + x.sum()
        else:
            stats = torch.cat([x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))])
        if self._stats_mode == "":
            stats = differentiable_all_reduce(stats) / comm.get_world_size()
            return *stats.split(num_channels), self.momentum
        stats = differentiable_all_reduce(torch.cat([stats * num_images, stats.new_tensor([num_images])]))
        total = stats[-1].detach()
        mean, mean_of_squares = (stats[:-1] / total.clamp(min=1)).split(num_channels)
        # If no process has an image, the running statistics do not change.
        return mean, mean_of_squares, cast(float, self.momentum) * total.clamp(max=1)


class CycleBatchNormList(nn.ModuleList):
    """Batch norms of a layer that is shared between feature levels: the k-th call uses norm k modulo length.

    It is for heads that are applied to multiple feature levels in a fixed order. Each level has its own
    statistics, while weight and bias are shared.
    """

    def __init__(self, length: int, bn_class=nn.BatchNorm2d, **kwargs):
        """Build the module.

        Args:
            length: number of norms, i.e. of levels.
            bn_class: class of the norms, called as `bn_class(**kwargs, affine=False)`.
            **kwargs: arguments of `bn_class`, including `num_features`; `affine=False` omits weight and bias.
        """
        self._affine = kwargs.pop("affine", True)
        super().__init__([bn_class(**kwargs, affine=False) for _ in range(length)])
        if self._affine:
            num_features = cast(int, self[0].num_features)
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        self._pos = 0

    def forward(self, x):
        """Map (N, C, H, W) to the same shape with the next norm."""
        out = self[self._pos](x)
        self._pos = (self._pos + 1) % len(self)
        return _affine(out, self.weight, self.bias) if self._affine else out

    def extra_repr(self):
        return f"affine={self._affine}"


class LayerNorm(nn.Module):
    """Layer normalization over the channels of each pixel of an (N, C, H, W) feature map."""

    def __init__(self, normalized_shape, eps=1e-6):
        """Build the module.

        Args:
            normalized_shape: number of channels C.
            eps: added to the variance.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x):
        """Map (N, C, H, W) to the same shape and dtype."""
        centered = x - x.mean(dim=1, keepdim=True)
        var = centered.square().mean(dim=1, keepdim=True)
        return _affine(centered / torch.sqrt(var + self.eps), self.weight, self.bias)


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, num_channels)


def _naive_sync_batch_norm_n(num_channels: int) -> NaiveSyncBatchNorm:
    return NaiveSyncBatchNorm(num_channels, stats_mode="N")


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "nnSyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": _naive_sync_batch_norm_n,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": _group_norm,
    "LN": LayerNorm,
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Build a normalization layer from its config name.

    Args:
        norm: one of BN, SyncBN, nnSyncBN, naiveSyncBN, naiveSyncBN_N, FrozenBN, GN (32 groups), LN; or a
            callable that takes the number of channels; or None or "" for no norm.
        out_channels: number of channels C of the (N, C, H, W) feature maps to normalize.

    Returns:
        The layer, or None.

    Raises:
        ValueError: the name is unknown.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise ValueError(
                f"Unknown norm '{norm}'. Legal: {', '.join(_NORMS)}, or '' for none."
                + suggest(norm, list(_NORMS))
            )
        norm = _NORMS[norm]
    return norm(out_channels)
