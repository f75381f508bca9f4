"""The exponential moving average of a model's weights.

See "Mean teachers are better role models" (https://arxiv.org/abs/1703.01780). Checkpoints hold it under
"ema_state", by parameter name.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.checkpoint.sharded import shard_like

__all__ = ["EMA_ENTRY", "WeightAverage", "load_for_inference"]

logger = logging.getLogger(__name__)

EMA_ENTRY = "ema_state"
"""Where checkpoints have the average."""


class WeightAverage:
    """The average of all floating-point parameters and buffers over the updates.

    After n updates, the decay is ``min(decay, (1 + n) / (10 + n))``, so that a short training does not
    average over its random beginning.

    Attributes:
        updates: how many updates it has seen.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: the model, without wrappers.
            decay: share of the average that an update leaves, in (0, 1).

        Raises:
            ValueError: for another `decay`.
        """
        if not 0.0 < decay < 1.0:
            raise ValueError(f"The decay of the weights' average lies in (0, 1), got {decay}")
        self.decay = decay
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Begins anew from the model as it is."""
        self.updates = 0
        # The very tensors: training changes them in place. Some models have one under several names.
        state = self._model.state_dict(keep_vars=True)
        first_names: dict[int, str] = {}
        self._names = {name: first_names.setdefault(id(x), name) for name, x in state.items()}
        self._values = {name: state[name].detach() for name in first_names.values()}
        self._average = {name: value.clone() for name, value in self._values.items()}
        floating = [name for name, value in self._values.items() if value.is_floating_point()]
        self._others = [name for name in self._values if name not in set(floating)]
        self._floating = [self._average[n] for n in floating], [self._values[n] for n in floating]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model as it is after an update of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(*self._floating, 1.0 - decay)
        for name in self._others:
            self._average[name].copy_(self._values[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the average as its weights; after it its own ones again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place, as optimizer, DDP and compiled code hold the very tensors.
        for name, value in self._values.items():
            own = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return {name: self._average[first] for name, first in self._names.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Takes over averages; what the file lacks stays the model's.

        Raises:
            ValueError: if a tensor has another shape than the model's.
        """
        for name, average in self._average.items():
            value = state_dict.get(name)
            if value is None:
                logger.warning("The average of the weights has no '%s': it starts from the model's", name)
                continue
            if value.shape != average.shape:
                raise ValueError(
                    f"The saved average of '{name}' has shape {tuple(value.shape)}, the model's parameter "
                    f"{tuple(average.shape)}"
                )
            average.copy_(shard_like(value, average))


def load_for_inference(model: nn.Module, weights: str, *, use_average: bool) -> None:
    """Loads what a model is to predict with: the average of the weights if it is wanted and there.

    Args:
        model: the model.
        weights: a file or address, as `DetectionCheckpointer.load` takes it.
        use_average: whether to take the average, where the file has one.
    """
    entries = DetectionCheckpointer(model).load(weights, checkpointables=[])
    average = entries.get(EMA_ENTRY)
    if not use_average:
        return
    if average is None:
        logger.info("%s has no average of the weights; its weights themselves are used", weights)
        return
    missing, unexpected = model.load_state_dict(average, strict=False)
    logger.info("Using the average of the weights of %s", weights)
    if missing or unexpected:
        logger.warning("The average lacks %s and has %s that the model lacks", missing, unexpected)
