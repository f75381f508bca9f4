"""The registry of writers, and the writers for CSV files, Weights & Biases and MLflow."""

import contextlib
import csv
import importlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    NewScalars,
    TensorboardXWriter,
    get_event_storage,
)
from detlib.utils.file_io import PathManager
from detlib.utils.metrics_files import carry_over, set_aside
from detlib.utils.suggest import suggest

__all__ = ["WRITERS", "CSVWriter", "MLflowWriter", "WandbWriter", "build_writers", "check_writers"]

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 5


class CSVWriter(EventWriter):
    """A writer of scalars to a CSV file: a header, then one row per iteration.

    The first column is "iteration". A scalar that appears later, such as a result of the first evaluation,
    gets a new column at the end, and the file is rewritten. For files of earlier runs, see `JSONWriter`.
    """

    def __init__(self, csv_file: str, window_size: int = 20) -> None:
        """
        Args:
            csv_file: path of the file; its directory is created.
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
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
            _, rows = _read_csv(self._path)
            self._columns += unknown
            _write_csv(self._path, self._columns, [*rows, *records])
            return
        with PathManager.open(self._path, "a", newline="") as f:
            csv.DictWriter(f, self._columns, lineterminator="\n").writerows(records)
            f.flush()
            with contextlib.suppress(AttributeError, OSError):  # remote files have no file descriptor
                os.fsync(f.fileno())

    def _take_over(self, records: list[dict]) -> tuple[list[str], list[dict]]:
        """Prepare the file of an earlier run for the rows of this run.

        Returns:
            The columns, and the records that no existing row has absorbed.
        """
        start_iter = get_event_storage().start_iter
        if start_iter == 0:
            set_aside(self._path, lambda path: bool(_read_csv(path)[1]))
            columns: list[str] = []
            rows: list[dict] = []
        else:
            columns, rows = _read_csv(self._path)
        coming = {record["iteration"]: record for record in records}
        carried = [carry_over(row, coming, start_iter) for row in rows]
        kept = [row for row in carried if row is not None]
        columns = columns or ["iteration"]
        columns += sorted({name for row in kept for name in row} - set(columns))
        # Always rewritten, because a killed run may have left half a row.
        _write_csv(self._path, columns, kept)
        return columns, list(coming.values())


def _read_csv(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and the complete rows of a file; both are empty if it does not exist."""
    if not PathManager.isfile(path):
        return [], []
    with PathManager.open(path, newline="") as f:
        reader = csv.DictReader(f)
        rows = [row for row in reader if _is_complete(row)]
        return list(reader.fieldnames or []), rows


def _is_complete(row: dict) -> bool:
    # A truncated row lacks columns, or has extra ones if another row was appended to it.
    return None not in row and None not in row.values() and (row.get("iteration") or "").isdigit()


