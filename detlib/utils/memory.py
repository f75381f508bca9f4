"""A second and third try for functions that ran out of GPU memory."""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["retry_if_cuda_oom"]

logger = logging.getLogger(__name__)
R = TypeVar("R")


@contextlib.contextmanager
def _catch_cuda_oom():
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        pass  # the caller tries again
    except RuntimeError as error:
        # Out of a compiled operator every error comes as a RuntimeError.
        if "CUDA out of memory" not in str(error):
            raise


def _to_cpu(value: Any) -> Any:
    """Moves what can be moved (tensors, boxes, instances) off the GPU; containers one by one."""
    device = getattr(value, "device", None)
    if getattr(device, "type", None) == "cuda" and hasattr(value, "to"):
        return value.to(device="cpu")
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def retry_if_cuda_oom(func: Callable[..., R]) -> Callable[..., R]:
    """Wraps `func` so that CUDA running out of memory does not end the run.

    It is called again with the CUDA cache emptied, and if that fails too, with its arguments on the CPU. The
    result is then on the CPU as well: move it back if the next step needs it on the GPU. `func` should be
    stateless and should take its large tensors as arguments. Arguments are moved in (nested) dicts, lists and
    tuples, and wherever they have ``.device`` and ``.to``.
    """

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        with _catch_cuda_oom():
            return func(*args, **kwargs)
        torch.cuda.empty_cache()
        with _catch_cuda_oom():
            return func(*args, **kwargs)
        name = getattr(func, "__qualname__", repr(func))
        logger.info("CUDA is out of memory in %s: it now runs on the CPU", name)
        return func(*_to_cpu(args), **_to_cpu(kwargs))

    return wrapped
