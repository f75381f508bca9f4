"""The usual trainer, predictor and set-up; each lives in a file of its own."""

from detlib.engine.default_trainer import DefaultTrainer
from detlib.engine.distributed.ddp import create_ddp_model
from detlib.engine.predictor import DefaultPredictor
from detlib.engine.setup import default_argument_parser, default_setup, default_writers

__all__ = [
    "DefaultPredictor",
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]
