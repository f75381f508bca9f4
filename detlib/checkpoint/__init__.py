"""Checkpoints: saving and loading of models and training states."""

from detlib.checkpoint.catalog import ModelCatalog
from detlib.checkpoint.checkpointer import Checkpointer, IncompatibleKeys, PeriodicCheckpointer
from detlib.checkpoint.detection_checkpoint import DetectionCheckpointer
from detlib.checkpoint.formats import CheckpointError

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DetectionCheckpointer",
    "IncompatibleKeys",
    "ModelCatalog",
    "PeriodicCheckpointer",
]
