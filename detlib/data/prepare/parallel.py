"""Processing many files in multiple processes, and writing the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from detlib.utils.atomic_write import write_bytes_atomically

__all__ = ["check_folder", "check_workers", "missing", "run_jobs", "write_png"]


def check_workers(workers: int | None) -> int:
    """Return the number of processes; None means the number of processors."""
    if workers is None:
        return os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return workers


def check_folder(path: str, what: str) -> None:
    """Raise FileNotFoundError if a folder does not exist."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"The folder of {what}, {path!r}, does not exist.")


def missing(jobs: Sequence[tuple], overwrite: bool) -> list[tuple]:
    """Return the jobs whose second entry, the file to write, does not exist; with `overwrite` all."""
    return [job for job in jobs if overwrite or not os.path.exists(job[1])]


def run_jobs(function: Callable[..., Any], jobs: Sequence[tuple], workers: int, what: str) -> list[Any]:
    """Call `function(*job)` for each job in multiple processes, with a progress bar.

    Args:
        function: a function that can be imported by name.
        jobs: the arguments of each call.
        workers: number of processes; with 1, the calls run in this process.
        what: title of the progress bar.

    Returns:
        The results in the order of `jobs`.
    """
    if workers == 1 or len(jobs) < 2:
        return [function(*job) for job in tqdm(jobs, desc=what, unit="file")]
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        chunk = max(1, min(16, len(jobs) // (4 * workers)))
        results = pool.map(function, *zip(*jobs), chunksize=chunk)
        return list(tqdm(results, total=len(jobs), desc=what, unit="file"))


def write_png(path: str, pixels: np.ndarray) -> None:
    """Write a uint8 array as a PNG atomically."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_bytes_atomically(path, lambda file: Image.fromarray(pixels).save(file, "PNG"))
