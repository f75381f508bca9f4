"""Training and prediction: the training loop, its hooks, and the default trainers and predictor."""

from detlib.engine import hooks
from detlib.engine.base_trainer import ConfigTrainer
from detlib.engine.defaults import (
    DefaultPredictor,
    DefaultTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
)
from detlib.engine.distributed.failures import ProcessFailedError
from detlib.engine.distributed.interrupt import StopTraining
from detlib.engine.launch import DEFAULT_TIMEOUT, launch
from detlib.engine.lazy_trainer import LazyTrainer
from detlib.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

__all__ = [
    "DEFAULT_TIMEOUT",
    "AMPTrainer",
    "DefaultPredictor",
    "DefaultTrainer",
    "HookBase",
    "LazyTrainer",
    "ConfigTrainer",
    "ProcessFailedError",
    "SimpleTrainer",
    "StopTraining",
    "TrainerBase",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "hooks",
    "launch",
]
