"""Parameters that PyTorch's fully_shard has shared out between processes, in and out of checkpoints.

Files hold whole tensors, whatever number of processes saved them, so they load into any other number.
"""

import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

__all__ = ["gather_shards", "is_shard", "is_sharded", "shard_like", "shard_optimizer_state"]


def is_shard(value: Any) -> bool:
    """Whether a value is a process's share of a tensor, a DTensor."""
    # DTensors are slow to import, and there is none before something has imported them.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes. Every process gives the same answer."""
    return any(is_shard(param) for param in model.parameters())


def gather_shards(value: Any, keep: bool) -> Any:
    """Copy a tree with its sharded tensors made whole, in main memory. Every process has to take part.

    Args:
        value: tensors, and dicts, lists and tuples of anything.
        keep: False, as on all processes but one, leaves None in the place of each sharded tensor.
    """
    if is_shard(value):
        whole = value.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        copy: Any = cast(Any, type(value))((key, gather_shards(item, keep)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # the versions of a state dict's modules
            copy._metadata = value._metadata
        return copy
    if isinstance(value, list | tuple):
        return type(value)(gather_shards(item, keep) for item in value)
    return value


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor, laid out as `like`; without sharding the tensor as it is.

    Args:
        whole: the same in every process, of the shape of `like`.
        like: the parameter that it is for.
    """
    if not is_shard(like) or is_shard(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Share out the state that an optimizer has loaded from a file, as its parameters are."""
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == param.shape:
                state[name] = shard_like(value, param)
