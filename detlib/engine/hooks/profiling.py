"""Hooks that profile time and memory."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from detlib.engine.train_loop import HookBase
from detlib.utils import comm
from detlib.utils.file_io import PathManager

__all__ = ["AutogradProfiler", "StepsProfiler", "TorchMemoryStats", "TorchProfiler"]

logger = logging.getLogger(__name__)


class TorchProfiler(HookBase):
    """A hook that profiles selected steps with `torch.profiler`.

    Example:
        >>> TorchProfiler(lambda trainer: 10 < trainer.iter < 20, cfg.OUTPUT_DIR)
    """

    def __init__(
        self,
        enable_predicate: Callable[..., bool],
        output_dir: str,
        *,
        activities: Iterable[torch.profiler.ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ):
        """
        Args:
            enable_predicate: function of the trainer that returns whether to profile its current step.
            output_dir: folder of the traces.
            activities: as in `torch.profiler.profile`; None for all available ones.
            save_tensorboard: write traces for TensorBoard to ``OUTPUT_DIR/log``, else Chrome traces to
                ``OUTPUT_DIR/profiler-trace-iter*.json``.
        """
        self._enable_predicate = enable_predicate
        self._activities = activities
        self._output_dir = output_dir
        self._save_tensorboard = save_tensorboard
        self._profiler: Any = None

    def before_step(self) -> None:
        if self._enable_predicate(self.trainer):
            self._profiler = self._make_profiler()
            self._profiler.__enter__()

    def _make_profiler(self):
        on_trace_ready = None
        if self._save_tensorboard:
            name = f"profiler-tensorboard-iter{self.trainer.iter}"
            on_trace_ready = torch.profiler.tensorboard_trace_handler(
                os.path.join(self._output_dir, "log", name), f"worker{comm.get_rank()}"
            )
        return torch.profiler.profile(
            activities=self._activities,
            on_trace_ready=on_trace_ready,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
            with_flops=True,
        )

    def after_step(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.__exit__(None, None, None)
        if not self._save_tensorboard:
            PathManager.mkdirs(self._output_dir)
            name = f"profiler-trace-iter{self.trainer.iter}.json"
            profiler.export_chrome_trace(os.path.join(self._output_dir, name))


class AutogradProfiler(TorchProfiler):
    """A hook that profiles selected steps with `torch.autograd.profiler`: less overhead, less detail.

    Example:
        >>> AutogradProfiler(lambda trainer: trainer.iter > 10, cfg.OUTPUT_DIR)
    """

    def __init__(self, enable_predicate: Callable[..., bool], output_dir: str, *, use_cuda: bool = True):
        """
        Args:
            enable_predicate: function of the trainer that returns whether to profile its current step.
            output_dir: folder of the Chrome traces.
            use_cuda: time CUDA kernels too, if CUDA is available.
        """
        super().__init__(enable_predicate, output_dir, save_tensorboard=False)
        self._use_cuda = use_cuda

    def _make_profiler(self):
        device = "cuda" if self._use_cuda and torch.cuda.is_available() else None
        return torch.autograd.profiler.profile(use_device=device)


class StepsProfiler(HookBase):
    """A hook that profiles consecutive steps, including the hooks before this one.

    It writes ``trace_iter20-24.json``, for chrome://tracing or https://ui.perfetto.dev, and
    ``operators_iter20-24.txt``, a table of the operators by time. With several processes, each writes its own
    files.
    """

    def __init__(self, start: int, steps: int, output_dir: str):
        """
        Args:
            start: number of steps of this run before the first profiled one, because the first are slower.
            steps: number of steps to profile.
            output_dir: folder of the files.

        Raises:
            ValueError: if `start` is negative or `steps` is below 1.
        """
        if start < 0 or steps < 1:
            raise ValueError(f"Profiling needs start >= 0 and steps >= 1, got {start} and {steps}")
        self._start = start
        self._steps = steps
        self._output_dir = output_dir
        self._profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter + self._start:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        self._profiler.step()
        if self.trainer.iter + 1 >= self.trainer.start_iter + self._start + self._steps:
            self._finish(self.trainer.iter)

    def after_train(self) -> None:
        # Training ended before the last step to profile.
        self._finish(self.trainer.iter - 1)

    def _finish(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.__exit__(None, None, None)
        PathManager.mkdirs(self._output_dir)
        name = f"iter{self.trainer.start_iter + self._start}-{last}"
        if comm.get_world_size() > 1:
            name += f"_rank{comm.get_rank()}"
        trace = os.path.join(self._output_dir, f"trace_{name}.json")
        profiler.export_chrome_trace(trace)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=50)
        with PathManager.open(os.path.join(self._output_dir, f"operators_{name}.txt"), "w") as f:
            f.write(table + "\n")
        logger.info("Saved the trace of %s to %s", name.replace("iter", "iterations "), trace)


class TorchMemoryStats(HookBase):
    """A hook that logs CUDA memory periodically. Without CUDA it has no effect."""

    def __init__(self, period: int = 20, max_runs: int = 10):
        """
        Args:
            period: number of steps between two reports.
            max_runs: maximum number of reports.
        """
        self._period = period
        self._max_runs = max_runs
        self._runs = 0

    def after_step(self) -> None:
        if self._runs >= self._max_runs or not torch.cuda.is_available():
            return
        done = self.trainer.iter + 1
        if done % self._period != 0 and done != self.trainer.max_iter:
            return
        mib = 2**20
        logger.info(
            "iter: %d  max_reserved_mem: %.0fM  reserved_mem: %.0fM  max_allocated_mem: %.0fM  "
            "allocated_mem: %.0fM",
            self.trainer.iter,
            torch.cuda.max_memory_reserved() / mib,
            torch.cuda.memory_reserved() / mib,
            torch.cuda.max_memory_allocated() / mib,
            torch.cuda.memory_allocated() / mib,
        )
        self._runs += 1
        if self._runs == self._max_runs:
            logger.info("%s", torch.cuda.memory_summary())
        torch.cuda.reset_peak_memory_stats()
