"""Losses on data that are not trained on."""

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

from detlib.engine.distributed.ddp import whole_parameters
from detlib.engine.divergence import losses_to_floats
from detlib.layers import ASPP
from detlib.modeling.backbone.transformer_parts import DropPath
from detlib.utils import comm
from detlib.utils.env import seeded
from detlib.utils.events import EventStorage

__all__ = ["validation_losses", "validation_results"]

logger = logging.getLogger(__name__)

# What in training would normalise by the batch, or leave things out at random.
_KEPT_IN_EVAL = (_NormBase, _DropoutNd, DropPath, ASPP, nn.MultiheadAttention)


def validation_results(model: nn.Module, loaders: Mapping[str, Iterable]) -> dict[str, Any]:
    """The losses on several sets, in the form of an evaluation's results.

    Args:
        model: as for `validation_losses`.
        loaders: by name.

    Returns:
        ``{"val": {"total_loss": ..., "loss_cls": ..., ...}}``, and with several sets
        ``{"val": {name: {...}, ...}}``; {} without any, and in processes other than the main one.
    """
    results = {name: validation_losses(model, loader, name) for name, loader in loaders.items()}
    if not results or not comm.is_main_process():
        return {}
    return {"val": next(iter(results.values())) if len(results) == 1 else results}


def validation_losses(model: nn.Module, loader: Iterable, name: str = "") -> dict[str, float]:
    """Means of a model's losses over the pictures of a set.

    Each picture is given to the model by itself, so that the means do not depend on how pictures come
    together in batches and processes. The model is in training mode, as models give losses only then; but
    BatchNorm layers use their running statistics, dropout is off, the backbone is in eval mode, and whatever
    the model counts along in training is put back. Random numbers, as for the sampling of proposals, are
    seeded by the picture: the same weights give the same losses, and training's own numbers are not touched.

    Args:
        model: maps a batch in the standard format to a dict of scalar losses, or to one scalar. Its mode is
            as before afterwards. Of a model in `DistributedDataParallel` the inner one is used. If it is
            shared out between processes, all of them call this together.
        loader: finite; gives batches as lists of dicts with annotations, each process its own share.
        name: of the set, for messages.

    Returns:
        The means by name, and "total_loss", their sum; the same in every process.

    Raises:
        TypeError: if the model gives no losses.
        ValueError: if there is no picture.
    """
    model = comm.unwrap(model)
    logger.info("Taking the losses on %s", name or "the validation set")
    sums: defaultdict[str, float] = defaultdict(float)
    count = 0
    state = _ModelState(model)
    # A storage of its own, as what models log belongs to training.
    # A loader draws a seed whenever it is iterated.
    with (
        _loss_mode(model),
        whole_parameters(model),
        torch.no_grad(),
        EventStorage(),
        seeded(0, all_devices=True),
    ):
        for part in _single_pictures(loader):
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


def _single_pictures(loader: Iterable) -> Iterator[Any]:
    for batch in loader:
        yield from ([sample] for sample in batch) if isinstance(batch, list | tuple) else [batch]


def _means_over_processes(sums: Mapping[str, float], count: int, name: str) -> dict[str, float]:
    gathered = comm.all_gather((dict(sums), count))
    total = sum(number for _, number in gathered)
    if total == 0:
        raise ValueError(f"There is no picture in {name or 'the validation set'} to take the losses on")
    keys = dict.fromkeys(key for part, _ in gathered for key in part)
    means = {key: sum(part.get(key, 0.0) for part, _ in gathered) / total for key in keys}
    return {"total_loss": sum(means.values()), **{k: v for k, v in means.items() if k != "total_loss"}}


def _losses_of(output: Any, name: str) -> Mapping[str, torch.Tensor]:
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return {"total_loss": output}
    if not isinstance(output, Mapping) or not output:
        raise TypeError(
            f"The validation loss on {name or 'a set'} needs a model that returns a dict of losses in "
            f"training mode, got {type(output).__name__}"
        )
    return output


@contextlib.contextmanager
def _loss_mode(model: nn.Module) -> Iterator[None]:
    """Training mode as far as it takes to get losses; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    # A backbone gives the same features in both modes, but for what must not be active here.
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
    """What a model may change in a forward pass: buffers, and numbers that modules have as attributes, such
    as RetinaNet's running number of positive anchors."""

    def __init__(self, model: nn.Module) -> None:
        # The statistics of normalisation layers do not change in eval mode.
        modules = [m for m in model.modules() if not isinstance(m, _NormBase)]
        self._buffers = [
            (buffer, buffer.detach().clone()) for m in modules for buffer in m.buffers(recurse=False)
        ]
        self._attributes = [(m, dict(_changeable(m))) for m in modules]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all of it back, so that no picture's losses depend on the pictures before."""
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
    """From the first picture's id or file name; 0 if it has neither."""
    sample = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(sample, Mapping):
        return 0
    return zlib.crc32(str(sample.get("image_id", sample.get("file_name", ""))).encode())
