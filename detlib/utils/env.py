"""The state of the process: random seeds and the device."""

import contextlib
import logging
import os
import random
import time
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["resolve_device", "seed_all_rng", "seeded"]

logger = logging.getLogger(__name__)

_announced: set[str] = set()


def seed_all_rng(seed: int | None = None) -> int:
    """Seeds Python's, numpy's and torch's generators (torch: all devices).

    Args:
        seed: the seed, taken modulo 2**32 where numpy needs it. None or a negative number (``cfg.SEED = -1``)
            draws a fresh one, which is logged so that the run can be repeated.

    Returns:
        The seed in use.
    """
    if seed is None or seed < 0:
        seed = (int.from_bytes(os.urandom(4), "big") ^ os.getpid() ^ time.time_ns()) % 2**31
        logger.info("Using the random seed %d, drawn for this run", seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed % 2**32)
    return seed


@contextlib.contextmanager
def seeded(seed: int | None, *, all_devices: bool = False) -> Iterator[None]:
    """Within the block, the random numbers of Python, numpy and torch depend on a seed alone; after it they
    go on as if nothing had been drawn.

    Args:
        seed: the seed, at least 0. None changes nothing.
        all_devices: also those that torch draws on other devices than the CPU. Without it these are left
            alone, as in the workers of data loaders, which must not touch a GPU.
    """
    if seed is None:
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if all_devices and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed looks for every sort of device that there might be, which takes time.
        (torch if all_devices else torch.default_generator).manual_seed(seed % 2**63)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device that a config names; ``"auto"`` is cuda, then mps, then cpu. The choice is logged
    once.

    Args:
        name: "auto" or anything that ``torch.device`` takes.

    Raises:
        ValueError: the name is unknown, or the device is not there (what is there is named).
    """
    if isinstance(name, str) and name.lower() == "auto":
        if torch.cuda.is_available():
            device, why = torch.device("cuda"), "a CUDA device is there"
        elif torch.backends.mps.is_available():
            device, why = torch.device("mps"), "no CUDA device, but MPS is there"
        else:
            device, why = torch.device("cpu"), "neither CUDA nor MPS is there"
        if device.type not in _announced:
            _announced.add(device.type)
            logger.info("MODEL.DEVICE 'auto' is %s: %s", device, why)
        return device
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"Device {name!r} is unknown; legal are 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'."
        ) from error
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "mps" and not torch.backends.mps.is_available():
        available = 0
    if (device.index or 0) >= available:
        there = f"{available} {device.type} device(s)" if available else f"no {device.type} device"
        raise ValueError(
            f"Device {str(device)!r} was asked for, but torch sees {there}. Use 'auto' or 'cpu'."
        )
    return device
