"""One line at the bottom of a terminal that is rewritten in place, while log lines go on above it."""

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
    """The line. There is one at a time: showing another takes its place."""

    def __init__(self) -> None:
        self._text = ""

    @staticmethod
    def is_possible() -> bool:
        """Whether sys.stdout is a terminal that can erase a line."""
        is_terminal = getattr(sys.stdout, "isatty", lambda: False)()
        return bool(is_terminal) and os.environ.get("TERM", "") != "dumb"

    def show(self, text: str) -> None:
        """Writes `text` in place of what the line says, cut to the width of the terminal."""
        with _lock:
            self._text = text
            _shown[:] = [self]
            self._draw()

    def close(self) -> None:
        """Erases the line."""
        with _lock:
            if _shown == [self]:
                _shown.clear()
                _put(_ERASE)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # the last column would wrap
        # Back at its start the cursor lets a stray print overwrite the line instead of going on behind it.
        _put(f"{_ERASE}{self._text[:width]}\r")


def _put(text: str) -> None:
    # A terminal that was closed is no reason to end a training.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def is_shown() -> bool:
    """Whether there is a line at the moment."""
    return bool(_shown)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Erases the line inside the ``with``, in which other output is written, and draws it again after it."""
    with _lock:
        line = _shown[0] if _shown else None
        if line is not None:
            _put(_ERASE)
        try:
            yield
        finally:
            if line is not None:
                line._draw()
