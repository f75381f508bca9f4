"""Metrics to MLflow."""

import os
import re
import time
from typing import Any

import numpy as np

from detlib.utils.writers.service import ServiceWriter, import_service

__all__ = ["MLflowWriter"]


class MLflowWriter(ServiceWriter):
    """Writes scalars and pictures to a run of MLflow (``pip install 'detlib[mlflow]'``)."""

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
            window_size: iterations of the median, for scalars with `smoothing_hint`.
            tracking_uri: where MLflow keeps its runs; "" for $MLFLOW_TRACKING_URI, or else the folder
                ``mlruns`` in `output_dir`.
            experiment: name of the experiment, which is made if need be; "" for $MLFLOW_EXPERIMENT_NAME, or
                else "detlib".
            run_name: name of the run, None for that of the output folder.

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
            # MLflow has frozen its file store, which needs no database and no server.
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

    def _send(self, records: list[dict], pictures: list[tuple[str, np.ndarray, int]]) -> None:
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
        for name, image, iteration in pictures:
            self._client.log_image(run_id, image, artifact_file=f"{_legal(name)}_{iteration:07d}.png")

    def _close_run(self) -> None:
        self._client.set_terminated(self.run.info.run_id)


def _legal(name: str) -> str:
    """MLflow's names have letters, digits and a few signs only."""
    return re.sub(r"[^\w\-. :/]", "_", name)
