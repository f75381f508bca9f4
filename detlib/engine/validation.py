"""Validation losses: the losses of a model on held-out data."""

import contextlib
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from detlib.engine.distributed.ddp import gathered_parameters
from detlib.engine.divergence import losses_to_floats
from detlib.layers import ASPP
from detlib.modeling.backbone.utils import DropPath
from detlib.utils import comm
from detlib.utils.env import seeded
from detlib.utils.events import EventStorage

__all__ = ["validation_losses", "validation_results"]

logger = logging.getLogger(__name__)

# Modules that normalize by the batch or drop values at random in training mode.
_KEPT_IN_EVAL = (_NormBase, _DropoutNd, DropPath, ASPP, nn.MultiheadAttention)


def validation_results(model: nn.Module, loaders: Mapping[str, Iterable]) -> dict[str, Any]:
    """Compute the losses on datasets, in the format of evaluation results.

    Args:
        model: as in `validation_losses`.
        loaders: data loaders by name.

    Returns:
        ``{"val": {"total_loss": ..., "loss_cls": ..., ...}}``, or ``{"val": {name: {...}, ...}}`` for
        multiple loaders; {} without any, and on processes other than the main one.
    """
    results = {name: validation_losses(model, loader, name) for name, loader in loaders.items()}
    if not results or not comm.is_main_process():
        return {}
    return {"val": next(iter(results.values())) if len(results) == 1 else results}


def validation_losses(model: nn.Module, loader: Iterable, name: str = "") -> dict[str, float]:
    """Compute the mean losses of a model over the images of a dataset.

    Images are processed one by one, so the means do not depend on batches and processes. The model is in
    training mode, because models return losses only then; but BatchNorm layers use their running statistics,
    dropout is off, the backbone is in eval mode, and state that the model updates in training is restored.
    Random numbers, as in the sampling of proposals, are seeded by the image: the same weights give the same
    losses, and the random numbers of training do not change.

    Args:
        model: maps a batch in the standard format to a dict of scalar losses, or to one scalar. Its mode does
            not change. A model in `DistributedDataParallel` is unwrapped. If the model is sharded, all
            processes call this together.
        loader: a finite loader of batches, lists of dicts with annotations; each process has its own shard.
        name: name of the dataset, for messages.

    Returns:
        The mean losses by name, and "total_loss", their sum; the same in every process.

    Raises:
        TypeError: if the model does not return losses.
        ValueError: if there are no images.
    """
    model = comm.unwrap(model)
    logger.info("Computing the losses on %s", name or "the validation set")
    sums: defaultdict[str, float] = defaultdict(float)
    count = 0
    state = _ModelState(model)
    # A separate storage keeps the values that models log out of the training metrics. Seeded, because a
    # loader draws a seed whenever it is iterated.
    with (
        _loss_mode(model),
        gathered_parameters(model),
        torch.no_grad(),
        EventStorage(),
        seeded(0, all_devices=True),
    ):
        for part in _single_images(loader):
            with seeded(_seed_of(part), all_devices=True):
                losses = _losses_of(model(part), name)
            state.restore()
            for key, value in losses_to_floats(losses).items():
                sums[key] += value
            count += 1
    means = _means_over_processes(sums, count, name)
    listed = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
    logger.info("Losses on %s: %s", name or "the validation set", listed)
    return means


def _single_images(loader: Iterable) -> Iterator[Any]:
    for batch in loader:
        yield from ([sample] for sample in batch) if isinstance(batch, list | tuple) else [batch]


def _means_over_processes(sums: Mapping[str, float], count: int, name: str) -> dict[str, float]:
    gathered = comm.all_gather((dict(sums), count))
    total = sum(number for _, number in gathered)
    if total == 0:
        raise ValueError(f"There are no images in {name or 'the validation set'} to compute losses on")
    keys = dict.fromkeys(key for part, _ in gathered for key in part)
    means = {key: sum(part.get(key, 0.0) for part, _ in gathered) / total for key in keys}
    return {"total_loss": sum(means.values()), **{k: v for k, v in means.items() if k != "total_loss"}}


def _losses_of(output: Any, name: str) -> Mapping[str, torch.Tensor]:
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return {"total_loss": output}
    if not isinstance(output, Mapping) or not output:
        raise TypeError(
            f"The validation loss on {name or 'a dataset'} needs a model that returns a dict of losses in "
            f"training mode, got {type(output).__name__}"
        )
    return output


@contextlib.contextmanager
def _loss_mode(model: nn.Module) -> Iterator[None]:
    """Context manager with the model in training mode where losses need it. Modes are restored on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    # A backbone has the same features in both modes, except for randomness and batch statistics.
    if isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone.eval()
    for module in model.modules():
        if isinstance(module, _KEPT_IN_EVAL):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _ModelState:
    """The state that a forward pass may change: buffers, and numbers in attributes of modules.

    An example of the latter is RetinaNet's running number of positive anchors.
    """

    def __init__(self, model: nn.Module) -> None:
        # The statistics of normalization layers do not change in eval mode.
        modules = [m for m in model.modules() if not isinstance(m, _NormBase)]
        self._buffers = [
            (buffer, buffer.detach().clone()) for m in modules for buffer in m.buffers(recurse=False)
        ]
        self._attributes = [(m, dict(_changeable(m))) for m in modules]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state, so that the losses of an image do not depend on earlier images."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for module, values in self._attributes:
            for key in [key for key, _ in _changeable(module) if key not in values]:
                delattr(module, key)
            vars(module).update(values)


def _changeable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, bool | int | float | torch.Tensor) and key != "training":
            yield key, value


def _seed_of(batch: Any) -> int:
    """Return a seed from the id or file name of the first image; 0 if it has neither."""
    sample = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(sample, Mapping):
        return 0
    return zlib.crc32(str(sample.get("image_id", sample.get("file_name", ""))).encode())
