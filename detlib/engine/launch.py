"""Launching of one training process per GPU, or of multiple processes on the CPU."""

import datetime
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from detlib.engine.distributed.environment import ProcessInfo, info_from_environment
from detlib.engine.distributed.failures import FailureBoard
from detlib.engine.distributed.process_group import check_gpus, host_and_port, run_as_child, run_here
from detlib.engine.distributed.supervisor import Supervisor

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
    """Run a function in every process of a distributed training run, or just call it if there is only one.

    Each machine calls this once. On a machine without CUDA the processes share the CPU and communicate over
    gloo. If a launcher has already started the processes (torchrun, Slurm's srun, anything that sets RANK,
    WORLD_SIZE and MASTER_ADDR), the function runs in the current process; see
    `detlib.engine.distributed.environment.info_from_environment`.

    When a process fails, all others end within seconds, and all report the first failure. The same happens if
    a process does not join a collective operation within `timeout`; the error names that process.

    Args:
        main_func: the function; it must be importable by name if there are multiple processes.
        num_gpus_per_machine: number of processes on each machine. Under torchrun, 1 or torchrun's number.
        num_machines: number of machines.
        machine_rank: rank of this machine, from 0.
        dist_url: rendezvous URL, such as "tcp://HOST:PORT". None and "auto" find a free port on this machine,
            which works for a single machine only.
        args: arguments of `main_func`.
        timeout: how long a process waits for the others.

    Raises:
        ValueError: if the numbers are inconsistent or this machine has too few GPUs.
        ProcessFailedError: if a process fails; the message names the first one and has its traceback. Under
            a launcher, that process raises its own exception.
        StopTraining: if training was asked to stop, see `detlib.engine.distributed.interrupt`.
    """
    if num_gpus_per_machine < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"launch needs num_gpus_per_machine >= 1, num_machines >= 1 and machine_rank below num_machines; "
            f"got {num_gpus_per_machine}, {num_machines} and {machine_rank}"
        )
    info = _launcher_info(num_gpus_per_machine, num_machines)
    if info is not None:
        if info.world_size == 1:
            main_func(*args)
        else:
            run_here(info, timeout, main_func, args)
        return
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if torch.cuda.is_available():
        check_gpus(num_gpus_per_machine)
    else:
        logger.warning("No CUDA device found: %d processes share the CPU", num_gpus_per_machine)
    store, url = _rendezvous(dist_url, num_machines, machine_rank, world_size, timeout)
    supervisor = Supervisor(
        FailureBoard(store, world_size, timeout.total_seconds()),
        first_rank=machine_rank * num_gpus_per_machine,
        is_last_to_leave=num_machines > 1 and machine_rank == 0,
    )
    child_args = (world_size, num_gpus_per_machine, machine_rank, url, timeout)
    supervisor.run(run_as_child, num_gpus_per_machine, (*child_args, main_func, args))


def _launcher_info(num_gpus: int, num_machines: int) -> ProcessInfo | None:
    """Return the launcher's settings for this process, or None if the arguments request something else."""
    info = info_from_environment()
    if info is None:
        return None
    requested = num_gpus * num_machines
    fits_machine = num_gpus in (1, info.local_size) or info.local_size is None
    if requested == 1 or (fits_machine and requested in (num_gpus, info.world_size)):
        return info
    if info.launcher == "torchrun":
        raise ValueError(
            f"torchrun has started {info.world_size} processes, {info.local_size} on this machine, but "
            f"{num_gpus} on each of {num_machines} machines were requested (--num-gpus, --num-machines). "
            "Leave these arguments out under torchrun."
        )
    logger.warning(
        "Using %d processes on each of %d machines as requested; ignoring the %d processes that %s started",
        num_gpus,
        num_machines,
        info.world_size,
        info.launcher,
    )
    return None


def _rendezvous(
    dist_url: str | None, num_machines: int, machine_rank: int, world_size: int, timeout: datetime.timedelta
) -> tuple[dist.Store, str]:
    """Return the store that all processes share, and its URL.

    This process owns the store, not the process of rank 0, so the store outlives each of them.
    """
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("Multiple machines need a dist_url that all of them can reach: tcp://HOST:PORT")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return store, f"tcp://127.0.0.1:{store.port}"
    if dist_url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"dist_url is env://, but the environment lacks {' and '.join(missing)}")
        dist_url = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if dist_url.startswith("file://"):
        if num_machines > 1:
            logger.warning("dist_url %s is a file: tcp:// is safer for multiple machines", dist_url)
        return dist.FileStore(dist_url.removeprefix("file://"), world_size + num_machines), dist_url
    host, port = host_and_port(dist_url)
    try:
        is_master = machine_rank == 0
        store = dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
    except Exception as e:
        doing = "open" if machine_rank == 0 else "reach machine 0 at"
        raise RuntimeError(f"Could not {doing} the rendezvous {dist_url}: {e}") from e
    return store, dist_url
