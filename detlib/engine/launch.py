"""Starting of one training process per GPU, or of several on the CPU."""

import datetime
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from detlib.engine.distributed.environment import ProcessPlace, place_from_environment
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
    """Runs a function in every process of a distributed training, or just calls it if there is but one.

    Each machine calls this once. On a machine without CUDA the processes share the CPU and talk over gloo.
    Where a launcher has started the processes already (torchrun, Slurm's srun, anything that sets RANK,
    WORLD_SIZE and MASTER_ADDR), the function is run in this one; see
    `detlib.engine.distributed.environment.place_from_environment`.

    When a process fails, all others end within seconds, and all say what the first failure was. A process
    that does not take part in an operation for `timeout` seconds ends them too, and is named.

    Args:
        main_func: the function; it must be importable by name if there are several processes.
        num_gpus_per_machine: processes on each machine. torchrun knows it: 1 or what it says.
        num_machines: how many machines take part.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet, such as "tcp://HOST:PORT". None and "auto" find a free port on
            this machine, which only a single machine can do.
        args: arguments of `main_func`.
        timeout: how long a process waits for the others before it gives up.

    Raises:
        ValueError: if the numbers do not fit together or this machine has too few GPUs.
        ProcessFailedError: if a process fails; it tells which one was first, with its traceback. Under a
            launcher, that one raises its own exception.
        StopTraining: if the training was asked to stop, see `detlib.engine.distributed.interrupt`.
    """
    if num_gpus_per_machine < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"launch needs num_gpus_per_machine >= 1, num_machines >= 1 and machine_rank below num_machines; "
            f"got {num_gpus_per_machine}, {num_machines} and {machine_rank}"
        )
    place = _fitting_place(num_gpus_per_machine, num_machines)
    if place is not None:
        if place.world_size == 1:
            main_func(*args)
        else:
            run_here(place, timeout, main_func, args)
        return
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if torch.cuda.is_available():
        check_gpus(num_gpus_per_machine)
    else:
        logger.warning("There is no CUDA device: %d processes share the CPU", num_gpus_per_machine)
    store, url = _meeting_point(dist_url, num_machines, machine_rank, world_size, timeout)
    supervisor = Supervisor(
        FailureBoard(store, world_size, timeout.total_seconds()),
        first_rank=machine_rank * num_gpus_per_machine,
        is_last_to_leave=num_machines > 1 and machine_rank == 0,
    )
    place_args = (world_size, num_gpus_per_machine, machine_rank, url, timeout)
    supervisor.run(run_as_child, num_gpus_per_machine, (*place_args, main_func, args))


def _fitting_place(num_gpus: int, num_machines: int) -> ProcessPlace | None:
    """The place that a launcher gave this process, unless the arguments ask for something else."""
    place = place_from_environment()
    if place is None:
        return None
    asked = num_gpus * num_machines
    fits_machine = num_gpus in (1, place.local_size) or place.local_size is None
    if asked == 1 or (fits_machine and asked in (num_gpus, place.world_size)):
        return place
    if place.launcher == "torchrun":
        raise ValueError(
            f"torchrun has started {place.world_size} processes, {place.local_size} on this machine, but "
            f"{num_gpus} on each of {num_machines} machines were asked for (--num-gpus, --num-machines). "
            "torchrun's own arguments are enough."
        )
    logger.warning(
        "%d processes on each of %d machines were asked for: that %s has started %d goes unheeded",
        num_gpus,
        num_machines,
        place.launcher,
        place.world_size,
    )
    return None


def _meeting_point(
    dist_url: str | None, num_machines: int, machine_rank: int, world_size: int, timeout: datetime.timedelta
) -> tuple[dist.Store, str]:
    """The store that all processes share, and the address at which they find it.

    It is kept by this process and not by that of rank 0, so that it outlives each of them.
    """
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("Several machines need a dist_url that all of them reach, as tcp://HOST:PORT")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return store, f"tcp://127.0.0.1:{store.port}"
    if dist_url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"dist_url is env://, but the environment lacks {' and '.join(missing)}")
        dist_url = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if dist_url.startswith("file://"):
        if num_machines > 1:
            logger.warning("dist_url %s is a file: several machines meet more safely at tcp://", dist_url)
        return dist.FileStore(dist_url.removeprefix("file://"), world_size + num_machines), dist_url
    host, port = host_and_port(dist_url)
    try:
        is_master = machine_rank == 0
        store = dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
    except Exception as e:
        doing = "be opened here" if machine_rank == 0 else "be reached, where machine 0 should wait"
        raise RuntimeError(f"The meeting point {dist_url} could not {doing}: {e}") from e
    return store, dist_url
