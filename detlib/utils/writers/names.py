"""The writers by the names that configs have for them."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest
from detlib.utils.writers.base import EventWriter
from detlib.utils.writers.console import CommonMetricPrinter
from detlib.utils.writers.csv_writer import CSVWriter
from detlib.utils.writers.json_writer import JSONWriter
from detlib.utils.writers.mlflow_writer import MLflowWriter
from detlib.utils.writers.tensorboard_writer import TensorboardXWriter
from detlib.utils.writers.wandb_writer import WandbWriter

__all__ = ["WRITERS", "build_writers", "check_writers"]

# In the order in which they are called: TensorBoard's is the last of those that take pictures, as it lets the
# storage forget them.
WRITERS: dict[str, Callable[..., EventWriter]] = {
    "console": lambda folder, max_iter, **kwargs: CommonMetricPrinter(max_iter, **kwargs),
    "json": lambda folder, max_iter, **kwargs: JSONWriter(os.path.join(folder, "metrics.json"), **kwargs),
    "csv": lambda folder, max_iter, **kwargs: CSVWriter(os.path.join(folder, "metrics.csv"), **kwargs),
    "wandb": lambda folder, max_iter, **kwargs: WandbWriter(folder, **kwargs),
    "mlflow": lambda folder, max_iter, **kwargs: MLflowWriter(folder, **kwargs),
    "tensorboard": lambda folder, max_iter, **kwargs: TensorboardXWriter(folder, **kwargs),
}


def check_writers(names: Sequence[str]) -> None:
    """Makes sure that there are writers of these names.

    Raises:
        TypeError: if a single name came instead of several.
        ValueError: if a name is unknown.
    """
    if isinstance(names, str):
        raise TypeError(f"TRAIN.WRITERS (train.writers) must be a list of names, got {names!r}")
    for name in names:
        if name not in WRITERS:
            raise ValueError(
                f"There is no writer {name!r} (TRAIN.WRITERS, train.writers); legal are "
                f"{', '.join(WRITERS)}.{suggest(str(name), WRITERS)}"
            )


def build_writers(
    names: Sequence[str],
    output_dir: str,
    max_iter: int | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[EventWriter]:
    """Makes writers by name.

    Args:
        names: some of `WRITERS`.
        output_dir: folder of their files.
        max_iter: number of iterations in all, for the time left.
        params: further arguments of a writer's class, by its name.

    Raises:
        ValueError: if a name is unknown.
        ImportError: if a writer's package is not installed, with the command that installs it.
    """
    check_writers(names)
    PathManager.mkdirs(output_dir)
    params = params or {}
    return [WRITERS[name](output_dir, max_iter, **params.get(name, {})) for name in WRITERS if name in names]
