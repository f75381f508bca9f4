"""Activation checkpointing: blocks of the backbone are recomputed in the backward pass to save memory.

See "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["add_activation_checkpoints", "find_backbone_blocks"]

logger = logging.getLogger(__name__)


def add_activation_checkpoints(model: nn.Module) -> int:
    """Make each block of the model's backbone keep only its input for the backward pass.

    Parameter names and results do not change; BatchNorm updates its running statistics once per batch.

    Args:
        model: a model with a submodule ``backbone``; modified in-place.

    Returns:
        The number of blocks.

    Raises:
        ValueError: if the model has no backbone, or the backbone has no blocks.
    """
    blocks = find_backbone_blocks(model)
    if not blocks:
        raise ValueError(
            f"TRAIN.ACTIVATION_CHECKPOINT needs a model whose backbone consists of blocks; the backbone of "
            f"{type(model).__name__} is a {type(getattr(model, 'backbone', None)).__name__}"
        )
    for block in blocks:
        block.forward = functools.partial(_run, block, block.forward)
    logger.info("Activation checkpointing: recomputing %d backbone blocks in the backward pass", len(blocks))
    return len(blocks)


def _run(block: nn.Module, forward: Callable, *args, **kwargs):
    if not block.training:
        return forward(*args, **kwargs)
    contexts = functools.partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def find_backbone_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model's backbone, such as residual blocks and transformer layers.

    Blocks are the elements of the innermost `nn.Sequential` and `nn.ModuleList` that have children
    themselves.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return []
    blocks = []
    for container in backbone.modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        for element in container:
            is_composite = any(True for _ in element.children())
            if is_composite and not isinstance(element, nn.Sequential | nn.ModuleList):
                blocks.append(element)
    # Blocks that contain blocks, such as a stage of Swin, are left out: they would keep the activations that
    # the inner blocks drop.
    found = {id(block) for block in blocks}
    return [b for b in blocks if not any(id(part) in found for part in b.modules() if part is not b)]


def _contexts(block: nn.Module):
    """Return the contexts of the first and the second forward pass, for `torch.utils.checkpoint`."""
    return contextlib.nullcontext(), _running_statistics_kept(block)


@contextlib.contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Momentum 0 leaves the statistics unchanged; a copy of the counter absorbs the second increment.
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count