def _write_csv(path: str, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomically(path, lambda f: f.write(text.getvalue().encode()))


def import_service(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: if it cannot be imported; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"The writer '{name}' needs a package that cannot be imported ({error}): "
            f"pip install 'detlib[{name}]', or remove it from TRAIN.WRITERS (train.writers)"
        ) from error


def _image_array(image: Any) -> np.ndarray:
    """Convert an image of the storage, (C, H, W) uint8 or float in [0, 1], to (H, W, C) uint8."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


class ServiceWriter(EventWriter):
    """Base class of writers to a tracking service, whose failures are logged and do not end training.

    Only `start` must succeed. A resumed run writes to the same run of the service, whose id is kept in
    ``OUTPUT_DIR/NAME_run_id.txt``.

    Attributes:
        output_dir: the output folder.
        run: the service's run, None before `start`.
    """

    name: str

    def __init__(self, output_dir: str, window_size: int) -> None:
        self.output_dir = output_dir
        self.run: Any = None
        self._new = NewScalars(window_size)
        self._images_until = -1
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
        self._try(self._send, self._new.take(storage), self._new_images(storage))

    def close(self) -> None:
        if self.run is not None:
            self._try(self._close_run)
            self.run = None

    def _try(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:  # a client may raise anything: network, server, quota
            self._failures += 1
            if self._failures <= _MAX_WARNINGS:
                last = "; further warnings are suppressed" if self._failures == _MAX_WARNINGS else ""
                logger.warning("Could not write metrics to %s: %r%s", self.name, error, last)

    def _new_images(self, storage: EventStorage) -> list[tuple[str, np.ndarray, int]]:
        new = [entry for entry in storage._images if entry[2] > self._images_until]
        self._images_until = max([self._images_until, *(iteration for _, _, iteration in new)])
        return [(name, _image_array(image), iteration) for name, image, iteration in new]

    def _open_run(self, run_id: str | None) -> tuple[Any, str]:
        """Start a run, or continue the run of an id. Return the run and its id."""
        raise NotImplementedError

    def _send(self, records: list[dict], images: list[tuple[str, np.ndarray, int]]) -> None:
        """Send records of "iteration" and scalars, and images (name, (H, W, C) uint8 array, iteration)."""
        raise NotImplementedError

    def _close_run(self) -> None:
        """Tell the service that the run has ended."""
        raise NotImplementedError


class WandbWriter(ServiceWriter):
    """A writer of scalars and images to Weights & Biases (``pip install 'detlib[wandb]'``).

    Project, name and the like come from arguments or from wandb's environment variables;
    ``WANDB_MODE=offline`` writes to the output folder only.
    """

    name = "wandb"

    def __init__(self, output_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            output_dir: folder of wandb's files, unless ``dir`` is passed.
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
            **kwargs: further arguments of ``wandb.init``: project, name, config and so on.

        Raises:
            ImportError: if wandb is not installed.
        """
        super().__init__(output_dir, window_size)
        self._wandb = import_service("wandb")
        self._kwargs = {"dir": output_dir, **kwargs}

    def _open_run(self, run_id: str | None) -> tuple[Any, str]:
        kwargs = self._kwargs if run_id is None else {"id": run_id, "resume": "allow", **self._kwargs}
        run = self._wandb.init(**kwargs)
        # wandb's own steps must increase, but a resumed run may go back.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run, run.id

    def _send(self, records: list[dict], images: list[tuple[str, np.ndarray, int]]) -> None:
        for record in records:
            self.run.log(record)
        for name, image, iteration in images:
            self.run.log({name: self._wandb.Image(image), "iteration": iteration})

    def _close_run(self) -> None:
        self.run.finish()


class MLflowWriter(ServiceWriter):
    """A writer of scalars and images to MLflow (``pip install 'detlib[mlflow]'``)."""

    name = "mlflow"

    def __init__(
        self,
        output_dir: str,
        window_size: int = 20,
        tracking_uri: str = "",
        experiment: str = "",
        run_name: str | None = None,
    ) -> None:
        """
        Args:
            output_dir: the output folder.
            window_size: number of iterations of the median, for scalars with `smoothing_hint`.
            tracking_uri: where MLflow stores its runs; "" for $MLFLOW_TRACKING_URI, or else the folder
                ``mlruns`` in `output_dir`.
            experiment: name of the experiment, which is created if necessary; "" for
                $MLFLOW_EXPERIMENT_NAME, or else "detlib".
            run_name: name of the run; None for the name of the output folder.

        Raises:
            ImportError: if mlflow is not installed.
        """
        super().__init__(output_dir, window_size)
        self._mlflow = import_service("mlflow")
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "") or "detlib"
        self._run_name = run_name or os.path.basename(os.path.abspath(output_dir))

    def _open_run(self, run_id: str | None) -> tuple[Any, str]:
        if not self._uri:
            # MLflow deprecated its file store, which needs neither a database nor a server.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self._uri = "file://" + os.path.abspath(os.path.join(self.output_dir, "mlruns"))
        client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        self._client = client
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
            return client.get_run(run_id), run_id
        experiment = client.get_experiment_by_name(self._experiment)
        experiment_id = (
            experiment.experiment_id if experiment is not None else client.create_experiment(self._experiment)
        )
        run = client.create_run(experiment_id, run_name=self._run_name)
        return run, run.info.run_id

    def _send(self, records: list[dict], images: list[tuple[str, np.ndarray, int]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(_legal(name), value, now, record["iteration"])
            for record in records
            for name, value in record.items()
            if name != "iteration"
        ]
        run_id = self.run.info.run_id
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)
        for name, image, iteration in images:
            self._client.log_image(run_id, image, artifact_file=f"{_legal(name)}_{iteration:07d}.png")

    def _close_run(self) -> None:
        self._client.set_terminated(self.run.info.run_id)


def _legal(name: str) -> str:
    """Replace the characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)


# In the order of their calls: TensorBoard's is the last of those that write images, because it clears them.
WRITERS: dict[str, Callable[..., EventWriter]] = {
    "console": lambda folder, max_iter, **kwargs: CommonMetricPrinter(max_iter, **kwargs),
    "json": lambda folder, max_iter, **kwargs: JSONWriter(os.path.join(folder, "metrics.json"), **kwargs),
    "csv": lambda folder, max_iter, **kwargs: CSVWriter(os.path.join(folder, "metrics.csv"), **kwargs),
    "wandb": lambda folder, max_iter, **kwargs: WandbWriter(folder, **kwargs),
    "mlflow": lambda folder, max_iter, **kwargs: MLflowWriter(folder, **kwargs),
    "tensorboard": lambda folder, max_iter, **kwargs: TensorboardXWriter(folder, **kwargs),
}


def check_writers(names: Sequence[str]) -> None:
    """Check that all names are known writers.

    Raises:
        TypeError: if `names` is a single name instead of a list.
        ValueError: if a name is unknown.
    """
    if isinstance(names, str):
        raise TypeError(f"TRAIN.WRITERS (train.writers) must be a list of names, got {names!r}")
    for name in names:
        if name not in WRITERS:
            raise ValueError(
                f"Unknown writer {name!r} (TRAIN.WRITERS, train.writers); choose from "
                f"{', '.join(WRITERS)}.{suggest(str(name), WRITERS)}"
            )


def build_writers(
    names: Sequence[str],
    output_dir: str,
    max_iter: int | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[EventWriter]:
    """Build writers by name.

    Args:
        names: names from `WRITERS`.
        output_dir: folder of their files.
        max_iter: total number of iterations, for the remaining time.
        params: further arguments of a writer's class, by name of the writer.

    Raises:
        ValueError: if a name is unknown.
        ImportError: if a writer's package is not installed; the message has the command that installs it.
    """
    check_writers(names)
    PathManager.mkdirs(output_dir)
    params = params or {}
    return [WRITERS[name](output_dir, max_iter, **params.get(name, {})) for name in WRITERS if name in names]
