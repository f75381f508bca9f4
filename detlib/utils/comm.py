"""Communication between the processes of a distributed run; every function also works in a single process.

Ranks number all processes of all machines, local ranks those of one machine. Objects (not tensors of the
model) travel over gloo, also when the gradients use nccl, so they need no GPU memory.
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
    """Number of processes over all machines."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Number of this process among those of all machines, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """True in the process of rank 0, which alone writes files and logs to the terminal."""
    return get_rank() == 0


def set_timeout(timeout: datetime.timedelta | None) -> None:
    """Sets how long the groups that are created here later wait for a process; None: torch's default."""
    global _TIMEOUT
    _TIMEOUT = timeout


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Creates one process group per machine; every process calls it once, after ``init_process_group``.

    Args:
        num_workers_per_machine: processes on each machine, usually its number of GPUs.

    Raises:
        RuntimeError: called twice.
        ValueError: the world size is not a multiple of `num_workers_per_machine`.
    """
    global _LOCAL_PROCESS_GROUP
    if _LOCAL_PROCESS_GROUP is not None:
        raise RuntimeError("create_local_process_group was called before in this process.")
    world = get_world_size()
    if num_workers_per_machine < 1 or world % num_workers_per_machine:
        raise ValueError(
            f"num_workers_per_machine {num_workers_per_machine} does not divide the world size {world}."
        )
    machine = get_rank() // num_workers_per_machine
    for i in range(world // num_workers_per_machine):
        # Every process takes part in creating every group, its own or not.
        first = i * num_workers_per_machine
        group = dist.new_group(list(range(first, first + num_workers_per_machine)), timeout=_TIMEOUT)
        if i == machine:
            _LOCAL_PROCESS_GROUP = cast(dist.ProcessGroup, group)


def get_local_process_group() -> dist.ProcessGroup:
    """The group of the processes on this machine.

    Raises:
        RuntimeError: `create_local_process_group` was not called; ``detlib.engine.launch`` does so.
    """
    if _LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(
            "There is no local process group. Start the processes with detlib.engine.launch, or call "
            "detlib.utils.comm.create_local_process_group after torch.distributed.init_process_group."
        )
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Waits until every process has come here.

    Raises:
        RuntimeError: if a process does not come in time; in rank 0 it names all that are missing.
    """
    if get_world_size() == 1:
        return
    group = _global_gloo_group()
    if dist.get_backend(group) == dist.Backend.GLOO:
        # A barrier like any other, but it knows who is missing.
        dist.monitored_barrier(group, timeout=_TIMEOUT, wait_all_ranks=True)
    else:
        dist.barrier(group)


def _global_gloo_group() -> dist.ProcessGroup:
    """All processes, with a backend that takes CPU tensors."""
    global _GLOO_GROUP
    if dist.get_backend() != dist.Backend.NCCL:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if _GLOO_GROUP is None:
        _GLOO_GROUP = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    return _GLOO_GROUP


def shutdown() -> None:
    """Ends what ``init_process_group`` began; every process calls it when its work is done.

    It lets go of the groups held here first. A group that lives on until Python exits takes its threads
    along, and these may then abort the process.
    """
    global _LOCAL_PROCESS_GROUP, _GLOO_GROUP
    _LOCAL_PROCESS_GROUP = _GLOO_GROUP = None
    if _is_distributed():
        dist.destroy_process_group()


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the `data` of every process, by rank.

    Args:
        data: any object that pickles.
        group: the processes concerned; default all, over gloo.
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
    """Returns the `data` of every process, by rank, in the process `dst`, and an empty list in the others.

    Args:
        data: any object that pickles.
        dst: global rank of the receiver.
        group: the processes concerned; default all, over gloo.
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
    """Returns the largest `value` of all processes, which must call this together. It is cheap: no pickling,
    no GPU."""
    if get_world_size() == 1:
        return value
    largest = torch.tensor([value])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_global_gloo_group())
    return int(largest)


def shared_random_seed() -> int:
    """Returns a random number below 2**31 that is the same in every process.

    It is drawn by rank 0 from numpy's global generator, so that `seed_all_rng` makes it repeatable. All
    processes must call this together.
    """
    return all_gather(int(np.random.randint(2**31)))[0]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model that `DistributedDataParallel` or `DataParallel` wraps; any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel | DataParallel) else model


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Sums or averages scalars over the processes; the result is valid in rank 0 only.

    Args:
        input_dict: the same names in every process, each with a scalar tensor.
        average: divide by the number of processes.

    Returns:
        The reduced values in rank 0; elsewhere values that mean nothing.
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
