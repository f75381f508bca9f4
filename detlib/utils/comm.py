"""Communication between the processes of a distributed run. Every function also works in a single process.

Ranks count the processes of all machines, local ranks those of one machine. Python objects are sent over
gloo, even if gradients use NCCL, so they need no GPU memory.
"""

import datetime
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = [
    "agree_on_max",
    "all_gather",
    "create_local_process_group",
    "gather",
    "get_local_process_group",
    "get_local_rank",
    "get_local_size",
    "get_rank",
    "get_world_size",
    "is_main_process",
    "reduce_dict",
    "set_timeout",
    "shared_random_seed",
    "shutdown",
    "synchronize",
    "unwrap",
]

_LOCAL_PROCESS_GROUP: dist.ProcessGroup | None = None
_GLOO_GROUP: dist.ProcessGroup | None = None
_TIMEOUT: datetime.timedelta | None = None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes on all machines."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Return the rank of this process among those of all machines, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """Return whether this is rank 0, the only process that writes files and logs to the terminal."""
    return get_rank() == 0


def set_timeout(timeout: datetime.timedelta | None) -> None:
    """Set the timeout of the groups that this module creates later; None for torch's default."""
    global _TIMEOUT
    _TIMEOUT = timeout


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Create one process group per machine. Every process calls this once, after ``init_process_group``.

    Args:
        num_workers_per_machine: number of processes on each machine, usually its number of GPUs.

    Raises:
        RuntimeError: if it is called twice.
        ValueError: if the world size is not a multiple of `num_workers_per_machine`.
    """
    global _LOCAL_PROCESS_GROUP
    if _LOCAL_PROCESS_GROUP is not None:
        raise RuntimeError("create_local_process_group was already called in this process.")
    world = get_world_size()
    if num_workers_per_machine < 1 or world % num_workers_per_machine:
        raise ValueError(
            f"num_workers_per_machine {num_workers_per_machine} does not divide the world size {world}."
        )
    machine = get_rank() // num_workers_per_machine
    for i in range(world // num_workers_per_machine):
        # Every process must take part in the creation of every group.
        first = i * num_workers_per_machine
        group = dist.new_group(list(range(first, first + num_workers_per_machine)), timeout=_TIMEOUT)
        if i == machine:
            _LOCAL_PROCESS_GROUP = cast(dist.ProcessGroup, group)


def get_local_process_group() -> dist.ProcessGroup:
    """Return the group of the processes on this machine.

    Raises:
        RuntimeError: if `create_local_process_group` was not called; ``detlib.engine.launch`` does so.
    """
    if _LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(
            "There is no local process group. Start the processes with detlib.engine.launch, or call "
            "detlib.utils.comm.create_local_process_group after torch.distributed.init_process_group."
        )
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """Return the rank of this process among those of its machine, from 0."""
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Return the number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Wait until every process has called this function.

    Raises:
        RuntimeError: if a process does not arrive in time; on rank 0 the message names all missing ranks.
    """
    if get_world_size() == 1:
        return
    group = _global_gloo_group()
    if dist.get_backend(group) == dist.Backend.GLOO:
        # Unlike other barriers, this one knows which ranks are missing.
        dist.monitored_barrier(group, timeout=_TIMEOUT, wait_all_ranks=True)
    else:
        dist.barrier(group)


def _global_gloo_group() -> dist.ProcessGroup:
    """Return the group of all processes, with a backend for CPU tensors."""
    global _GLOO_GROUP
    if dist.get_backend() != dist.Backend.NCCL:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if _GLOO_GROUP is None:
        _GLOO_GROUP = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    return _GLOO_GROUP


def shutdown() -> None:
    """Destroy the process group. Every process calls this when its work is done.

    The groups of this module are released first. The threads of a group that lives until Python exits can
    abort the process.
    """
    global _LOCAL_PROCESS_GROUP, _GLOO_GROUP
    _LOCAL_PROCESS_GROUP = _GLOO_GROUP = None
    if _is_distributed():
        dist.destroy_process_group()


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `data` of every process, by rank.

    Args:
        data: any object that can be pickled.
        group: the process group; default all processes, over gloo.
    """
    if get_world_size() == 1:
        return [data]
    group = _global_gloo_group() if group is None else group
    world = dist.get_world_size(group)
    if world == 1:
        return [data]
    output: list[Any] = [None] * world
    dist.all_gather_object(output, data, group=group)
    return output


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `data` of every process, by rank, on rank `dst`, and an empty list on the others.

    Args:
        data: any object that can be pickled.
        dst: global rank of the receiver.
        group: the process group; default all processes, over gloo.
    """
    if get_world_size() == 1:
        return [data]
    group = _global_gloo_group() if group is None else group
    world = dist.get_world_size(group)
    if world == 1:
        return [data]
    if dist.get_rank() != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    output: list[Any] = [None] * world
    dist.gather_object(data, output, dst=dst, group=group)
    return output


def agree_on_max(value: int) -> int:
    """Return the largest `value` of all processes, which must all call this. Cheap: no pickling, no GPU."""
    if get_world_size() == 1:
        return value
    largest = torch.tensor([value])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_global_gloo_group())
    return int(largest)


def shared_random_seed() -> int:
    """Return a random number below 2**31 that is the same in every process.

    Rank 0 draws it from numpy's global generator, so `seed_all_rng` makes it reproducible. All processes must
    call this.
    """
    return all_gather(int(np.random.randint(2**31)))[0]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `DistributedDataParallel` or `DataParallel`, and any other model unchanged."""
    return model.module if isinstance(model, DistributedDataParallel | DataParallel) else model


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Sum or average scalars over the processes; the result is valid on rank 0 only.

    Args:
        input_dict: scalar tensors by name, with the same names in every process.
        average: divide by the number of processes.

    Returns:
        The reduced values on rank 0; on other ranks the values are undefined.
    """
    world = get_world_size()
    if world == 1:
        return input_dict
    with torch.no_grad():
        names = sorted(input_dict)  # all processes must agree on the order
        values = torch.stack([input_dict[name].detach() for name in names], dim=0)
        dist.reduce(values, dst=0)
        if average and dist.get_rank() == 0:
            values /= world
        return dict(zip(names, values))
