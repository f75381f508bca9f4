"""Measuring how much memory records take in loader processes.

The measure is the PSS (proportional set size, Linux), which counts a page that several processes share once
in
all: the PSS of the processes with the records minus their PSS without.
"""

import gc
import multiprocessing
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from detlib.data.common import DatasetFromList
from detlib.structures import BoxMode

__all__ = ["SharedMemory", "measure"]


@dataclass
class SharedMemory:
    """Size of the pickled records, and memory that they take in all processes together, in bytes."""

    serialized: int
    records: int

    @property
    def ratio(self) -> float:
        return self.records / self.serialized


class _Records(Sequence):
    """Records like COCO's, with seven objects that have a box and a polygon of twenty points.

    They are created on access, so that the measured process never holds them as objects.
    """

    def __init__(self, count: int):
        self._count = count
        self._polygons = np.random.default_rng(0).uniform(0, 640, (64, 40)).round(2).tolist()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        if index >= self._count:
            raise IndexError(index)
        annotations = []
        for k in range(7):
            polygon = [value + k for value in self._polygons[(index + 3 * k) % 64]]
            annotations.append(
                {
                    "bbox": polygon[:4],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": (index + k) % 80,
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        name = f"datasets/coco/train2017/{index:012d}.jpg"
        return {
            "file_name": name,
            "image_id": index,
            "height": 480,
            "width": 640,
            "annotations": annotations,
        }


def pss(pid: int | str = "self") -> int:
    """Return the PSS of a process in bytes; Linux only.

    Pages of files (libraries) are left out: they are not data, and their share changes with every other
    process that maps them.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    parts = [line.split()[1] for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    if len(parts) != 2:
        raise OSError(f"/proc/{pid}/smaps_rollup lacks Pss_Anon or Pss_Shmem: the kernel is older than 5.4")
    return 1024 * sum(map(int, parts))


def _read_all(dataset: DatasetFromList, connection: Connection) -> None:
    """Do what a worker does: read every record, then wait until the memory has been measured."""
    for index in range(len(dataset)):
        dataset[index]
    gc.collect()
    connection.send("ready")
    connection.recv()


def _held(dataset: DatasetFromList, workers: int, start_method: str) -> int:
    context: Any = multiprocessing.get_context(start_method)
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=_read_all, args=(dataset, there), daemon=True) for _, there in pipes]
    try:
        for process in processes:
            process.start()
        for here, _ in pipes:
            here.recv()
        return pss() + sum(pss(process.pid) for process in processes)
    finally:
        for here, _ in pipes:
            here.send("done")
        for process in processes:
            process.join()


def measure(count: int, workers: int, start_method: str = "fork") -> SharedMemory:
    """Measure `DatasetFromList` with ``count`` records that ``workers`` processes read completely.

    Args:
        count: number of records.
        workers: number of processes in addition to this one.
        start_method: start method of `multiprocessing`.

    Returns:
        Sizes over all processes, including this one.
    """
    few = DatasetFromList(_Records(1))  # type: ignore[arg-type]
    _held(few, 1, start_method)  # starts what the first use starts (the fork server, a tracker)
    before = _held(few, workers, start_method)
    dataset = DatasetFromList(_Records(count))  # type: ignore[arg-type]
    gc.collect()
    after = _held(dataset, workers, start_method)
    serialized = sum(len(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)) for record in _Records(count))
    return SharedMemory(serialized, after - before)
