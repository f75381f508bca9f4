"""Whether a training that a launcher has started anew goes on from its last checkpoint."""

import json
import logging
import os
import socket

from detlib.engine.distributed.environment import restart_count
from detlib.utils import comm
from detlib.utils.file_io import is_remote

__all__ = ["should_resume"]

logger = logging.getLogger(__name__)

# Made when a training begins. A checkpoint that is older belongs to another training in the same folder.
_MARK = ".training_began"


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
