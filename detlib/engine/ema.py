"""The exponential moving average of a model's weights.

See "Mean teachers are better role models" (https://arxiv.org/abs/1703.01780). Checkpoints store it under
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
"""Entry of the average in checkpoints."""


class WeightAverage:
    """The moving average of all floating-point parameters and buffers.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that the average of a short run is not
    dominated by its random initialization.

    Attributes:
        updates: number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: the model, without wrappers.
            decay: weight of the old average in an update, in (0, 1).

        Raises:
            ValueError: if `decay` is not in (0, 1).
        """
        if not 0.0 < decay < 1.0:
            raise ValueError(f"The decay of the weight average must be in (0, 1), got {decay}")
        self.decay = decay
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Restart the average from the current weights of the model."""
        self.updates = 0
        # The model's own tensors, which training modifies in-place. A shared tensor has multiple names.
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
        """Update the average with the current weights. Call it after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(*self._floating, 1.0 - decay)
        for name in self._others:
            self._average[name].copy_(self._values[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In-place, because the optimizer, DDP and compiled code hold references to the tensors.
        for name, value in self._values.items():
            own = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averages by parameter name."""
        return {name: self._average[first] for name, first in self._names.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restore the averages. A missing one starts from the model's parameter, with a warning.

        Raises:
            ValueError: if the shape of a tensor differs from the model's.
        """
        for name, average in self._average.items():
            value = state_dict.get(name)
            if value is None:
                logger.warning(
                    "The saved weight average lacks '%s': it starts from the model's parameter", name
                )
                continue
            if value.shape != average.shape:
                raise ValueError(
                    f"The saved average of '{name}' has shape {tuple(value.shape)}, but the model's "
                    f"parameter has {tuple(average.shape)}"
                )
            average.copy_(shard_like(value, average))


def load_for_inference(model: nn.Module, weights: str, *, use_average: bool) -> None:
    """Load weights for inference.

    Args:
        model: the model.
        weights: a file or URL, as in `DetectionCheckpointer.load`.
        use_average: whether to use the weight average if the file has one.
    """
    entries = DetectionCheckpointer(model).load(weights, checkpointables=[])
    average = entries.get(EMA_ENTRY)
    if not use_average:
        return
    if average is None:
        logger.info("%s has no weight average; using the weights", weights)
        return
    missing, unexpected = model.load_state_dict(average, strict=False)
    logger.info("Using the weight average in %s", weights)
    if missing or unexpected:
        logger.warning(
            "The weight average lacks %s; it has %s, which the model does not have", missing, unexpected
        )
