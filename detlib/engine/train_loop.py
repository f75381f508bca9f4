"""The trainers and the hooks' base class; each lives in a file of its own."""

from detlib.engine.amp_trainer import AMPTrainer
from detlib.engine.simple_trainer import SimpleTrainer
from detlib.engine.trainer_base import HookBase, TrainerBase

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]
