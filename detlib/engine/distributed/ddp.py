"""What is done to a model before it trains: sharing it out between processes, and compiling its parts."""

import contextlib
import itertools
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detlib.engine.distributed.activation_checkpointing import find_backbone_blocks
from detlib.modeling import facts_of
from detlib.utils import comm
from detlib.utils.suggest import near_names

__all__ = ["compile_parts", "create_ddp_model", "first_process_buffers", "shard_model", "whole_parameters"]

logger = logging.getLogger(__name__)

# The modules that are in a block of `whole_parameters`.
_held_whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_parts(model: nn.Module, names: Iterable[str] = (), backend: str = "inductor") -> list[str]:
    """Has parts of a model compiled by torch.compile when they are first used, for pictures of any size.

    Parameter names stay as they are.

    Args:
        model: the model.
        names: the parts, as in ``model.get_submodule``; () for those of `MetaArchitecture.compile_modules`
            that there are.
        backend: as in `torch.compile`.

    Returns:
        The names of the parts.

    Raises:
        ValueError: if the model has no part of a name.
    """
    parts = dict(model.named_modules())
    chosen = list(names) or [name for name in facts_of(model).compile_modules if name in parts]
    for name in chosen:
        if name not in parts:
            near = ", ".join(near_names(name, parts)) or ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"TRAIN.COMPILE.MODULES: the model has no part '{name}'; near: {near}")
        parts[name].compile(backend=backend, dynamic=True)
    logger.info("torch.compile (%s) takes: %s; the first steps take longer", backend, ", ".join(chosen))
    return chosen


def shard_model(model: nn.Module) -> nn.Module:
    """Shares parameters, and with them gradients and optimizer state, out between all processes (FSDP2).

    Each block of the backbone is gathered when it is computed, the rest of the model as a whole. See
    `torch.distributed.fsdp.fully_shard`. The optimizer must be made after this.

    Args:
        model: the model, on its device; changed in place.

    Raises:
        RuntimeError: without a process group.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise RuntimeError(
            "TRAIN.STRATEGY 'fsdp' shares a model out between processes: start several, with --num-gpus or "
            "torchrun, or use 'ddp'"
        )
    with torch.no_grad():
        # Each process has drawn its own first weights; those of the first one count, as in DDP.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor, 0)
    device = next(model.parameters()).device.type
    mesh = dist.device_mesh.init_device_mesh(device, (comm.get_world_size(),))
    for block in find_backbone_blocks(model):
        fully_shard(block, mesh=mesh)
    # By default what is not in a block would stay whole after a forward pass, until a backward pass that
    # does not come in evaluation; what is saved or averaged then must be the shares.
    return cast(nn.Module, fully_shard(model, mesh=mesh, reshard_after_forward=True))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block each process holds all parameters of a model of `shard_model`; others stay.

    Processes evaluate different numbers of pictures, so they cannot gather parameters in each forward pass.
    A block within a block changes nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in model.modules() if isinstance(m, FSDPModule) and m not in _held_whole]
    _held_whole.update(parts)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
        _held_whole.difference_update(parts)


@contextlib.contextmanager
def first_process_buffers(model: nn.Module) -> Iterator[None]:
    """Within the block all processes have the first one's buffers, which are what checkpoints hold.

    BatchNorm layers keep statistics of their own process's pictures. An evaluation that is shared out must be
    of one model, the one that is saved. All processes take part.

    Args:
        model: the model, without wrappers.
    """
    if comm.get_world_size() == 1:
        yield
        return
    saved = model.state_dict(keep_vars=True)  # other buffers may differ in shape
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, 0)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, own):
            buffer.copy_(value)


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """Wraps a model for distributed training, if there are several processes.

    Gradients are views into the buckets that are sent, and buffers stay each process's own, unless `kwargs`
    say otherwise.

    Args:
        model: the model, on its device.
        fp16_compression: send gradients as float16.
        **kwargs: for `DistributedDataParallel`.
    """
    if comm.get_world_size() == 1:
        return model
    # Strided 1x1 convolutions of channels-last maps give their weights gradients whose strides differ along
    # sides of length 1 only: the same memory, of which DDP warns all the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    kwargs = {"gradient_as_bucket_view": True, "broadcast_buffers": False, **kwargs}
    if "device_ids" not in kwargs and next(model.parameters()).device.type == "cuda":
        kwargs["device_ids"] = [comm.get_local_rank()]
    with warnings.catch_warnings():
        # The name that replaces broadcast_buffers is unknown to the older releases that detlib runs on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    elif comm.get_world_size() > 2 and next(model.parameters()).device.type == "cpu":
        ddp.register_comm_hook(state=None, hook=_average_in_double)
    return ddp


def _average_in_double(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket of gradients over the processes so that the order of the sum does not show.

    DDP groups gradients anew after the first step of each run, and the order of the processes in a sum
    depends on the place in a group; so without this a resumed run on three or more would differ in the last
    bits.
    """
    whole = bucket.buffer().double()
    future = dist.all_reduce(whole, async_op=True).get_future()

    def take_mean(done: torch.futures.Future) -> torch.Tensor:
        return bucket.buffer().copy_(done.value()[0] / comm.get_world_size())

    return future.then(take_mean)
