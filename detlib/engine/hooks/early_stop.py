"""Ends a training that makes no more progress."""

import json
import logging
import os

from detlib.engine.hooks.metrics import check_mode, explain_missing_metric, is_better
from detlib.engine.train_loop import HookBase
from detlib.utils import comm
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager

__all__ = ["EarlyStopping"]

logger = logging.getLogger(__name__)


class EarlyStopping(HookBase):
    """Ends the training after some evaluations in a row without a better metric.

    It goes after the `EvalHook` whose results it reads, on every process: the main process, which has the
    results, decides for all. `TrainerBase.stop` says how training ends then.

    What it has seen is in the checkpoints, and for those that are saved before the evaluation of the same
    step in ``OUTPUT_DIR/early_stop.json`` too, so that a resumed training stops where an uninterrupted one
    would. A training that was stopped is not trained further when it is resumed, unless with more patience.
    """

    def __init__(self, eval_period: int, metric: str, patience: int, mode: str = "max", output_dir: str = ""):
        """
        Args:
            eval_period: the period of the `EvalHook`.
            metric: name of the metric in the storage, such as "bbox/AP50" or "val/total_loss".
            patience: number of evaluations without a better one after which to stop.
            mode: "max" if more is better, "min" if less is.
            output_dir: where to keep ``early_stop.json``; "" for nowhere.

        Raises:
            ValueError: for another `mode`, or a patience below 1.
        """
        check_mode(mode)
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self._period = eval_period
        self._metric = metric
        self._patience = patience
        self._mode = mode
        self._path = os.path.join(output_dir, "early_stop.json") if output_dir else ""
        # The metric by the number of steps done; a dict, as a resumed run may evaluate the same step again.
        self._seen: dict[int, float] = {}

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            self._seen = {}
            if self._path and comm.is_main_process() and PathManager.isfile(self._path):
                PathManager.rm(self._path)  # of an earlier training
        # The processes of other machines may not see the file.
        self._seen = comm.all_gather(self._seen)[0]
        if self._seen:
            self._stop_if_due(
                f"it had been stopped early before, as there was %s. To train further, set "
                f"SOLVER.EARLY_STOP.PATIENCE (train.early_stop.patience) above {self._patience} or to 0"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step is made in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._note(done)
            self._stop_if_due("%s")

    def after_train(self) -> None:
        if self.trainer.is_finished and self.trainer.iter not in self._seen:
            self._note(self.trainer.iter)

    def _note(self, done: int) -> None:
        """Takes down the metric of the evaluation after so many steps, on every process."""
        value = None
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            if self._metric in latest:
                value = latest[self._metric][0]
            else:
                logger.warning(
                    "%s. So training cannot be stopped early (SOLVER.EARLY_STOP.METRIC, "
                    "train.early_stop.metric).",
                    explain_missing_metric(self._metric, self.trainer.storage),
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
        """Calls `stop` if the last evaluations were no better than one before, as "%s" in `reason` tells."""
        best, best_done = None, 0
        for done in sorted(self._seen):
            if is_better(self._seen[done], best, self._mode):
                best, best_done = self._seen[done], done
        since = sum(done > best_done for done in self._seen)
        if since < self._patience:
            return
        was = "none that is finite" if best is None else f"{best:.5g} at iteration {best_done - 1}"
        self.trainer.stop(reason % f"no better {self._metric} in {since} evaluations; the best was {was}")

    def _content(self) -> dict:
        return {"metric": self._metric, "seen": [[done, self._seen[done]] for done in sorted(self._seen)]}

    def state_dict(self) -> dict:
        return self._content() if self._seen else {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what was seen up to the checkpoint's step from the state and from the file.

        The file knows of the evaluation of that step, before which checkpoints are saved.
        """
        states = [state_dict]
        if self._path and PathManager.isfile(self._path):
            with PathManager.open(self._path) as f:
                states.append(json.load(f))
        # By then the trainer's iteration is the checkpoint's.
        until = self.trainer.iter + 1
        for state in states:
            if state.get("metric") == self._metric:
                self._seen.update({done: value for done, value in state["seen"] if done <= until})
