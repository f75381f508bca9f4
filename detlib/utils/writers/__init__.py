"""The writers, which put out what an `EventStorage` has collected."""

from detlib.utils.writers.base import EventWriter
from detlib.utils.writers.console import CommonMetricPrinter
from detlib.utils.writers.csv_writer import CSVWriter
from detlib.utils.writers.json_writer import JSONWriter
from detlib.utils.writers.mlflow_writer import MLflowWriter
from detlib.utils.writers.names import WRITERS, build_writers
from detlib.utils.writers.tensorboard_writer import TensorboardXWriter
from detlib.utils.writers.wandb_writer import WandbWriter

__all__ = [
    "WRITERS",
    "CSVWriter",
    "CommonMetricPrinter",
    "EventWriter",
    "JSONWriter",
    "MLflowWriter",
    "TensorboardXWriter",
    "WandbWriter",
    "build_writers",
]
