"""Hooks around evaluations: BatchNorm statistics, the best checkpoint, early stopping, missed evaluations."""

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from detlib.checkpoint import Checkpointer
from detlib.checkpoint.formats import read_checkpoint
from detlib.engine.ema import WeightAverage
from detlib.engine.hooks.general import prepare_to_save, refuse_diverged
from detlib.engine.train_loop import HookBase
from detlib.layers.fvcore_nn import get_bn_modules, update_bn_stats
from detlib.utils import comm
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.events import EventStorage
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import near_names

__all__ = ["BestCheckpointer", "EarlyStopping", "MissedEvaluation", "PreciseBN"]

logger = logging.getLogger(__name__)


class PreciseBN(HookBase):
    """A hook that recomputes the statistics of BatchNorm layers over many batches before each evaluation.

    The moving averages of training mix statistics of older weights. See "Rethinking 'Batch' in BatchNorm"
    (https://arxiv.org/abs/2105.07576). The hook goes before the `EvalHook`.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        data_loader: Iterable,
        num_iter: int,
        average: WeightAverage | None = None,
    ):
        """
        Args:
            period: number of steps between two computations; 0 computes them after the last step only.
            model: the model, whose BatchNorm layers in training mode are updated. Without any, the hook
                has no effect.
            data_loader: iterable of batches.
            num_iter: number of batches.
            average: the weight average, if that is evaluated; its statistics are computed over the same
                number of batches.
        """
        self._average = average
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN has no effect: the model has no BatchNorm layer in training mode")
        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._data_iter: Any = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_final = done == self.trainer.max_iter
        if is_final or (self._period > 0 and done % self._period == 0):
            self.update_stats()

    def update_stats(self) -> None:
        """Compute the statistics of the model and, if there is one, of its weight average."""
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        self._compute()
        if self._average is not None:
            with self._average.applied():
                self._compute()

    def _compute(self) -> None:
        logger.info("Computing precise BatchNorm statistics over %d batches", self._num_iter)
        layers = get_bn_modules(self._model)
        originals = [(layer.running_mean, layer.running_var) for layer in layers]
        # A separate storage: these batches are not training steps.
        with EventStorage():
            update_bn_stats(self._model, itertools.islice(self._data_iter, self._num_iter), self._num_iter)
        for layer, (mean, var) in zip(layers, originals):
            # fvcore assigns new tensors, but the weight average refers to the original ones.
            layer.running_mean = mean.copy_(layer.running_mean)
            layer.running_var = var.copy_(layer.running_var)

    def state_dict(self) -> dict:
        """Return the position in the data, because the statistics depend on the batches."""
        if self._disabled or not hasattr(self._data_loader, "state_dict"):
            return {}
        return {"data_loader": self._data_loader.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        if not self._disabled and hasattr(self._data_loader, "load_state_dict"):
            self._data_loader.load_state_dict(state_dict["data_loader"])


class BestCheckpointer(HookBase):
    """A hook that saves the model whenever an evaluation gives a better metric than all earlier ones.

    Register it after the `EvalHook` whose results it reads. A resumed run restores the best value.

    Attributes:
        best_metric, best_iter: the best value so far and its iteration; None before the first.
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
            checkpointer: the checkpointer that saves the model.
            val_metric: name of the metric in the storage, such as "bbox/AP50" or "val/total_loss".
            mode: "max" if higher is better, "min" if lower is better.
            file_prefix: name of the file, without ".pth".
            on_all_processes: whether every process has this hook. The main process, which has the results,
                then decides for all.

        Raises:
            ValueError: if `mode` is neither "max" nor "min".
        """
        _check_mode(mode)
        self._period = eval_period
        self._val_metric = val_metric
        self._mode = mode
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._on_all_processes = on_all_processes
        self._compared: int | None = None  # iteration of the last evaluation that was compared
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step runs in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._save_if_best(self._checkpointer.save)

    def after_train(self) -> None:
        if self.trainer.is_finished:
            # "last_checkpoint" must keep the name of the final checkpoint, if there is one.
            is_last = not self._checkpointer.has_checkpoint()
            self._save_if_best(self._checkpointer.save if is_last else self._checkpointer.write)
        # `PeriodicCheckpointer` waits only for checkpoints saved before this one.
        self._checkpointer.wait()

    def _save_if_best(self, save: Callable) -> None:
        best = self._new_best()
        if self._on_all_processes:
            best = comm.all_gather(best)[0]
        if best is None:
            return
        self.best_metric, self.best_iter = best
        refuse_diverged(self._checkpointer, self.best_iter)
        prepare_to_save(self.trainer)
        save(self._file_prefix, iteration=self.best_iter, best=self.state_dict())
        logger.info(
            "%s is %.5f, the best so far; saved %s", self._val_metric, self.best_metric, self._file_prefix
        )

    def _new_best(self) -> tuple[float, int] | None:
        """Return the metric and the iteration of the last evaluation if it is new and the best, else None."""
        if self._on_all_processes and not comm.is_main_process():
            return None
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning(
                "%s. The best model is not saved.",
                _explain_missing_metric(self._val_metric, self.trainer.storage),
            )
            return None
        value, iteration = float(latest[0]), int(latest[1])
        if iteration == self._compared:  # a run that was stopped early does not evaluate again
            return None
        self._compared = iteration
        if _is_better(value, self.best_metric, self._mode):
            return value, iteration
        logger.info(
            "%s is %.5f; the best is still %s at iteration %s",
            self._val_metric,
            value,
            self.best_metric,
            self.best_iter,
        )
        return None

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter, "metric": self._val_metric}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the best value from the state or from the saved best model, whichever is better.

        The file may have the better one: checkpoints are saved before the evaluation of the same step.
        """
        states = [state_dict]
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if os.path.isfile(path):
            states.append(read_checkpoint(path).get("best", {}))
        for state in states:
            value = state.get("best_metric")
            if state.get("metric") == self._val_metric and value is not None:
                if _is_better(value, self.best_metric, self._mode):
                    self.best_metric, self.best_iter = value, state["best_iter"]


