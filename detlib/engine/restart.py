"""Whether a training that a launcher has started anew goes on from its last checkpoint."""

import logging
import os

from detlib.engine.process_env import restart_count
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
    count, variable = restart_count()
    resume = comm.all_gather(_decide(count, output_dir) if comm.is_main_process() else None)[0]
    if count and resume:
        logger.info("This is restart number %d (%s): --resume is implied", count, variable)
    elif count:
        logger.info(
            "This is restart number %d (%s), but the training had saved no checkpoint in %s: it starts anew",
            count,
            variable,
            output_dir,
        )
    return resume


def _decide(count: int, output_dir: str) -> bool:
    if is_remote(output_dir):
        return count > 0
    mark, last = os.path.join(output_dir, _MARK), os.path.join(output_dir, "last_checkpoint")
    if count and os.path.exists(mark) and os.path.exists(last):
        if os.stat(last).st_mtime_ns >= os.stat(mark).st_mtime_ns:
            return True
    os.makedirs(output_dir, exist_ok=True)
    with open(mark, "w") as f:
        f.write("Checkpoints that are older than this file are not of the training that began last.\n")
    return False
