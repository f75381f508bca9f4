"""Metrics as JSON, one object a line."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from typing import IO, Any

from detlib.utils._event_storage import get_event_storage
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager
from detlib.utils.writers.base import EventWriter, NewScalars
from detlib.utils.writers.earlier_rows import carry_over, set_aside

__all__ = ["JSONWriter"]

logger = logging.getLogger("detlib.utils.events")


class JSONWriter(EventWriter):
    """Appends scalars to a file with one JSON object per line and iteration.

    Each line has "iteration" and the scalars of that iteration, sorted by name::

        {"data_time": 0.008, "iteration": 19, "loss_cls": 0.71, "lr": 0.0004, "total_loss": 1.93}

    A run that goes on at iteration n drops the lines of the iterations from n on, which it does again, and
    keeps those before. The results of an evaluation that it makes up go into the line of that iteration, if
    there is one. A run that starts at 0 gives the file of an earlier one another name, ``metrics.1.json``.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: the file; its directory is made.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
        """
        PathManager.mkdirs(os.path.dirname(json_file) or ".")
        self._path = json_file
        self._file_handle: IO[str] | None = None
        self._new = NewScalars(window_size)

    def write(self) -> None:
        records = self._new.take()
        if not records:
            return
        if self._file_handle is None:
            self._file_handle, records = self._open(records)
        for record in records:
            self._file_handle.write(_line(record))
        self._file_handle.flush()
        with contextlib.suppress(AttributeError, OSError):  # remote files have no descriptor
            os.fsync(self._file_handle.fileno())

    def _open(self, records: list[dict[str, Any]]) -> tuple[IO[str], list[dict[str, Any]]]:
        """Opens the file for appending, once it is known where this run begins.

        Returns:
            The open file, and those of the records that no line of the file has taken up.
        """
        start_iter = get_event_storage().start_iter
        if start_iter == 0:
            set_aside(self._path, _has_rows)
        else:
            records = _take_over(self._path, start_iter, records)
        cut_short = _lacks_newline(self._path)
        handle = PathManager.open(self._path, "a")
        if cut_short:
            # The run before was killed in the middle of a line: keep ours apart from it.
            handle.write("\n")
        return handle, records

    def close(self) -> None:
        if self._file_handle is not None:
            self._file_handle.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line, None for what is none, such as a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None


def _has_rows(path: str) -> bool:
    with PathManager.open(path) as f:
        return any(_parse(line) for line in f)


def _take_over(path: str, start_iter: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes the file of an earlier run ready for the records of this one; returns those to be appended."""
    if not PathManager.isfile(path):
        return records
    with PathManager.open(path) as f:
        lines = f.readlines()
    coming = {record["iteration"]: record for record in records}
    kept = []
    for line in lines:
        earlier = _parse(line)
        if earlier is not None:
            row = carry_over(earlier, coming, start_iter)
            if row is None:
                continue
            line = line if row is earlier else _line(row)
        kept.append(line)
    if kept != lines:
        write_bytes_atomically(path, lambda f: f.write("".join(kept).encode()))
    if len(kept) < len(lines):
        logger.info(
            "%s: dropped %d lines of iterations that are done again, from %d on",
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
