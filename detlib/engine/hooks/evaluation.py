"""Hooks that evaluate the model, or make it ready for that."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from detlib.engine.ema import WeightAverage
from detlib.engine.train_loop import HookBase
from detlib.evaluation.testing import flatten_results_dict
from detlib.layers.fvcore_nn import get_bn_modules, update_bn_stats
from detlib.utils import comm
from detlib.utils.events import EventStorage

__all__ = ["EvalHook", "PreciseBN"]

logger = logging.getLogger(__name__)


class EvalHook(HookBase):
    """Calls an evaluation function every so many steps, and after the last one.

    Every process calls it, and they wait for each other afterwards.

    Attributes:
        evaluated: the number of steps done at the last evaluation; None before the first.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping],
        eval_after_train: bool = True,
        repeat_after_stop: bool = False,
    ):
        """
        Args:
            eval_period: steps between two evaluations; 0 evaluates after the last step only.
            eval_function: takes nothing and returns a nested dict of numbers, or nothing.
            eval_after_train: whether to evaluate after the last step.
            repeat_after_stop: whether to do so also if training was stopped early by the evaluation of its
                last step; for functions that do more at the end.
        """
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train
        self._repeat_after_stop = repeat_after_stop
        self.evaluated: int | None = None

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(f"eval_function must return a dict of numbers, got {type(results).__name__}")
            flat = {}
            for name, value in flatten_results_dict(results).items():
                try:
                    flat[name] = float(value)
                except (TypeError, ValueError) as e:
                    raise ValueError(
                        f"eval_function must return a nested dict of numbers; '{name}' is {value!r}"
                    ) from e
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        # Evaluation takes the processes different times; steps must start together.
        comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last step is made in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()
            self.evaluated = done

    def after_train(self) -> None:
        # Not if training was cut short by an error.
        if self._eval_after_train and self.trainer.is_finished:
            if self._repeat_after_stop or self.evaluated != self.trainer.iter:
                self._do_eval()
                self.evaluated = self.trainer.iter
        # The function usually holds the trainer, which holds this hook.
        del self._func


class PreciseBN(HookBase):
    """Computes the statistics of BatchNorm layers anew over many batches, before each evaluation.

    Training keeps a moving average of them, of models that have changed since. See "Rethinking 'Batch' in
    BatchNorm" (https://arxiv.org/abs/2105.07576). It goes before the `EvalHook`.
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
            period: steps between two computations; 0 for after the last step only.
            model: layers in training mode are computed; without any this does nothing.
            data_loader: gives the batches.
            num_iter: number of batches.
            average: the average of the weights, if that is what is evaluated; its statistics are computed
                as well, over as many batches.
        """
        self._average = average
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN does nothing: the model has no BatchNorm layer in training mode")
        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._data_iter = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_final = done == self.trainer.max_iter
        if is_final or (self._period > 0 and done % self._period == 0):
            self.update_stats()

    def update_stats(self) -> None:
        """Computes the statistics and puts them into the model."""
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        self._compute()
        if self._average is not None:
            with self._average.applied():
                self._compute()

    def _compute(self) -> None:
        """Puts the statistics of the weights that the model has now into it."""
        logger.info("Computing precise BatchNorm statistics over %d batches", self._num_iter)
        layers = get_bn_modules(self._model)
        held = [(layer.running_mean, layer.running_var) for layer in layers]
        # A storage of its own, as these batches are none of the training's.
        with EventStorage():
            update_bn_stats(self._model, itertools.islice(self._data_iter, self._num_iter), self._num_iter)
        for layer, (mean, var) in zip(layers, held):
            # fvcore puts new tensors there, but the average of the weights holds the former ones.
            layer.running_mean = mean.copy_(layer.running_mean)
            layer.running_var = var.copy_(layer.running_var)

    def state_dict(self) -> dict:
        """The position in the data, as another part of them gives other statistics."""
        if self._disabled or not hasattr(self._data_loader, "state_dict"):
            return {}
        return {"data_loader": self._data_loader.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        if not self._disabled and hasattr(self._data_loader, "load_state_dict"):
            self._data_loader.load_state_dict(state_dict["data_loader"])
