"""The folder and the page that the sections of a report write to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from detlib.report.page import Page
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager

__all__ = ["Report", "reason_of"]

logger = logging.getLogger(__name__)


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{message}" if f"{message}" else type(error).__name__


class Report:
    """The folder and the page that the parts of a report go into.

    Args:
        output_dir: the run's output folder.

    Attributes:
        folder: ``OUTPUT_DIR/report``.
        page: the page.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir
        self.folder = os.path.join(output_dir, "report")
        PathManager.mkdirs(self.folder)
        name = os.path.basename(os.path.abspath(output_dir))
        self.page = Page(f"Training report: {name}")

    def save(self, name: str, content: bytes) -> None:
        """Write a file of the report; its name may have a folder."""
        path = os.path.join(self.folder, name)
        PathManager.mkdirs(os.path.dirname(path))
        write_bytes_atomically(path, lambda file: file.write(content))

    def figure(self, name: str, picture: bytes, alt: str, caption: str) -> None:
        """Write a figure as a file and puts it into the page."""
        self.save(name, picture)
        self.page.figure(picture, alt, caption)

    def attempt(self, what: str, make: Callable[[], Any]) -> bool:
        """Make a part; if that fails, page and log say why, and the others are made all the same.

        Returns:
            Whether it was made.
        """
        try:
            make()
            return True
        except Exception as error:  # whatever it is, the rest of the report is worth having
            expected = isinstance(error, (KeyError, OSError, ValueError))
            reason = reason_of(error) if expected else f"{type(error).__name__}: {reason_of(error)}"
            logger.warning("Report: no %s: %s", what, reason, exc_info=None if expected else error)
            self.page.note(f"No {what}: {reason}")
            return False
