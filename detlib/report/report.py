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
    """Return the message of an error, or its type if it has none."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{message}" if f"{message}" else type(error).__name__


class Report:
    """The folder and the page that the sections of a report are written to.

    Attributes:
        folder: ``OUTPUT_DIR/report``.
        page: the HTML page.
    """

    def __init__(self, output_dir: str) -> None:
        """Create the folder and an empty page.

        Args:
            output_dir: the output folder of the run.
        """
        self.output_dir = output_dir
        self.folder = os.path.join(output_dir, "report")
        PathManager.mkdirs(self.folder)
        name = os.path.basename(os.path.abspath(output_dir))
        self.page = Page(f"Training report: {name}")

    def save(self, name: str, content: bytes) -> None:
        """Write a file of the report. Its name may include a subfolder."""
        path = os.path.join(self.folder, name)
        PathManager.mkdirs(os.path.dirname(path))
        write_bytes_atomically(path, lambda file: file.write(content))

    def figure(self, name: str, image: bytes, alt: str, caption: str) -> None:
        """Write a figure as a file and add it to the page."""
        self.save(name, image)
        self.page.figure(image, alt, caption)

    def attempt(self, what: str, make: Callable[[], Any]) -> bool:
        """Call `make` to add a part of the report. If it fails, note the reason in the page and the log.

        Args:
            what: the name of the part for the message.
            make: adds the part.

        Returns:
            Whether `make` succeeded.
        """
        try:
            make()
            return True
        except Exception as error:  # a failed part must not lose the others
            expected = isinstance(error, (KeyError, OSError, ValueError))
            reason = reason_of(error) if expected else f"{type(error).__name__}: {reason_of(error)}"
            logger.warning("Report: skipped the %s: %s", what, reason, exc_info=None if expected else error)
            self.page.note(f"Skipped the {what}: {reason}")
            return False
