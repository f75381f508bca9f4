"""The hook that saves and stops when the training is asked to."""

import contextlib
import logging
import os
import signal

from detlib.checkpoint import Checkpointer
from detlib.engine.distributed.interrupt import StopTraining, listen_for_stop, stop_requested
from detlib.engine.hooks.checkpoint import prepare_to_save
from detlib.engine.train_loop import HookBase
from detlib.utils import comm

__all__ = ["StopOnSignal"]

logger = logging.getLogger(__name__)


class StopOnSignal(HookBase):
    """On SIGTERM (Slurm, Kubernetes, spot machines) or Ctrl-C, saves a checkpoint after the step and stops.

    One process that gets the signal is enough: all stop after the same step. It goes behind all hooks with
    a state, so that the checkpoint has what they did in this step.
    """

    def __init__(self, checkpointer: Checkpointer, period: int = 1):
        """
        Args:
            checkpointer: what saves.
            period: steps between two questions among the processes whether one was asked to stop.

        Raises:
            ValueError: if `period` is below 1.
        """
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self._checkpointer = checkpointer
        self._period = period
        self._listening = contextlib.ExitStack()

    def before_train(self) -> None:
        self._listening.enter_context(listen_for_stop())

    def after_step(self) -> None:
        """Saves and stops if a process was asked to.

        Raises:
            StopTraining: in all processes.
        """
        iteration = self.trainer.iter
        if (iteration + 1) % self._period != 0:
            return
        signum = stop_requested()
        if not signum:
            if self._is_last_step():
                # What is left needs no step: a signal ends it as it ends any program.
                self._listening.close()
            return
        name = f"model_{iteration:07d}"
        # The first process knows: what it saves in the background, others may not see yet. All save, or none.
        if not comm.all_gather(self._is_saved(iteration, name))[0]:
            prepare_to_save(self.trainer)
            self._checkpointer.save(name, iteration=iteration)
        self._checkpointer.wait()
        logger.warning(
            "Stopped by %s after iteration %d, which is saved in %s; --resume goes on from there",
            signal.Signals(signum).name,
            iteration,
            self._checkpointer.get_checkpoint_file(),
        )
        raise StopTraining(signum)

    def _is_saved(self, iteration: int, name: str) -> bool:
        """Whether the step's checkpoint was due anyway, and is there."""
        if not self._checkpointer.has_checkpoint():
            return False
        last = os.path.basename(self._checkpointer.get_checkpoint_file())
        return last == f"{name}.pth" or (last == "model_final.pth" and self._is_last_step())

    def _is_last_step(self) -> bool:
        return self.trainer.iter + 1 >= self.trainer.max_iter or self.trainer.stopped_reason is not None

    def after_train(self) -> None:
        self._listening.close()
