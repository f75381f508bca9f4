"""Checkpoints of parameters that PyTorch's fully_shard has sharded across processes.

Files have full tensors, so they can be loaded by any number of processes.
"""

import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

__all__ = ["gather_shards", "is_shard", "is_sharded", "shard_like", "shard_optimizer_state"]


def is_shard(value: Any) -> bool:
    """Return whether a value is a sharded tensor (DTensor)."""
    # DTensor is slow to import, and there can be none before it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model has sharded parameters. The result is the same in every process."""
    return any(is_shard(param) for param in model.parameters())


def gather_shards(value: Any, keep: bool) -> Any:
    """Copy a tree, with sharded tensors gathered in main memory. Every process must call this.

    Args:
        value: tensors, and dicts, lists and tuples of anything.
        keep: whether this process needs the result. If False, sharded tensors become None.
    """
    if is_shard(value):
        full = value.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        copy: Any = cast(Any, type(value))((key, gather_shards(item, keep)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # the versions of a state dict's modules
            copy._metadata = value._metadata
        return copy
    if isinstance(value, list | tuple):
        return type(value)(gather_shards(item, keep) for item in value)
    return value


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor like `like`. Return it unchanged if `like` is not sharded.

    Args:
        whole: the full tensor, which is the same in every process and has the shape of `like`.
        like: the parameter that the result is for.
    """
    if not is_shard(like) or is_shard(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard the state that an optimizer has loaded from a file like its parameters."""
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == param.shape:
                state[name] = shard_like(value, param)
