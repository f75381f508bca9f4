"""How much memory records take in loader processes.

Measured as PSS (proportional set size, Linux), in which a page that several processes share counts once in
all: what the processes hold with the records, less what they hold without.
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
    """Bytes: of the pickled records, and of what all processes together hold of them."""

    serialized: int
    records: int

    @property
    def ratio(self) -> float:
        return self.records / self.serialized


class _Records(Sequence):
    """Records like COCO's, seven objects with boxes and polygons of twenty points, made when asked for, so
    that the measured process never holds them as objects."""

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
    """Bytes of a process, shared pages counted in part; Linux only. Pages of files (libraries) are left out:
    they are no data, and their part changes with every other process that maps them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    parts = [line.split()[1] for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    if len(parts) != 2:
        raise OSError(f"/proc/{pid}/smaps_rollup lacks Pss_Anon or Pss_Shmem: the kernel is older than 5.4")
    return 1024 * sum(map(int, parts))


def _read_all(dataset: DatasetFromList, connection: Connection) -> None:
    """What a worker does: look at every record, then wait until it has been measured."""
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
    """Measure `DatasetFromList` with ``count`` records that ``workers`` processes read wholly.

    Args:
        count: number of records.
        workers: number of processes besides this one.
        start_method: of `multiprocessing`.

    Returns:
        Sizes over all processes, this one included.
    """
    few = DatasetFromList(_Records(1))  # type: ignore[arg-type]
    _held(few, 1, start_method)  # what starts on the first use (the fork server, a tracker) is no record
    before = _held(few, workers, start_method)
    dataset = DatasetFromList(_Records(count))  # type: ignore[arg-type]
    gc.collect()
    after = _held(dataset, workers, start_method)
    serialized = sum(len(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)) for record in _Records(count))
    return SharedMemory(serialized, after - before)
