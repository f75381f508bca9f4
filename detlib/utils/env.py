"""Random seeds and the device of the process."""

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["available_cpus", "limit_threads", "resolve_device", "seed_all_rng", "seeded"]

logger = logging.getLogger(__name__)

_announced: set[str] = set()


def available_cpus(cgroup: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return how many CPUs this process may use: its affinity and the quota of its container count.

    Args:
        cgroup: the file with quota and period of the container (cgroup v2).
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(cgroup) as f:
            quota, period = f.read().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no container, or cgroup v1
    return max(1, count)


def limit_threads() -> None:
    """Use no more threads than there are CPUs for this process, and warn if others use these CPUs.

    OMP_NUM_THREADS, if set, is kept.
    """
    cpus = available_cpus()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cpus:
        logger.info("Using %d threads instead of %d, as many as CPUs", cpus, torch.get_num_threads())
        torch.set_num_threads(cpus)
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on this system
        return
    # The load is that of the machine, of which a container may have only a part.
    machine = os.cpu_count() or 1
    if load > 1.5 * machine:
        logger.warning(
            "This machine is overcommitted: a load of %.1f on %d CPUs before training. Steps on the CPU and "
            "data loading will be slow. Fewer threads (OMP_NUM_THREADS=1), a passive wait policy "
            "(OMP_WAIT_POLICY=passive, now %s) and fewer data loader workers help",
            load,
            machine,
            os.environ.get("OMP_WAIT_POLICY", "not set"),
        )


def seed_all_rng(seed: int | None = None) -> int:
    """Seed the generators of Python, numpy and torch (on all devices).

    Args:
        seed: the seed, modulo 2**32 for numpy. None or a negative number (``cfg.SEED = -1``) draws a random
            seed, which is logged so that the run can be reproduced.

    Returns:
        The seed.
    """
    if seed is None or seed < 0:
        seed = (int.from_bytes(os.urandom(4), "big") ^ os.getpid() ^ time.time_ns()) % 2**31
        logger.info("Using the randomly drawn seed %d", seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed % 2**32)
    return seed


@contextlib.contextmanager
def seeded(seed: int | None, *, all_devices: bool = False) -> Iterator[None]:
    """Context manager that seeds Python, numpy and torch, and restores their states on exit.

    Args:
        seed: the seed, at least 0. None has no effect.
        all_devices: also seed torch's generators of devices other than the CPU. Data-loader workers, which
            must not touch a GPU, leave these alone.
    """
    if seed is None:
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if all_devices and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed checks for every type of device, which takes time.
        (torch if all_devices else torch.default_generator).manual_seed(seed % 2**63)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device that a config names. ``"auto"`` chooses cuda, mps or cpu and logs the choice once.

    Args:
        name: "auto" or anything that ``torch.device`` accepts.

    Raises:
        ValueError: if the name is unknown or the device is not available; the message has the number of
            available devices.
    """
    if isinstance(name, str) and name.lower() == "auto":
        if torch.cuda.is_available():
            device, why = torch.device("cuda"), "CUDA is available"
        elif torch.backends.mps.is_available():
            device, why = torch.device("mps"), "CUDA is not available, but MPS is"
        else:
            device, why = torch.device("cpu"), "neither CUDA nor MPS is available"
        if device.type not in _announced:
            _announced.add(device.type)
            logger.info("MODEL.DEVICE 'auto' selects %s: %s", device, why)
        return device
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"Unknown device {name!r}; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "mps" and not torch.backends.mps.is_available():
        available = 0
    if (device.index or 0) >= available:
        there = f"{available} {device.type} device(s)" if available else f"no {device.type} device"
        raise ValueError(
            f"Device {str(device)!r} was requested, but torch sees {there}. Use 'auto' or 'cpu'."
        )
    return device
