"""Peak memory, and retries of functions that run out of GPU memory."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["peak_memory", "retry_if_cuda_oom"]

logger = logging.getLogger(__name__)
R = TypeVar("R")


def peak_memory() -> str:
    """Return "max_mem: ..." in MiB, the peak of CUDA tensors if CUDA is in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return f"max_mem: {peak / unit:.0f}M (process)"


@contextlib.contextmanager
def _catch_cuda_oom():
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        pass  # the caller tries again
    except RuntimeError as error:
        # Compiled operators raise every error as a RuntimeError.
        if "CUDA out of memory" not in str(error):
            raise


def _to_cpu(value: Any) -> Any:
    """Move tensors, boxes and instances to the CPU, also those inside containers."""
    device = getattr(value, "device", None)
    if getattr(device, "type", None) == "cuda" and hasattr(value, "to"):
        return value.to(device="cpu")
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def retry_if_cuda_oom(func: Callable[..., R]) -> Callable[..., R]:
    """Wrap `func` so that running out of CUDA memory does not end the run.

    On failure, `func` is called again with the CUDA cache emptied; if that fails too, with its arguments on
    the CPU. The result is then on the CPU as well: move it back if the GPU needs it. `func` should
    be stateless and take its large tensors as arguments. Arguments are moved in (nested) dicts, lists and
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
        logger.info("CUDA is out of memory in %s: running it on the CPU", name)
        return func(*_to_cpu(args), **_to_cpu(kwargs))

    return wrapped
