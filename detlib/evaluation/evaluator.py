"""The evaluator interface and the inference loop over a dataset."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from detlib.utils import comm

__all__ = ["DatasetEvaluator", "DatasetEvaluators", "inference_context", "inference_on_dataset"]

logger = logging.getLogger(__name__)

_WARMUP_BATCHES = 5
_SECONDS_BETWEEN_REPORTS = 5.0


class DatasetEvaluator:
    """Base class of evaluators, which collect a model's outputs over a dataset and compute metrics from them.

    `inference_on_dataset` calls `reset` once, `process` for each batch, and `evaluate` at the end. Subclasses
    override the methods that they need.
    """

    def reset(self) -> None:
        """Discard all collected outputs. Called before the first batch."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the outputs of one batch.

        Args:
            inputs: the model's input dicts.
            outputs: the model's output dicts, one for each input.
        """

    def evaluate(self) -> Mapping[str, Mapping[str, float]] | None:
        """Compute the metrics of all collected outputs.

        Returns:
            `{task: {metric: value}}`. In distributed runs, processes other than the main one return None or
            an empty dict.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Multiple evaluators that run as one."""

    def __init__(self, evaluators: Iterable[DatasetEvaluator]) -> None:
        """
        Args:
            evaluators: evaluators that each receive every batch. Their tasks must be distinct.
        """
        self._evaluators = list(evaluators)

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Compute the metrics of all evaluators.

        Returns:
            `{task: {metric: value}}` with the tasks of all evaluators.

        Raises:
            ValueError: two evaluators report the same task.
        """
        results: dict[str, Any] = {}
        for evaluator in self._evaluators:
            result = evaluator.evaluate()
            if result is None or not comm.is_main_process():
                continue
            for task, metrics in result.items():
                if task in results:
                    raise ValueError(
                        f"Two evaluators report the task {task!r}; the second is {type(evaluator).__name__}."
                    )
                results[task] = metrics
        return results


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode inside the `with` block, then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def inference_on_dataset(
    model: Callable[[list[dict]], list[dict]],
    data_loader: Iterable[list[dict]],
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | tuple[DatasetEvaluator, ...] | None,
    callbacks: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Run a model over a dataset without gradients and evaluate its outputs.

    The progress and the remaining time are logged. At the end the time per image on each device is logged,
    in total and for the model alone ("pure compute"). These times exclude up to five warm-up batches.

    Args:
        model: an nn.Module, which runs in eval mode and is restored afterwards, or any callable.
        data_loader: an iterable with a length, of batches. A batch is a list of input dicts.
        evaluator: an evaluator, a list of evaluators, or None to run only the model.
        callbacks: functions to call, by event: "on_start", "on_end", and for each batch "before_inference"
            and "after_inference".

    Returns:
        The evaluator's results. Empty if there are none, as in processes other than the main one.

    Raises:
        ValueError: `callbacks` has an unknown key.
    """
    callbacks = dict(callbacks or {})
    legal = ("on_start", "before_inference", "after_inference", "on_end")
    unknown = [key for key in callbacks if key not in legal]
    if unknown:
        raise ValueError(f"callbacks has unknown keys {unknown}; legal keys are {', '.join(legal)}.")
    if evaluator is None or isinstance(evaluator, list | tuple):
        evaluator = DatasetEvaluators(evaluator or [])

    def call(key: str) -> None:
        if key in callbacks:
            callbacks[key]()

    evaluator.reset()
    progress = _Progress(len(cast(Sized, data_loader)), comm.get_world_size())
    mode = inference_context(model) if isinstance(model, nn.Module) else nullcontext()
    with mode, torch.no_grad():
        call("on_start")
        for inputs in data_loader:
            progress.data_loaded()
            call("before_inference")
            outputs = model(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            call("after_inference")
            progress.forward_done()
            evaluator.process(inputs, outputs)
            progress.batch_done(len(inputs))
        call("on_end")
    progress.finish()
    return cast(dict[str, Any], evaluator.evaluate() or {})


class _Progress:
    """Timer of the inference loop, which logs the progress."""

    def __init__(self, num_batches: int, num_processes: int) -> None:
        self.num_batches = num_batches
        self.num_processes = num_processes
        processes = f" in each of {num_processes} processes" if num_processes > 1 else ""
        self.warmup = min(_WARMUP_BATCHES, num_batches - 1)
        self.batches = 0
        self._start_clock()
        self._last_report = time.perf_counter()
        logger.info("Inference on %d batches%s", num_batches, processes)

    def _start_clock(self) -> None:
        self.start = self._mark = time.perf_counter()
        self.timed_batches = self.images = 0
        self.seconds = {"data": 0.0, "model": 0.0, "evaluator": 0.0}

    def _lap(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] += now - self._mark
        self._mark = now

    def data_loaded(self) -> None:
        self._lap("data")

    def forward_done(self) -> None:
        self._lap("model")

    def batch_done(self, num_images: int) -> None:
        self._lap("evaluator")
        self.batches += 1
        self.timed_batches += 1
        self.images += num_images
        now = time.perf_counter()
        if self.batches > self.warmup and now - self._last_report >= _SECONDS_BETWEEN_REPORTS:
            self._last_report = now
            per_batch = (now - self.start) / self.timed_batches
            left = datetime.timedelta(seconds=int(per_batch * (self.num_batches - self.batches)))
            logger.info(
                "Inference done %d/%d. %s. ETA %s", self.batches, self.num_batches, self._per_image(), left
            )
        if self.batches == self.warmup:
            self._start_clock()

    def _per_image(self) -> str:
        images = max(self.images, 1)
        times = ", ".join(f"{key} {value / images:.4f}" for key, value in self.seconds.items())
        return f"Seconds per image: {sum(self.seconds.values()) / images:.4f} ({times})"

    def finish(self) -> None:
        images = max(self.images, 1)
        for what, seconds in (
            ("Total inference time", time.perf_counter() - self.start),
            ("Pure compute time", self.seconds["model"]),
        ):
            logger.info(
                "%s: %s (%.6f s / image per device, %d devices, %d images in this process, "
                "excluding warm-up)",
                what,
                datetime.timedelta(seconds=int(seconds)),
                seconds / images,
                self.num_processes,
                self.images,
            )
        logger.info("%s", self._per_image())
