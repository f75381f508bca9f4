"""What becomes of the rows that a run before has left in a file of metrics."""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from detlib.utils.file_io import is_remote

__all__ = ["carry_over", "is_done_again", "set_aside"]

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


def carry_over(
    row: Mapping[str, Any], coming: dict[int, dict[str, Any]], start_iter: int
) -> Mapping[str, Any] | None:
    """What becomes of a row when a run goes on at an iteration: it goes, it stays, or it gets results.

    An evaluation that was cut off is made up for the step before the first. That step's losses may have been
    written, and results too if the run was killed just then: what is measured now counts.

    Args:
        row: "iteration" and scalars.
        coming: the rows that will be written next, by iteration. One that is put into `row` is taken out.
        start_iter: the first iteration of the run that goes on.

    Returns:
        The row as it is to stand, `row` itself if nothing changes; None if it is done again.
    """
    if is_done_again(row, start_iter, coming):
        return None
    new = coming.pop(int(row["iteration"]), None)
    return row if new is None else {**row, **new}


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
