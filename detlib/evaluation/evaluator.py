"""What an evaluator is, and the loop that runs a model over a dataset for it."""

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
    """Collects what a model returns for the images of a dataset, and computes metrics of it in the end.

    Subclasses override what they need of the three methods.
    """

    def reset(self) -> None:
        """Forgets what was collected. Called before the first batch."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in one batch.

        Args:
            inputs: what the model was called with.
            outputs: what it returned: one dict for each input.
        """

    def evaluate(self) -> Mapping[str, Mapping[str, float]] | None:
        """Computes the metrics of all that was taken in.

        Returns:
            `{task: {metric: value}}`; in distributed runs in the main process only, else None or empty.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Runs several evaluators as one.

    Args:
        evaluators: each gets every batch; the tasks that they report must differ.
    """

    def __init__(self, evaluators: Iterable[DatasetEvaluator]) -> None:
        self._evaluators = list(evaluators)

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Returns the results of all in one dict. Raises ValueError if two report the same task."""
        results: dict[str, Any] = {}
        for evaluator in self._evaluators:
            result = evaluator.evaluate()
            if result is None or not comm.is_main_process():
                continue
            for task, metrics in result.items():
                if task in results:
                    raise ValueError(
                        f"Two evaluators report a task {task!r}; the second is {type(evaluator).__name__}."
                    )
                results[task] = metrics
        return results


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode inside the `with`, and each module back into its own mode afterwards."""
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
    """Runs a model over a dataset without gradients and evaluates what it returns.

    The log says how far it is, the time left, and in the end the time for an image on each device, as model
    zoos have it: in all, and for the model alone ("pure compute"). The first batches, up to five, are left
    out of these times.

    Args:
        model: an nn.Module, which runs in eval mode and is put back afterwards; or any callable.
        data_loader: its length is the number of batches; a batch is a list of input dicts.
        evaluator: one, or a list of them, or None for running the model only.
        callbacks: functions by the time at which they are called: "on_start" and "on_end", and
            "before_inference" and "after_inference" of every batch.

    Returns:
        The evaluator's results; empty where there are none, as in processes other than the main one.
    """
    callbacks = dict(callbacks or {})
    legal = ("on_start", "before_inference", "after_inference", "on_end")
    unknown = [key for key in callbacks if key not in legal]
    if unknown:
        raise ValueError(f"callbacks has the keys {unknown}; legal are {', '.join(legal)}.")
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
    """Takes the times of the loop and reports them to the log."""

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
        return f"Seconds an image: {sum(self.seconds.values()) / images:.4f} ({times})"

    def finish(self) -> None:
        images = max(self.images, 1)
        for what, seconds in (
            ("Total inference time", time.perf_counter() - self.start),
            ("Pure compute time", self.seconds["model"]),
        ):
            logger.info(
                "%s: %s (%.6f s / im on each device, on %d devices, over %d images here, warm-up left out)",
                what,
                datetime.timedelta(seconds=int(seconds)),
                seconds / images,
                self.num_processes,
                self.images,
            )
        logger.info("%s", self._per_image())
