"""Loggers with colors and one file per process, rate-limited messages, and small tables."""

import functools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import IO, Any

from detlib.utils import live_line
from detlib.utils.file_io import PathManager

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

_PLAIN = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"
_LEVEL_STYLE = {logging.WARNING: "\033[31m", logging.ERROR: "\033[4;31m", logging.CRITICAL: "\033[1;31m"}
_GREEN, _RESET = "\033[32m", "\033[0m"


class _Formatter(logging.Formatter):
    """A formatter that abbreviates the root name of the logger and optionally colors the prefix."""

    def __init__(self, root_name: str, abbrev_name: str, color: bool) -> None:
        prefix = f"{_GREEN}[%(asctime)s %(name)s]{_RESET}: " if color else ""
        super().__init__(prefix + "%(message)s" if color else _PLAIN, datefmt=_DATE)
        self._root, self._abbrev, self._color = root_name, abbrev_name, color

    def format(self, record: logging.LogRecord) -> str:
        name = record.name
        if self._abbrev != self._root and (name == self._root or name.startswith(self._root + ".")):
            # Change a copy, because other handlers get the same record.
            record = logging.makeLogRecord(record.__dict__)
            record.name = (self._abbrev + name[len(self._root) :]).lstrip(".")
        text = super().format(record)
        style = _LEVEL_STYLE.get(record.levelno)
        return f"{style}{record.levelname}{_RESET} {text}" if self._color and style else text


@functools.cache
def _open_log_file(filename: str) -> IO[str]:
    """Open a line-buffered log file, once for all loggers that write to it."""
    return PathManager.open(filename, "a", buffering=1)


def _log_file_name(output: str, rank: int) -> str:
    name = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    return f"{name}.rank{rank}" if rank > 0 else name


def _use_color(color: bool) -> bool:
    return color and "NO_COLOR" not in os.environ and hasattr(sys.stdout, "isatty") and sys.stdout.isatty()


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detlib",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Make the logger `name` and its children write to the terminal and to a file.

    Repeated calls do not add handlers twice.

    Args:
        output: a file (ending in .txt or .log), or a directory for the file ``log.txt``; None for no file.
            A process of rank r > 0 writes to a file with ``.rank{r}`` appended.
        distributed_rank: rank of this process; only rank 0 writes to the terminal.
        color: use colors on a terminal (never in a file or pipe, nor if $NO_COLOR is set).
        name: name of the logger.
        abbrev_name: abbreviation of `name` to print; "" prints none. Default: `name`.
        enable_propagation: also pass messages to the root logger.
        configure_stdout: write to the terminal.

    Returns:
        The logger `name`.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    abbrev_name = name if abbrev_name is None else abbrev_name
    present = {getattr(handler, "detlib_key", None) for handler in logger.handlers}

    def add(key: str, stream: IO[str] | None, color: bool) -> None:
        handler = logging.StreamHandler(stream) if stream is not None else _StdoutHandler(logger)
        handler.detlib_key = key  # type: ignore[union-attr]  # an attribute of our own
        handler.setLevel(logging.DEBUG)
        handler.setFormatter(_Formatter(name, abbrev_name, color))
        logger.addHandler(handler)

    if configure_stdout and distributed_rank == 0 and "stdout" not in present:
        add("stdout", None, _use_color(color))
    if output is not None:
        filename = _log_file_name(output, distributed_rank)
        if filename not in present:
            PathManager.mkdirs(os.path.dirname(filename) or ".")
            add(filename, _open_log_file(filename), False)
    return logger


class _StdoutHandler(logging.StreamHandler):
    """A handler that writes to the current sys.stdout (notebooks and tests replace it), above a live line.

    A record may have a shorter text for the console in the attribute `console_message`, which is used if the
    logger also has a file.
    """

    def __init__(self, owner: logging.Logger) -> None:
        super().__init__(sys.stdout)
        self._owner = owner

    def emit(self, record: logging.LogRecord) -> None:
        # Progress that a live line shows (see CommonMetricPrinter) goes to the files only.
        short = getattr(record, "console_message", None)
        if short is not None and len(self._owner.handlers) > 1:
            record = logging.makeLogRecord(record.__dict__ | {"msg": short, "args": ()})
        if not (live_line.is_shown() and getattr(record, "is_progress", False)):
            with live_line.hidden():
                super().emit(record)

    @property
    def stream(self) -> IO[str]:
        return sys.stdout

    @stream.setter
    def stream(self, value: IO[str]) -> None:
        pass  # the base class sets the stream, which the property overrides


_THIS_FILE = os.path.normcase(__file__)
_counts: Counter = Counter()
_last_time: dict[Any, float] = {}


def _caller() -> tuple[str, tuple[str, int, str]]:
    """Return the module name of the nearest frame outside this file, and a key of the calling line."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if os.path.normcase(code.co_filename) != _THIS_FILE:
            module = frame.f_globals.get("__name__", "detlib")
            return ("detlib" if module == "__main__" else module), (
                code.co_filename,
                frame.f_lineno,
                code.co_name,
            )
        frame = frame.f_back
    raise AssertionError("every call has a caller")


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | tuple[str, ...] = "caller"
) -> None:
    """Log only the first `n` times.

    Args:
        lvl: a level of `logging`.
        msg: the message.
        n: how often the message may appear.
        name: name of the logger; default: the caller's module.
        key: what identifies a message: "caller" (the calling line), "message" (the text), or a tuple of both.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    if not keys or not set(keys) <= {"caller", "message"}:
        raise ValueError(f"key must be 'caller', 'message' or a tuple of both, got {key!r}.")
    module, line = _caller()
    counted = ((line if "caller" in keys else None), (msg if "message" in keys else None))
    _counts[counted] += 1
    if _counts[counted] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log the first and then every `n`-th call from a line; see `log_first_n` for the arguments."""
    module, line = _caller()
    counted = ("every", line)
    _counts[counted] += 1
    if n == 1 or _counts[counted] % n == 1:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log at most once in `n` seconds per calling line; see `log_first_n` for the arguments."""
    module, line = _caller()
    now = time.monotonic()
    if line not in _last_time or now - _last_time[line] >= n:
        logging.getLogger(name or module).log(lvl, msg)
        _last_time[line] = now


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """Return a Markdown table of one row, with the keys as header and numbers with 3 decimals."""
    from tabulate import tabulate

    keys, values = tuple(small_dict.keys()), tuple(small_dict.values())
    return tabulate(
        [values], headers=keys, tablefmt="pipe", floatfmt=".3f", stralign="center", numalign="center"
    )
