"""Metrics to Weights & Biases."""

from typing import Any

import numpy as np

from detlib.utils.writers.service import ServiceWriter, import_service

__all__ = ["WandbWriter"]


class WandbWriter(ServiceWriter):
    """Writes scalars and pictures to a run of Weights & Biases (``pip install 'detlib[wandb]'``).

    Project, name and the like come as arguments or from wandb's environment variables; ``WANDB_MODE=offline``
    writes to the output folder only.
    """

    name = "wandb"

    def __init__(self, output_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            output_dir: folder of wandb's files, unless ``dir`` is given.
            window_size: iterations of the median, for scalars with `smoothing_hint`.
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
        # wandb's own steps only grow, and a resumed training may go back.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run, run.id

    def _send(self, records: list[dict], pictures: list[tuple[str, np.ndarray, int]]) -> None:
        for record in records:
            self.run.log(record)
        for name, image, iteration in pictures:
            self.run.log({name: self._wandb.Image(image), "iteration": iteration})

    def _close_run(self) -> None:
        self.run.finish()
