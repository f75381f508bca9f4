"""Rank and restart count that a launcher (torchrun, Slurm, the environment) passes to a process."""

import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from detlib.utils import comm
from detlib.utils.file_io import is_remote

__all__ = ["ProcessInfo", "job_port", "info_from_environment", "restart_count", "should_resume"]

logger = logging.getLogger(__name__)

# Written when a training run begins. Older checkpoints in the same folder belong to another run.
_MARK = ".training_began"
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class ProcessInfo:
    """The rank of this process among all processes, and how it joins them.

    Attributes:
        rank: rank of the process, from 0.
        world_size: number of processes.
        local_rank: rank of the process on its machine. None if it must be determined with the others.
        local_size: number of processes on this machine. None likewise.
        url: rendezvous URL: "env://" or "tcp://HOST:PORT".
        launcher: name of the launcher, for messages: "launch", "torchrun", "the environment" or "srun".
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_size: int | None
    url: str
    launcher: str


def info_from_environment(env: Mapping[str, str] | None = None) -> ProcessInfo | None:
    """Detect whether a launcher has started this process as one of several.

    These launchers are recognized, in this order:

    1. torchrun: TORCHELASTIC_RUN_ID, with the other variables of torchrun;
    2. anything that sets RANK, WORLD_SIZE and MASTER_ADDR (and optionally MASTER_PORT, LOCAL_RANK and
       LOCAL_WORLD_SIZE), as Kubernetes operators do;
    3. Slurm's srun with multiple tasks: SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS. A script that
       sbatch runs without srun does not count, however many tasks its job has.

    Args:
        env: environment variables; None for those of this process.

    Returns:
        The rank and rendezvous, also for a single process under torchrun; None if no launcher started
        multiple processes.

    Raises:
        ValueError: if a variable is missing or not a number, or the rank is not below the world size.
    """
    env = os.environ if env is None else env
    if "TORCHELASTIC_RUN_ID" in env:
        return _checked(_from_variables(env, "torchrun"))
    if all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        info = _checked(_from_variables(env, "the environment"))
        return info if info.world_size > 1 else None
    if "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _checked(_from_srun(env))
    return None


def _from_variables(env: Mapping[str, str], launcher: str) -> ProcessInfo:
    return ProcessInfo(
        rank=_number(env, "RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_rank=_number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None,
        local_size=_number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None,
        # Only env:// finds torchrun's own store.
        url="env://" if launcher == "torchrun" else _tcp_url(env, env["MASTER_ADDR"], _DEFAULT_PORT),
        launcher=launcher,
    )


def _from_srun(env: Mapping[str, str]) -> ProcessInfo:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    host = env.get("MASTER_ADDR") or (_first_host(nodes) if nodes else "127.0.0.1")
    return ProcessInfo(
        rank=_number(env, "SLURM_PROCID"),
        world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else None,
        local_size=None,
        url=_tcp_url(env, host, job_port(_number(env, "SLURM_JOB_ID", 0))),
        launcher="srun",
    )


def job_port(job_id: int) -> int:
    """Return the rendezvous port for the tasks of a Slurm job.

    It follows from the job id, so all tasks agree on it, and jobs that share a machine get different ports.
    """
    return 20000 + job_id % 10000


def _tcp_url(env: Mapping[str, str], host: str, default_port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"tcp://{host}:{_number(env, 'MASTER_PORT', default_port)}"


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's compressed node list: "gpu[07-09,12],big1" gives "gpu07"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ValueError(f"Cannot parse Slurm's node list {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"The environment variable {name} is not set; the launcher should set it")
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"The environment variable {name} must be an integer, got {text!r}") from None


def _checked(info: ProcessInfo) -> ProcessInfo:
    if not 0 <= info.rank < info.world_size:
        raise ValueError(
            f"{info.launcher} set rank {info.rank} for {info.world_size} processes; "
            f"it must be in [0, {info.world_size - 1}]"
        )
    return info


_RESTART_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "DETLIB_RESTART_COUNT")


def restart_count(env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Return how often a launcher has restarted this training run after a failure or preemption.

    Returns:
        The count, and the variable it was read from: TORCHELASTIC_RESTART_COUNT of torchrun's
        ``--max-restarts``, SLURM_RESTART_COUNT of requeued jobs, or DETLIB_RESTART_COUNT, which
        `detlib.engine.distributed.slurm` sets. ``(0, "")`` on the first start.
    """
    env = os.environ if env is None else env
    for name in _RESTART_VARIABLES:
        count = _number(env, name, 0)
        if count > 0:
            return count, name
    return 0, ""


def should_resume(asked: bool, output_dir: str) -> bool:
    """Return whether to resume: if requested, or if torchrun or Slurm restarted the run.

    All processes must call this. A restart resumes from checkpoints of the run that it restarts, never from
    those that an earlier run left in the same folder. Modification times decide that, so checkpoints in a
    remote folder are assumed to belong to this run.

    Args:
        asked: whether ``--resume`` was given.
        output_dir: the folder of checkpoints.
    """
    if asked:
        return True
    # If torchrun restarts this machine's processes because another machine's failed, only that one counts it.
    gathered = comm.all_gather((restart_count(), _agent()))
    count, variable = max(start for start, _ in gathered)
    agents = {agent for _, agent in gathered if agent}
    main_decides = _decide(count, agents, output_dir) if comm.is_main_process() else None
    is_restart, resume = comm.all_gather(main_decides)[0]
    which = f"Restart {count} ({variable})" if count else "Restart by the same torchrun"
    if is_restart and resume:
        logger.info("%s: resuming as with --resume", which)
    elif is_restart:
        logger.info("%s: no checkpoint of this run in %s, starting from the beginning", which, output_dir)
    return resume


def _agent() -> str:
    """Identify the torchrun that started this process by host, pid and start time; "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat") as f:
            start_time = f.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start_time = ""
    return f"{socket.gethostname()} {parent} {start_time}"


def _decide(count: int, agents: set[str], output_dir: str) -> tuple[bool, bool]:
    """Return whether this is a restart, and whether to resume; write the mark if a run begins."""
    if is_remote(output_dir):
        return count > 0, count > 0
    mark, last = os.path.join(output_dir, _MARK), os.path.join(output_dir, "last_checkpoint")
    is_restart = count > 0 or bool(agents & _marked_agents(mark))
    if is_restart and os.path.exists(mark) and os.path.exists(last):
        if os.stat(last).st_mtime_ns >= os.stat(mark).st_mtime_ns:
            return True, True
    os.makedirs(output_dir, exist_ok=True)
    with open(mark, "w") as f:
        note = "checkpoints older than this file belong to another training run"
        json.dump({"note": note, "started by": sorted(agents)}, f)
    return is_restart, False


def _marked_agents(mark: str) -> set[str]:
    try:
        with open(mark) as f:
            return set(json.load(f)["started by"])
    except (OSError, ValueError, KeyError):
        return set()
