"""Metrics as a table."""

import contextlib
import csv
import io
import os

from detlib.utils._event_storage import get_event_storage
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager
from detlib.utils.writers.base import EventWriter, NewScalars
from detlib.utils.writers.earlier_rows import carry_over, set_aside

__all__ = ["CSVWriter"]


class CSVWriter(EventWriter):
    """Writes scalars to a file of comma-separated values: a header, then a row for each iteration.

    The first column is "iteration". A scalar that appears later, such as a result of the first evaluation,
    gets a new column at the end, and the file is written anew with it. As for earlier runs, see `JSONWriter`.
    """

    def __init__(self, csv_file: str, window_size: int = 20) -> None:
        """
        Args:
            csv_file: the file; its directory is made.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
        """
        PathManager.mkdirs(os.path.dirname(csv_file) or ".")
        self._path = csv_file
        self._columns: list[str] | None = None
        self._new = NewScalars(window_size)

    def write(self) -> None:
        records = self._new.take()
        if not records:
            return
        if self._columns is None:
            self._columns, records = self._take_over(records)
        names = {name for record in records for name in record}
        unknown = sorted(names - set(self._columns))
        if unknown:
            _, rows = _read(self._path)
            self._columns += unknown
            _write_all(self._path, self._columns, [*rows, *records])
            return
        with PathManager.open(self._path, "a", newline="") as f:
            csv.DictWriter(f, self._columns, lineterminator="\n").writerows(records)
            f.flush()
            with contextlib.suppress(AttributeError, OSError):  # remote files have no descriptor
                os.fsync(f.fileno())

    def _take_over(self, records: list[dict]) -> tuple[list[str], list[dict]]:
        """Makes the file ready for the rows of this run.

        Returns:
            Its columns, and those of the records that no row of the file has taken up.
        """
        start_iter = get_event_storage().start_iter
        if start_iter == 0:
            set_aside(self._path, lambda path: bool(_read(path)[1]))
            columns, rows = [], []
        else:
            columns, rows = _read(self._path)
        coming = {record["iteration"]: record for record in records}
        carried = [carry_over(row, coming, start_iter) for row in rows]
        kept = [row for row in carried if row is not None]
        columns = columns or ["iteration"]
        columns += sorted({name for row in kept for name in row} - set(columns))
        # In any case: a run that was killed may have left half a row.
        _write_all(self._path, columns, kept)
        return columns, list(coming.values())


def _read(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Header and whole rows of a file; nothing of one that is not there."""
    if not PathManager.isfile(path):
        return [], []
    with PathManager.open(path, newline="") as f:
        reader = csv.DictReader(f)
        rows = [row for row in reader if _is_whole(row)]
        return list(reader.fieldnames or []), rows


def _is_whole(row: dict) -> bool:
    # A row that was cut short lacks columns, or has some more if another was written behind it.
    return None not in row and None not in row.values() and (row.get("iteration") or "").isdigit()


def _write_all(path: str, columns: list[str], rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomically(path, lambda f: f.write(text.getvalue().encode()))
