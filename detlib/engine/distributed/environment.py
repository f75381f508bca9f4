"""What a launcher (torchrun, Slurm, the user's environment) passes to a process: its rank, and restarts."""

import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from detlib.utils import comm
from detlib.utils.file_io import is_remote

__all__ = ["ProcessPlace", "job_port", "place_from_environment", "restart_count", "should_resume"]

logger = logging.getLogger(__name__)

# Made when a training begins. A checkpoint that is older belongs to another training in the same folder.
_MARK = ".training_began"
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class ProcessPlace:
    """The place of this process among all that take part.

    Attributes:
        rank: number of the process, from 0.
        world_size: number of all processes.
        local_rank: number of the process on its machine. None: to be found out from the others.
        local_size: number of processes on this machine. None: likewise.
        url: where the processes meet: "env://" or "tcp://HOST:PORT".
        launcher: who started it, for messages: "torchrun", "the environment" or "srun".
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_size: int | None
    url: str
    launcher: str


def place_from_environment(env: Mapping[str, str] | None = None) -> ProcessPlace | None:
    """Finds out whether a launcher has started this process as one of several.

    Three are known, the first that is there counts:

    1. torchrun: TORCHELASTIC_RUN_ID, with all that torchrun sets;
    2. anything that sets RANK, WORLD_SIZE and MASTER_ADDR (MASTER_PORT, LOCAL_RANK and LOCAL_WORLD_SIZE too,
       if it can), as Kubernetes operators do;
    3. Slurm's srun with several tasks: SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS. A script that
       sbatch runs without srun is no such task, however many tasks its job may have.

    Args:
        env: the environment; None for that of this process.

    Returns:
        The place, also for a world of one process under torchrun; None where nobody started several.

    Raises:
        ValueError: if a variable is missing or is no number, or the rank is none of the world's.
    """
    env = os.environ if env is None else env
    if "TORCHELASTIC_RUN_ID" in env:
        return _checked(_from_variables(env, "torchrun"))
    if all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        place = _checked(_from_variables(env, "the environment"))
        return place if place.world_size > 1 else None
    if "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _checked(_from_srun(env))
    return None


def _from_variables(env: Mapping[str, str], launcher: str) -> ProcessPlace:
    return ProcessPlace(
        rank=_number(env, "RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_rank=_number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None,
        local_size=_number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None,
        # torchrun's own store is found by env:// alone.
        url="env://" if launcher == "torchrun" else _tcp_url(env, env["MASTER_ADDR"], _DEFAULT_PORT),
        launcher=launcher,
    )


def _from_srun(env: Mapping[str, str]) -> ProcessPlace:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    host = env.get("MASTER_ADDR") or (_first_host(nodes) if nodes else "127.0.0.1")
    return ProcessPlace(
        rank=_number(env, "SLURM_PROCID"),
        world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else None,
        local_size=None,
        url=_tcp_url(env, host, job_port(_number(env, "SLURM_JOB_ID", 0))),
        launcher="srun",
    )


def job_port(job_id: int) -> int:
    """The port where the tasks of a job of Slurm meet.

    Jobs that share a machine must not meet at the same one; all tasks of one job know its number.
    """
    return 20000 + job_id % 10000


def _tcp_url(env: Mapping[str, str], host: str, default_port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"tcp://{host}:{_number(env, 'MASTER_PORT', default_port)}"


def _first_host(nodes: str) -> str:
    """The first of Slurm's compressed list: "gpu[07-09,12],big1" gives "gpu07"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ValueError(f"The node list {nodes!r} of Slurm cannot be read; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"The environment lacks {name}, which the launcher of the processes should set")
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"The environment variable {name} is {text!r}, which is no whole number") from None


def _checked(place: ProcessPlace) -> ProcessPlace:
    if not 0 <= place.rank < place.world_size:
        raise ValueError(
            f"{place.launcher} gave rank {place.rank} of {place.world_size} processes; "
            f"legal are 0 to {place.world_size - 1}"
        )
    return place


_RESTART_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "DETLIB_RESTART_COUNT")


def restart_count(env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """How often a launcher has started this training anew after a failure or preemption.

    Returns:
        The count, and the variable that says so: TORCHELASTIC_RESTART_COUNT of torchrun's
        ``--max-restarts``, SLURM_RESTART_COUNT of requeued jobs, or DETLIB_RESTART_COUNT, which
        `detlib.engine.distributed.slurm` sets. ``(0, "")`` in a first start.
    """
    env = os.environ if env is None else env
    for name in _RESTART_VARIABLES:
        count = _number(env, name, 0)
        if count > 0:
            return count, name
    return 0, ""


def should_resume(asked: bool, output_dir: str) -> bool:
    """Whether to resume: if asked to, or if this is a restart by torchrun or Slurm. All processes call it.

    A restart resumes from checkpoints of the training that it restarts, never from what an earlier one left
    in the same folder. Times of files decide that, so remote folders are taken to be this training's own.

    Args:
        asked: whether ``--resume`` was given.
        output_dir: the folder of checkpoints.
    """
    if asked:
        return True
    # Where torchrun restarts the processes of a machine because of another's, only that one counts it.
    gathered = comm.all_gather((restart_count(), _agent()))
    count, variable = max(start for start, _ in gathered)
    agents = {agent for _, agent in gathered if agent}
    main_decides = _decide(count, agents, output_dir) if comm.is_main_process() else None
    is_restart, resume = comm.all_gather(main_decides)[0]
    by = f"number {count} ({variable})" if count else "by the same torchrun"
    if is_restart and resume:
        logger.info("This is a restart %s: --resume is implied", by)
    elif is_restart:
        logger.info("This is a restart %s, but nothing was saved in %s: it starts anew", by, output_dir)
    return resume


def _agent() -> str:
    """Which torchrun has started this process: its machine, number, and time of birth; "" if none has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat") as f:
            born = f.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        born = ""
    return f"{socket.gethostname()} {parent} {born}"


def _decide(count: int, agents: set[str], output_dir: str) -> tuple[bool, bool]:
    """Whether this is a restart, and whether to resume; leaves a mark if a training begins."""
    if is_remote(output_dir):
        return count > 0, count > 0
    mark, last = os.path.join(output_dir, _MARK), os.path.join(output_dir, "last_checkpoint")
    is_restart = count > 0 or bool(agents & _marked_agents(mark))
    if is_restart and os.path.exists(mark) and os.path.exists(last):
        if os.stat(last).st_mtime_ns >= os.stat(mark).st_mtime_ns:
            return True, True
    os.makedirs(output_dir, exist_ok=True)
    with open(mark, "w") as f:
        json.dump({"older checkpoints": "are of another training", "started by": sorted(agents)}, f)
    return is_restart, False


def _marked_agents(mark: str) -> set[str]:
    try:
        with open(mark) as f:
            return set(json.load(f)["started by"])
    except (OSError, ValueError, KeyError):
        return set()
