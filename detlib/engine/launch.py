"""Starting of one training process per GPU, or of several on the CPU."""

import datetime
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detlib.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: datetime.timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Runs a function in every process of a distributed training, or just calls it if there is but one.

    Each machine calls this once. On a machine without CUDA the processes share the CPU and talk over gloo.
    Under ``torchrun``, which has started the processes already, the function is run in this one.

    Args:
        main_func: the function; it must be importable by name if there are several processes.
        num_gpus_per_machine: processes on each machine.
        num_machines: how many machines take part.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet, such as "tcp://HOST:PORT". None and "auto" find a free port on
            this machine, which only a single machine can do.
        args: arguments of `main_func`.
        timeout: how long a process waits for the others before it gives up.

    Raises:
        ValueError: if the numbers do not fit together or this machine has too few GPUs.
        torch.multiprocessing.ProcessRaisedException: if a process fails; it shows that one's traceback.
    """
    if num_gpus_per_machine < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"launch needs num_gpus_per_machine >= 1, num_machines >= 1 and machine_rank below num_machines; "
            f"got {num_gpus_per_machine}, {num_machines} and {machine_rank}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        local_rank, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        _run(local_rank, rank, world_size, local_size, "env://", timeout, main_func, args)
        return
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if torch.cuda.is_available():
        _check_gpus(num_gpus_per_machine)
    else:
        logger.warning("There is no CUDA device: %d processes share the CPU", num_gpus_per_machine)
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("Several machines need a dist_url that all of them reach, as tcp://HOST:PORT")
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    if num_machines > 1 and dist_url.startswith("file://"):
        logger.warning("dist_url %s is a file: several machines meet more safely at tcp://", dist_url)
    worker_args = (world_size, num_gpus_per_machine, machine_rank, dist_url, timeout, main_func, args)
    mp.start_processes(_worker, nprocs=num_gpus_per_machine, args=worker_args, daemon=False)


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _check_gpus(needed: int) -> None:
    there = torch.cuda.device_count()
    if needed > there:
        raise ValueError(f"{needed} GPUs were asked for, but this machine has {there}")


def _worker(
    local_rank: int,
    world_size: int,
    local_size: int,
    machine_rank: int,
    dist_url: str,
    timeout: datetime.timedelta,
    main_func: Callable[..., Any],
    args: tuple,
) -> None:
    """What a started process does."""
    rank = machine_rank * local_size + local_rank
    _run(local_rank, rank, world_size, local_size, dist_url, timeout, main_func, args)


def _run(
    local_rank: int,
    rank: int,
    world_size: int,
    local_size: int,
    dist_url: str,
    timeout: datetime.timedelta,
    main_func: Callable[..., Any],
    args: tuple,
) -> None:
    """Joins the process group, runs the function and leaves the group."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        _check_gpus(local_size)
        torch.cuda.set_device(local_rank)
    else:
        # Each process would otherwise use every core, and they would get in each other's way.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    try:
        dist.init_process_group(
            backend="nccl" if has_gpu else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except Exception as e:
        raise RuntimeError(f"Process {rank} of {world_size} could not join the others at {dist_url}") from e
    comm.create_local_process_group(local_size)
    comm.synchronize()
    try:
        main_func(*args)
    finally:
        comm.shutdown()
