"""Checkpoints: saving and loading of models and training states."""

from detlib.checkpoint.catalog import ModelCatalog
from detlib.checkpoint.checkpointer import Checkpointer, IncompatibleKeys, PeriodicCheckpointer
from detlib.checkpoint.detection_checkpoint import DetectionCheckpointer

__all__ = [
    "Checkpointer",
    "DetectionCheckpointer",
    "IncompatibleKeys",
    "ModelCatalog",
    "PeriodicCheckpointer",
]
