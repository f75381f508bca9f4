"""Hooks that save checkpoints."""

import logging
import os
from collections.abc import Callable

from detlib.checkpoint import Checkpointer
from detlib.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from detlib.checkpoint.formats import read_checkpoint
from detlib.checkpoint.sharded import is_sharded
from detlib.engine.divergence import find_non_finite_parameters
from detlib.engine.hooks.metrics import check_mode, explain_missing_metric, is_better
from detlib.engine.train_loop import HookBase, TrainerBase
from detlib.utils import comm

__all__ = ["BestCheckpointer", "PeriodicCheckpointer", "prepare_to_save"]

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """`detlib.checkpoint.PeriodicCheckpointer` as a hook.

    It refuses to save a model with infinite or NaN parameters, so that a training which diverged between
    two looks at the losses leaves good checkpoints behind.
    """

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        """Saves if it is time to.

        Raises:
            FloatingPointError: if parameters are not finite.
        """
        iteration = self.trainer.iter
        if not self.is_due(iteration):
            return
        _refuse_diverged(self.checkpointer, iteration)
        prepare_to_save(self.trainer)
        self.step(iteration)

    def after_train(self) -> None:
        """Saves the final checkpoint if it is missing yet, and waits for what is saved in the background.

        It is missing if the training was stopped early, or was cut off between its last periodic checkpoint
        and the final one and then resumed with nothing left to train.

        Raises:
            FloatingPointError: if parameters are not finite.
        """
        trainer = self.trainer
        last = trainer.iter - 1
        was_stopped = trainer.start_iter <= last < trainer.max_iter - 1
        had_nothing_to_do = 0 < trainer.start_iter == trainer.iter
        if trainer.is_finished and (was_stopped or (had_nothing_to_do and self._lacks_final())):
            _refuse_diverged(self.checkpointer, last)
            prepare_to_save(trainer)
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=last)
        self.checkpointer.wait()

    def _lacks_final(self) -> bool:
        lacks = not self.path_manager.exists(
            os.path.join(self.checkpointer.save_dir, f"{self.file_prefix}_final.pth")
        )
        # Where all processes have this hook, all take part in saving, or none: the first one decides.
        all_save = is_sharded(self.checkpointer.model) or getattr(self.trainer, "_all_save", False)
        return comm.all_gather(lacks)[0] if all_save else lacks


def prepare_to_save(trainer: TrainerBase) -> None:
    """Lets a trainer collect what the processes have for themselves, before a hook saves."""
    prepare = getattr(trainer, "prepare_to_save", None)
    if prepare is not None:
        prepare()


def _refuse_diverged(checkpointer: Checkpointer, iteration: int) -> None:
    bad = find_non_finite_parameters(checkpointer.model)
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        last = checkpointer.get_checkpoint_file() if checkpointer.save_dir else ""
        raise FloatingPointError(
            f"After iteration {iteration} the model has infinite or NaN parameters ({listed}), so no "
            f"checkpoint was saved. The last good checkpoint: {last or 'none'}"
        )


class BestCheckpointer(HookBase):
    """Saves the model whenever an evaluation gives a better metric than all before.

    It goes after the `EvalHook` whose results it reads. What was best is known again after a resume.

    Attributes:
        best_metric, best_iter: the best so far and its iteration; None before the first.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
        on_all_processes: bool = False,
    ) -> None:
        """
        Args:
            eval_period: the period of the `EvalHook`.
            checkpointer: what saves.
            val_metric: name of the metric in the storage, such as "bbox/AP50" or "val/total_loss".
            mode: "max" if more is better, "min" if less is.
            file_prefix: name of the file, without ".pth".
            on_all_processes: whether every process has this hook. The main process, which has the results,
                then decides for all.

        Raises:
            ValueError: for another `mode`.
        """
        check_mode(mode)
        self._period = eval_period
        self._val_metric = val_metric
        self._mode = mode
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._on_all_processes = on_all_processes
        self._judged: int | None = None  # iteration of the last evaluation that was looked at
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step is made in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._save_if_best(self._checkpointer.save)

    def after_train(self) -> None:
        if self.trainer.is_finished:
            # The final checkpoint stays the last one, if there is one.
            is_last = not self._checkpointer.has_checkpoint()
            self._save_if_best(self._checkpointer.save if is_last else self._checkpointer.write)
        # `PeriodicCheckpointer` has waited already, but for what was saved before this.
        self._checkpointer.wait()

    def _save_if_best(self, save: Callable) -> None:
        best = self._new_best()
        if self._on_all_processes:
            best = comm.all_gather(best)[0]
        if best is None:
            return
        self.best_metric, self.best_iter = best
        _refuse_diverged(self._checkpointer, self.best_iter)
        prepare_to_save(self.trainer)
        save(self._file_prefix, iteration=self.best_iter, best=self.state_dict())
        logger.info(
            "%s is %.5f, the best so far: saved %s", self._val_metric, self.best_metric, self._file_prefix
        )

    def _new_best(self) -> tuple[float, int] | None:
        """Metric and iteration of the last evaluation, if it is new and the best."""
        if self._on_all_processes and not comm.is_main_process():
            return None
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning(
                "%s. So the best model is not saved.",
                explain_missing_metric(self._val_metric, self.trainer.storage),
            )
            return None
        value, iteration = float(latest[0]), int(latest[1])
        if iteration == self._judged:  # a training that was stopped early does not evaluate again
            return None
        self._judged = iteration
        if is_better(value, self.best_metric, self._mode):
            return value, iteration
        logger.info(
            "%s is %.5f; the best stays %s at iteration %s",
            self._val_metric,
            value,
            self.best_metric,
            self.best_iter,
        )
        return None

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter, "metric": self._val_metric}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the better of the state and of the saved best file.

        The file may know of a better one: checkpoints are saved before the evaluation of the same step.
        """
        states = [state_dict]
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if os.path.isfile(path):
            states.append(read_checkpoint(path).get("best", {}))
        for state in states:
            value = state.get("best_metric")
            if state.get("metric") == self._val_metric and value is not None:
                if is_better(value, self.best_metric, self._mode):
                    self.best_metric, self.best_iter = value, state["best_iter"]
