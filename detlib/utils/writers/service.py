"""What the writers that send metrics to a service share."""

import importlib
import logging
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch

from detlib.utils._event_storage import EventStorage, get_event_storage
from detlib.utils.file_io import PathManager
from detlib.utils.writers.base import EventWriter, NewScalars

__all__ = ["ServiceWriter", "import_service", "picture_array"]

logger = logging.getLogger("detlib.utils.events")

_MAX_WARNINGS = 5


def import_service(name: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"The writer '{name}' needs a package that cannot be imported ({error}): "
            f"pip install 'detlib[{name}]', or leave it out of TRAIN.WRITERS (train.writers)"
        ) from error


def picture_array(image: Any) -> np.ndarray:
    """A picture of the storage, (C, H, W) uint8 or float in 0..1, as (H, W, C) uint8."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


class ServiceWriter(EventWriter):
    """A writer to a service, which may fail without ending the training: it warns, and goes on.

    Only the start must work. A training that goes on writes to the run of the training before, whose id is
    kept in ``OUTPUT_DIR/NAME_run_id.txt``.

    Attributes:
        output_dir: the output folder.
        run: the service's run, None before `start`.
    """

    name: str

    def __init__(self, output_dir: str, window_size: int) -> None:
        self.output_dir = output_dir
        self.run: Any = None
        self._new = NewScalars(window_size)
        self._pictures_until = -1
        self._failures = 0

    def start(self) -> None:
        if self.run is not None:
            return
        path = os.path.join(self.output_dir, f"{self.name}_run_id.txt")
        run_id = None
        if get_event_storage().start_iter > 0 and PathManager.isfile(path):
            with PathManager.open(path) as f:
                run_id = f.read().strip() or None
        self.run, run_id = self._open_run(run_id)
        PathManager.mkdirs(self.output_dir)
        with PathManager.open(path, "w") as f:
            f.write(f"{run_id}\n")

    def write(self) -> None:
        self.start()
        storage = get_event_storage()
        self._try(self._send, self._new.take(storage), self._new_pictures(storage))

    def close(self) -> None:
        if self.run is not None:
            self._try(self._close_run)
            self.run = None

    def _try(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:  # whatever a client may raise: the network, the server, a quota
            self._failures += 1
            if self._failures <= _MAX_WARNINGS:
                last = "; that is said no more" if self._failures == _MAX_WARNINGS else ""
                logger.warning("Metrics were not written to %s: %r%s", self.name, error, last)

    def _new_pictures(self, storage: EventStorage) -> list[tuple[str, np.ndarray, int]]:
        new = [entry for entry in storage._images if entry[2] > self._pictures_until]
        self._pictures_until = max([self._pictures_until, *(iteration for _, _, iteration in new)])
        return [(name, picture_array(image), iteration) for name, image, iteration in new]

    def _open_run(self, run_id: str | None) -> tuple[Any, str]:
        """Starts a run, or goes on with the one of an id. Returns it and its id."""
        raise NotImplementedError

    def _send(self, records: list[dict], pictures: list[tuple[str, np.ndarray, int]]) -> None:
        """Sends records of "iteration" and scalars, and pictures (name, (H, W, C) uint8, iteration)."""
        raise NotImplementedError

    def _close_run(self) -> None:
        """Tells the service that the run has ended."""
        raise NotImplementedError
