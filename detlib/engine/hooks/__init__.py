"""The hooks that come with detlib."""

from detlib.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from detlib.engine.hooks.early_stop import EarlyStopping
from detlib.engine.hooks.evaluation import EvalHook, PreciseBN
from detlib.engine.hooks.general import CallbackHook, IterationTimer, LRScheduler, PeriodicWriter
from detlib.engine.hooks.interrupt import StopOnSignal
from detlib.engine.hooks.missed_evaluation import MissedEvaluation
from detlib.engine.hooks.pictures import TrainingPictures
from detlib.engine.hooks.profiling import AutogradProfiler, StepsProfiler, TorchMemoryStats, TorchProfiler
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
    "TrainingPictures",
]
