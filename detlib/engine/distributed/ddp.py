"""Wrapping of a model for training: DDP, parameter sharding (FSDP2) and torch.compile."""

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

__all__ = ["compile_parts", "create_ddp_model", "first_process_buffers", "shard_model", "gathered_parameters"]

logger = logging.getLogger(__name__)

# Modules whose parameters `gathered_parameters` has gathered.
_gathered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_parts(model: nn.Module, names: Iterable[str] = (), backend: str = "inductor") -> list[str]:
    """Compile submodules with torch.compile on first use, for images of any size.

    Parameter names do not change.

    Args:
        model: the model.
        names: submodules, as in ``model.get_submodule``; () for those of `MetaArchitecture.compile_modules`
            that the model has.
        backend: as in `torch.compile`.

    Returns:
        The names of the compiled submodules.

    Raises:
        ValueError: if the model has no submodule of a given name.
    """
    parts = dict(model.named_modules())
    chosen = list(names) or [name for name in facts_of(model).compile_modules if name in parts]
    for name in chosen:
        if name not in parts:
            near = ", ".join(near_names(name, parts)) or ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"TRAIN.COMPILE.MODULES: the model has no submodule '{name}'; similar: {near}")
        parts[name].compile(backend=backend, dynamic=True)
    logger.info("Compiling %s with torch.compile (%s); the first steps are slow", ", ".join(chosen), backend)
    return chosen


def shard_model(model: nn.Module) -> nn.Module:
    """Shard parameters, and thereby gradients and optimizer state, across all processes (FSDP2).

    Each block of the backbone is gathered when it runs, the rest of the model as one unit. See
    `torch.distributed.fsdp.fully_shard`. Build the optimizer after this.

    Args:
        model: the model, on its device; modified in-place.

    Raises:
        RuntimeError: if there is no process group.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise RuntimeError(
            "TRAIN.STRATEGY 'fsdp' shards a model across processes: start more than one with --num-gpus or "
            "torchrun, or use 'ddp'"
        )
    with torch.no_grad():
        # Each process has drawn its own initial weights; all use those of rank 0, as in DDP.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor, 0)
    device = next(model.parameters()).device.type
    mesh = dist.device_mesh.init_device_mesh(device, (comm.get_world_size(),))
    for block in find_backbone_blocks(model):
        fully_shard(block, mesh=mesh)
    # By default, parameters outside of the blocks stay gathered between the forward and the backward pass.
    # Evaluation has no backward pass, and checkpoints and weight averages need the shards after it.
    return cast(nn.Module, fully_shard(model, mesh=mesh, reshard_after_forward=True))


@contextlib.contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Context manager that gathers all parameters of a model of `shard_model`; other models do not change.

    Processes evaluate different numbers of images, so they cannot gather parameters in each forward pass.
    Nested use has no effect.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in model.modules() if isinstance(m, FSDPModule) and m not in _gathered]
    _gathered.update(parts)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
        _gathered.difference_update(parts)


@contextlib.contextmanager
def first_process_buffers(model: nn.Module) -> Iterator[None]:
    """Context manager in which all processes have the buffers of rank 0, which are those in checkpoints.

    BatchNorm layers have the statistics of their own process's images, but a distributed evaluation must
    evaluate one model, the one that is saved. All processes must call this.

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
    """Wrap a model in DistributedDataParallel if there are multiple processes.

    Unlike DDP's defaults, gradients are views into the communication buckets, and buffers are not broadcast.

    Args:
        model: the model, on its device.
        fp16_compression: communicate gradients as float16.
        **kwargs: arguments of `DistributedDataParallel`.
    """
    if comm.get_world_size() == 1:
        return model
    # With channels-last inputs, strided 1x1 convolutions have weight gradients whose strides differ in
    # dimensions of size 1 only. The memory layout is the same, but DDP warns.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    kwargs = {"gradient_as_bucket_view": True, "broadcast_buffers": False, **kwargs}
    if "device_ids" not in kwargs and next(model.parameters()).device.type == "cuda":
        kwargs["device_ids"] = [comm.get_local_rank()]
    with warnings.catch_warnings():
        # The older torch releases that detlib supports lack the replacement of broadcast_buffers.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    elif comm.get_world_size() > 2 and next(model.parameters()).device.type == "cpu":
        ddp.register_comm_hook(state=None, hook=_average_in_double)
    return ddp


def _average_in_double(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients in float64, so that the result does not depend on the summation order.

    DDP rebuilds its buckets after the first step of each run, and the summation order depends on the position
    in a bucket. In float32, a resumed run on three or more processes would differ in the last bits.
    """
    total = bucket.buffer().double()
    future = dist.all_reduce(total, async_op=True).get_future()

    def take_mean(done: torch.futures.Future) -> torch.Tensor:
        return bucket.buffer().copy_(done.value()[0] / comm.get_world_size())

    return future.then(take_mean)
