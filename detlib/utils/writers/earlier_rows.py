"""What becomes of the rows that a run before has left in a file of metrics."""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from detlib.utils.file_io import is_remote

__all__ = ["is_done_again", "set_aside"]

logger = logging.getLogger("detlib.utils.events")


def is_done_again(row: Mapping[str, Any], start_iter: int, coming: Collection[int]) -> bool:
    """Whether a run that goes on at an iteration measures anew what a row says.

    The results of a last evaluation bear the number of steps done, which is where the next run begins; such
    a row has no learning rate, as no step was made, and stays.

    Args:
        row: "iteration" and scalars.
        start_iter: the first iteration of the run that goes on.
        coming: iterations of the rows that will be written next.
    """
    iteration = int(row["iteration"])
    if iteration != start_iter:
        return iteration > start_iter
    return iteration in coming or row.get("lr") not in (None, "")


def set_aside(path: str, has_rows: Callable[[str], bool]) -> None:
    """Gives another name to the file of a run that does not go on: ``metrics.json`` to ``metrics.1.json``.

    Args:
        path: the file, which need not be there. At an address other than a path it stays.
        has_rows: gets its path and says whether it is worth keeping.
    """
    if is_remote(path) or not os.path.isfile(path) or not has_rows(path):
        return
    stem, suffix = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}.{number}{suffix}"):
        number += 1
    aside = f"{stem}.{number}{suffix}"
    os.rename(path, aside)
    logger.info("The metrics of an earlier training in %s are now in %s", path, os.path.basename(aside))
