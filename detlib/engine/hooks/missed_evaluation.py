"""Makes an evaluation up that was cut off."""

import logging
import os

from detlib.engine.hooks.checkpoint import PeriodicCheckpointer
from detlib.engine.hooks.evaluation import EvalHook
from detlib.engine.train_loop import HookBase
from detlib.utils import comm
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager

__all__ = ["MissedEvaluation"]

logger = logging.getLogger(__name__)


class MissedEvaluation(HookBase):
    """When a training is resumed, makes the evaluation of the checkpoint's step if that was cut off.

    Checkpoints are saved before the evaluation of the same step. If a run is killed in that, the resumed one
    would go on behind it, without its results: the best checkpoint might be another one. So this one calls
    the hooks that lie between the `PeriodicCheckpointer` and itself for that step, if an `EvalHook` is there.

    ``OUTPUT_DIR/last_evaluation`` says after how many steps the last evaluation was made whose results are
    put out. It goes before the `PeriodicWriter`, on every process.
    """

    def __init__(self, eval_period: int, output_dir: str):
        """
        Args:
            eval_period: the period of the `EvalHook`, at least 1.
            output_dir: where to keep ``last_evaluation``.
        """
        self._period = eval_period
        self._path = os.path.join(output_dir, "last_evaluation")
        self._made = 0  # steps done at an evaluation whose results are being put out

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start == 0:
            if comm.is_main_process() and PathManager.isfile(self._path):
                PathManager.rm(self._path)  # of an earlier training
            return
        # The processes of other machines may not see the file.
        made = comm.all_gather(self._read())[0]
        if made > start:
            # An evaluation of steps that are done again; the new one may be cut off.
            self._made = start
        # The evaluation after the last step is made in any case.
        is_last = start >= self.trainer.max_iter or self.trainer.stopped_reason is not None
        hooks = self._hooks_behind_checkpoint()
        if made < start and start % self._period == 0 and not is_last and hooks:
            logger.info("The evaluation after iteration %d was cut off; it is made now", start - 1)
            self._complete_step(start - 1, hooks)
            self._made = start

    def _hooks_behind_checkpoint(self) -> list[HookBase]:
        hooks: list[HookBase] = []
        for hook in self.trainer._hooks:
            if hook is self:
                return hooks if any(isinstance(h, EvalHook) for h in hooks) else []
            hooks = [] if isinstance(hook, PeriodicCheckpointer) else [*hooks, hook]
        return []

    def _complete_step(self, iteration: int, hooks: list[HookBase]) -> None:
        trainer = self.trainer
        trainer.iter = trainer.storage.iter = iteration
        try:
            for hook in hooks:
                hook.after_step()
        finally:
            trainer.iter = trainer.storage.iter = iteration + 1

    def before_step(self) -> None:
        if self._made:
            self._write()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._made = done

    def after_train(self) -> None:
        done = self.trainer.iter
        if any(hook.evaluated == done for hook in self.trainer._hooks if isinstance(hook, EvalHook)):
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
