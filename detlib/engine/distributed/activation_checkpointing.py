"""Computing the insides of backbone blocks twice instead of keeping them for the backward pass.

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
    """Makes each block of the model's backbone keep only its input for the backward pass.

    Parameter names and results stay as they are; BatchNorm's running statistics take in each batch once.

    Args:
        model: a model with a part ``backbone``; changed in place.

    Returns:
        The number of blocks.

    Raises:
        ValueError: if there is no backbone, or no such block in it.
    """
    blocks = find_backbone_blocks(model)
    if not blocks:
        raise ValueError(
            f"TRAIN.ACTIVATION_CHECKPOINT needs a model with a backbone of blocks; the backbone of "
            f"{type(model).__name__} is a {type(getattr(model, 'backbone', None)).__name__}"
        )
    for block in blocks:
        block.forward = functools.partial(_run, block, block.forward)
    logger.info("%d blocks of the backbone are computed again in the backward pass", len(blocks))
    return len(blocks)


def _run(block: nn.Module, forward: Callable, *args, **kwargs):
    if not block.training:
        return forward(*args, **kwargs)
    contexts = functools.partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def find_backbone_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model's backbone, such as residual blocks and transformer layers.

    They are the elements of its innermost `nn.Sequential` and `nn.ModuleList` that have parts of their own.
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
    # A block that holds blocks, such as a stage of Swin, would keep what these do not: only the inner count.
    found = {id(block) for block in blocks}
    return [b for b in blocks if not any(id(part) in found for part in b.modules() if part is not b)]


def _contexts(block: nn.Module):
    """What `torch.utils.checkpoint` puts around the first and the second computation."""
    return contextlib.nullcontext(), _running_statistics_kept(block)


@contextlib.contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # With momentum 0 the statistics stay; the count goes to a copy.
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count
