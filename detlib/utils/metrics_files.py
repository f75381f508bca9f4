"""Handling of the metrics files of an earlier run: rows to keep or to change, files to rename."""

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any

from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager, is_remote

__all__ = ["carry_over", "json_line", "open_json_file", "set_aside"]

logger = logging.getLogger(__name__)


def _is_done_again(row: Mapping[str, Any], start_iter: int, coming: Collection[int]) -> bool:
    """Return whether a resumed run repeats the iteration of a row.

    The results of the last evaluation have the number of finished steps as iteration, which is where the
    resumed run begins. Such a row has no learning rate, because no step was made, and is kept.

    Args:
        row: "iteration" and scalars.
        start_iter: the first iteration of the resumed run.
        coming: iterations of the rows that will be written next.
    """
    iteration = int(row["iteration"])
    if iteration != start_iter:
        return iteration > start_iter
    return iteration in coming or row.get("lr") not in (None, "")


def carry_over(
    row: Mapping[str, Any], coming: dict[int, dict[str, Any]], start_iter: int
) -> Mapping[str, Any] | None:
    """Return the row that a resumed run keeps for an existing one: dropped, unchanged, or with new results.

    An interrupted evaluation is re-run for the step before the first. The losses of that step may have been
    written, and results too if the run was killed just then: the new results replace them.

    Args:
        row: "iteration" and scalars.
        coming: the rows that will be written next, by iteration. A row that is merged into `row` is removed.
        start_iter: the first iteration of the resumed run.

    Returns:
        The new row, `row` itself if nothing changes, or None if the iteration is repeated.
    """
    if _is_done_again(row, start_iter, coming):
        return None
    new = coming.pop(int(row["iteration"]), None)
    return row if new is None else {**row, **new}


def set_aside(path: str, has_rows: Callable[[str], bool]) -> None:
    """Rename the metrics file of an earlier run: ``metrics.json`` to ``metrics.1.json``.

    Args:
        path: the file, which need not exist. Remote files are not renamed.
        has_rows: returns for the path whether the file is worth keeping.
    """
    if is_remote(path) or not os.path.isfile(path) or not has_rows(path):
        return
    stem, suffix = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}.{number}{suffix}"):
        number += 1
    aside = f"{stem}.{number}{suffix}"
    os.rename(path, aside)
    logger.info("Renamed the metrics of an earlier run from %s to %s", path, os.path.basename(aside))


def open_json_file(
    path: str, start_iter: int, records: list[dict[str, Any]]
) -> tuple[IO[str], list[dict[str, Any]]]:
    """Open a JSON-lines file for appending, after adapting what an earlier run left in it.

    Args:
        path: the file.
        start_iter: the first iteration of this run. A run that starts at 0 sets the file aside.
        records: the records to be written next, with "iteration" and scalars.

    Returns:
        The open file, and the records that no existing line has absorbed.
    """
    if start_iter == 0:
        set_aside(path, _has_json_rows)
    else:
        records = _take_over_json(path, start_iter, records)
    cut_short = _lacks_newline(path)
    handle = PathManager.open(path, "a")
    if cut_short:
        # The earlier run was killed in the middle of a line, so start a new one.
        handle.write("\n")
    return handle, records


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _parse_json(line: str) -> dict[str, Any] | None:
    """Return the record of a line, or None if the line is not a record, such as a truncated line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None


def _has_json_rows(path: str) -> bool:
    with PathManager.open(path) as f:
        return any(_parse_json(line) for line in f)


def _take_over_json(path: str, start_iter: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepare the file of an earlier run for the records of this one; return those to be appended."""
    if not PathManager.isfile(path):
        return records
    with PathManager.open(path) as f:
        lines = f.readlines()
    coming = {record["iteration"]: record for record in records}
    kept = []
    for line in lines:
        earlier = _parse_json(line)
        if earlier is not None:
            row = carry_over(earlier, coming, start_iter)
            if row is None:
                continue
            line = line if row is earlier else json_line(row)
        kept.append(line)
    if kept != lines:
        write_bytes_atomically(path, lambda f: f.write("".join(kept).encode()))
    if len(kept) < len(lines):
        logger.info(
            "%s: dropped %d lines of iterations that are repeated, from %d on",
            path,
            len(lines) - len(kept),
            start_iter,
        )
    return list(coming.values())


def _lacks_newline(path: str) -> bool:
    if not PathManager.isfile(path):
        return False
    with PathManager.open(path, "rb") as f:
        if f.seek(0, os.SEEK_END) == 0:
            return False
        f.seek(-1, os.SEEK_END)
        return f.read(1) != b"\n"