class EarlyStopping(HookBase):
    """A hook that stops training after `patience` evaluations without a better metric.

    It calls `TrainerBase.stop`. Register it after the `EvalHook` whose results it reads, on every process;
    the main process, which has the results, decides for all.

    The metrics are stored in the checkpoints and, because these are saved before the evaluation of the same
    step, in ``OUTPUT_DIR/early_stop.json``. A resumed run thus stops at the same step as an uninterrupted
    one. A run that was stopped does not continue on resume, unless `patience` is larger.
    """

    def __init__(self, eval_period: int, metric: str, patience: int, mode: str = "max", output_dir: str = ""):
        """
        Args:
            eval_period: the period of the `EvalHook`.
            metric: name of the metric in the storage, such as "bbox/AP50" or "val/total_loss".
            patience: number of evaluations without improvement after which to stop.
            mode: "max" if higher is better, "min" if lower is better.
            output_dir: folder of ``early_stop.json``; "" writes no file.

        Raises:
            ValueError: if `mode` is neither "max" nor "min", or `patience` is below 1.
        """
        _check_mode(mode)
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self._period = eval_period
        self._metric = metric
        self._patience = patience
        self._mode = mode
        self._path = os.path.join(output_dir, "early_stop.json") if output_dir else ""
        # Metric by number of completed steps. A resumed run may evaluate the same step again.
        self._seen: dict[int, float] = {}

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            self._seen = {}
            if self._path and comm.is_main_process() and PathManager.isfile(self._path):
                PathManager.rm(self._path)  # from an earlier run
        # Processes on other machines may not see the file.
        self._seen = comm.all_gather(self._seen)[0]
        if self._seen:
            self._stop_if_due(
                f"this run was already stopped early: %s. To continue training, set "
                f"SOLVER.EARLY_STOP.PATIENCE (train.early_stop.patience) above {self._patience} or to 0"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step runs in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._note(done)
            self._stop_if_due("%s")

    def after_train(self) -> None:
        if self.trainer.is_finished and self.trainer.iter not in self._seen:
            self._note(self.trainer.iter)

    def _note(self, done: int) -> None:
        """Record the metric of the evaluation after `done` steps, on every process."""
        value = None
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            if self._metric in latest:
                value = latest[self._metric][0]
            else:
                logger.warning(
                    "%s. Training cannot be stopped early (SOLVER.EARLY_STOP.METRIC, "
                    "train.early_stop.metric).",
                    _explain_missing_metric(self._metric, self.trainer.storage),
                )
        value = comm.all_gather(value)[0]
        if value is None:
            return
        self._seen[done] = value
        if self._path and comm.is_main_process():
            content = json.dumps(self._content()) + "\n"
            PathManager.mkdirs(os.path.dirname(self._path))
            write_bytes_atomically(self._path, lambda f: f.write(content.encode()))

    def _stop_if_due(self, reason: str) -> None:
        """Stop training if the last `patience` evaluations did not improve.

        Args:
            reason: reason for `TrainerBase.stop`, with "%s" for the best value and the number of evaluations.
        """
        best, best_done = None, 0
        for done in sorted(self._seen):
            if _is_better(self._seen[done], best, self._mode):
                best, best_done = self._seen[done], done
        since = sum(done > best_done for done in self._seen)
        if since < self._patience:
            return
        was = "never finite" if best is None else f"{best:.5g} at iteration {best_done - 1}"
        self.trainer.stop(reason % f"no better {self._metric} in {since} evaluations; the best was {was}")

    def _content(self) -> dict:
        return {"metric": self._metric, "seen": [[done, self._seen[done]] for done in sorted(self._seen)]}

    def state_dict(self) -> dict:
        return self._content() if self._seen else {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the metrics up to the checkpoint's step from the state and the file.

        Only the file has the metric of that step: the checkpoint was saved before its evaluation.
        """
        states = [state_dict]
        if self._path and PathManager.isfile(self._path):
            with PathManager.open(self._path) as f:
                states.append(json.load(f))
        # The trainer already has the iteration of the checkpoint.
        until = self.trainer.iter + 1
        for state in states:
            if state.get("metric") == self._metric:
                self._seen.update({done: value for done, value in state["seen"] if done <= until})


class MissedEvaluation(HookBase):
    """A hook that runs an evaluation on resume if the earlier run was killed during it.

    Checkpoints are saved before the evaluation of the same step. Without this hook, a resumed run would
    continue without the results of that evaluation, and might keep another best checkpoint. The trainer needs
    ``rerun_evaluation`` and ``last_evaluation`` (see `detlib.engine.ConfigTrainer`).

    ``OUTPUT_DIR/last_evaluation`` contains the number of completed steps at the last evaluation whose results
    are written. Register the hook before the `PeriodicWriter`, on every process.
    """

    def __init__(self, eval_period: int, output_dir: str):
        """
        Args:
            eval_period: the period of the `EvalHook`, at least 1.
            output_dir: folder of ``last_evaluation``.
        """
        self._period = eval_period
        self._path = os.path.join(output_dir, "last_evaluation")
        self._made = 0  # completed steps at an evaluation whose results are not written yet

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start == 0:
            if comm.is_main_process() and PathManager.isfile(self._path):
                PathManager.rm(self._path)  # from an earlier run
            return
        # Processes on other machines may not see the file.
        made = comm.all_gather(self._read())[0]
        if made > start:
            # It belongs to repeated steps, whose new evaluation may be interrupted too.
            self._made = start
        # The evaluation after the last step always runs.
        is_last = start >= self.trainer.max_iter or self.trainer.stopped_reason is not None
        if made < start and start % self._period == 0 and not is_last:
            if self.trainer.rerun_evaluation(start - 1):
                self._made = start

    def before_step(self) -> None:
        if self._made:
            self._write()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._made = done

    def after_train(self) -> None:
        done = self.trainer.iter
        if self.trainer.last_evaluation == done:
            self._made = done
        if self._made:
            self._write()

    def _read(self) -> int:
        if not PathManager.isfile(self._path):
            return 0
        with PathManager.open(self._path) as f:
            text = f.read().strip()
        return int(text) if text.isdecimal() else 0

    def _write(self) -> None:
        if comm.is_main_process():
            PathManager.mkdirs(os.path.dirname(self._path))
            write_bytes_atomically(self._path, lambda f: f.write(f"{self._made}\n".encode()))
        self._made = 0


def _check_mode(mode: str) -> None:
    """
    Raises:
        ValueError: if `mode` is neither "max" nor "min".
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")


def _is_better(value: float, than: float | None, mode: str) -> bool:
    """Return whether `value` is finite and better than `than`. Any finite value is better than None."""
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value > than if mode == "max" else value < than


def _explain_missing_metric(name: str, storage: EventStorage) -> str:
    """Return a message about a metric that is not in the storage, with similar and existing names."""
    # Evaluation results are recorded without smoothing, training metrics with it.
    results = sorted(n for n, smoothed in storage.smoothing_hints().items() if not smoothed and "/" in n)
    near = near_names(name, results) or near_names(name, storage.latest())
    hint = f" Similar names: {', '.join(near)}." if near else ""
    return f"The evaluation has no metric '{name}'.{hint} It has: {', '.join(results) or 'none'}"
