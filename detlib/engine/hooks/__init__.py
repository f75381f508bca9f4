"""Hooks of the training loop."""

from detlib.engine.hooks.evaluation import BestCheckpointer, EarlyStopping, MissedEvaluation, PreciseBN
from detlib.engine.hooks.general import (
    CallbackHook,
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
    StopOnSignal,
)
from detlib.engine.hooks.profiling import AutogradProfiler, StepsProfiler, TorchMemoryStats, TorchProfiler
from detlib.engine.hooks.visualization import TrainingImages
from detlib.engine.train_loop import HookBase

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EarlyStopping",
    "EvalHook",
    "HookBase",
    "IterationTimer",
    "LRScheduler",
    "MissedEvaluation",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "StepsProfiler",
    "StopOnSignal",
    "TorchMemoryStats",
    "TorchProfiler",
    "TrainingImages",
]
