"""A status line at the bottom of the terminal that is rewritten in-place, below the log lines."""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator

__all__ = ["LiveLine", "hidden", "is_shown"]

_ERASE = "\r\033[K"
_lock = threading.RLock()
_shown: list["LiveLine"] = []


class LiveLine:
    """The status line. There is only one at a time: showing another one replaces it."""

    def __init__(self) -> None:
        self._text = ""

    @staticmethod
    def is_possible() -> bool:
        """Return whether sys.stdout is a terminal that can erase a line."""
        is_terminal = getattr(sys.stdout, "isatty", lambda: False)()
        return bool(is_terminal) and os.environ.get("TERM", "") != "dumb"

    def show(self, text: str) -> None:
        """Replace the text of the line by `text`, truncated to the width of the terminal."""
        with _lock:
            self._text = text
            _shown[:] = [self]
            self._draw()

    def close(self) -> None:
        """Erase the line."""
        with _lock:
            if _shown == [self]:
                _shown.clear()
                _put(_ERASE)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # the last column would wrap the line
        # With the cursor at its start, a stray print overwrites the line instead of appending to it.
        _put(f"{_ERASE}{self._text[:width]}\r")


def _put(text: str) -> None:
    # A closed terminal must not end the training run.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def is_shown() -> bool:
    """Return whether a line is shown."""
    return bool(_shown)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Context manager that erases the line, for other output to be written, and redraws it on exit."""
    with _lock:
        line = _shown[0] if _shown else None
        if line is not None:
            _put(_ERASE)
        try:
            yield
        finally:
            if line is not None:
                line._draw()
