"""Datasets made of other datasets, and the sharing of data between loader processes."""

import copy
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from detlib.utils.env import seeded
from detlib.utils.serialize import PicklableWrapper

from .resume import place_seed

__all__ = ["AspectRatioGroupedDataset", "DatasetFromList", "MapDataset", "ToIterableDataset"]

logger = logging.getLogger(__name__)


class _SerializedList:
    """A list kept as the pickles of its elements, one after the other in one buffer.

    Forked processes share memory until it is written to, and Python writes the reference count of each object
    it looks at; a list of dicts is therefore copied bit by bit into every worker that reads it. One buffer
    has one count. As a torch tensor it also travels to spawned processes by shared memory.
    """

    def __init__(self, elements: list):
        buffer = bytearray()
        ends = np.empty(len(elements), dtype=np.int64)
        for i, element in enumerate(elements):
            buffer += pickle.dumps(element, protocol=pickle.HIGHEST_PROTOCOL)
            ends[i] = len(buffer)
        self._ends = torch.from_numpy(ends)
        # frombuffer refuses an empty buffer.
        self._bytes = torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)
        logger.info("Serialized %d dataset elements into %.2f MiB", len(elements), len(buffer) / 2**20)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} elements")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index > 0 else 0
        return pickle.loads(memoryview(self._bytes.numpy())[begin : int(self._ends[index])])


class DatasetFromList(Dataset):
    """A list as a map-style dataset, held once for all loader workers."""

    def __init__(self, lst: list, copy: bool = True, serialize: bool | Callable = True):
        """
        Args:
            lst: the elements.
            copy: return deep copies, so that users may change them. Elements that were serialized are fresh
                ones in any case.
            serialize: keep the elements as bytes in one buffer that workers share, instead of as Python
                objects that each of them copies. A callable takes the list and returns a list-like object to
                use.
        """
        self._copy = copy
        self._serialize = serialize
        if callable(serialize):
            self._lst = serialize(lst)
        else:
            self._lst = _SerializedList(lst) if serialize else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        element = self._lst[idx]
        return copy.deepcopy(element) if self._copy and not self._serialize else element


def _describe(element: Any) -> str:
    """What to say about a dataset element in an error."""
    if not isinstance(element, dict):
        return f"a dataset element of type {type(element).__name__}"
    keys = [key for key in ("file_name", "image_id") if key in element]
    known = ", ".join(f"{key}={element[key]!r}" for key in keys)
    return f"the dataset element with {known or 'no file_name'}"


def _apply(map_func: Callable, element: Any, *others: Callable) -> Any:
    """``map_func(element, *others)``; an exception gets a note about the element and goes on its way."""
    try:
        return map_func(element, *others)
    except Exception as error:
        error.add_note(f"This happened while loading {_describe(element)}.")
        raise


# So often `MapDataset` looks for an element of the same group; then the group is taken to have no others.
_MOST_DRAWS = 1000


class MapDataset(Dataset):
    """A function applied to the elements of a dataset.

    Where the function returns None, a map-style dataset gives another element, drawn at random, in its place,
    and an iterable dataset skips the element. An exception of the function is never swallowed: it is passed
    on with a note that names the element's file.

    A function with a true attribute ``takes_others`` makes its result of several elements (as copy-paste
    does): it is called with the element and a function that draws a further one at random.

    Where indices know their place in a sampler's stream, as those of `build_batch_data_loader` do, all random
    numbers follow from the place: they are the same on any number of workers, and in a resumed run.
    """

    def __new__(cls, dataset: Dataset, map_func: Callable):
        if isinstance(dataset, IterableDataset):
            if getattr(map_func, "takes_others", False):
                raise TypeError(
                    f"MapDataset: {type(map_func).__name__} takes further elements at random, which an "
                    f"iterable dataset ({type(dataset).__name__}) cannot give"
                )
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self):
        return self._dataset, self._map_func

    def __init__(self, dataset: Dataset, map_func: Callable):
        """
        Args:
            dataset: a map-style or an iterable dataset; the result is of the same kind.
            map_func: takes an element; may return None, see above.
        """
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._others = (self._draw_element,) if getattr(map_func, "takes_others", False) else ()
        self._rng = random.Random(42)
        self._refused: set[int] = set()
        self._group_of: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def keep_groups(self, group_of: Callable[[Any], Any]) -> None:
        """Let what is given in place of an element be one of its group, if such can be found.

        Args:
            group_of: the group of an element of the dataset, before the function is applied.
        """
        self._group_of = group_of

    def __getitem__(self, idx: int) -> Any:
        seed = place_seed(idx)
        with seeded(seed):
            return self._load(int(idx), self._rng if seed is None else random.Random(seed))

    def _load(self, idx: int, rng: random.Random) -> Any:
        index = idx
        tries = 0
        while True:
            data = _apply(self._map_func, self._dataset[index], *self._others)
            if data is not None:
                self._refused.discard(index)
                return data
            self._refused.add(index)
            tries += 1
            if tries == 3:
                logger.warning("The mapper returned None for 3 elements in a row, from index %d on", idx)
            index = self._draw_other(idx, rng)

    def _draw_element(self) -> Any:
        return self._dataset[int(np.random.randint(len(self._dataset)))]

    def _draw_other(self, idx: int, rng: random.Random) -> int:
        size = len(self._dataset)
        if len(self._refused) >= size:
            raise ValueError(
                f"the mapper returned None for all {size} elements of the dataset (asked for index {idx})"
            )
        group_of = self._group_of or (lambda element: None)
        group = group_of(self._dataset[idx])
        drawn = 0
        while True:
            index = rng.randrange(size)
            drawn += 1
            if index in self._refused:
                continue
            if drawn > _MOST_DRAWS or group_of(self._dataset[index]) == group:
                return index


class _MapIterableDataset(IterableDataset):
    def __init__(self, dataset: IterableDataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        for element in self._dataset:
            data = _apply(self._map_func, element)
            if data is not None:
                yield data


class ToIterableDataset(IterableDataset):
    """A map-style dataset as an iterable one, in the order of a sampler."""

    def __init__(
        self, dataset: Dataset, sampler: Sampler, shard_sampler: bool = True, shard_chunk_size: int = 1
    ):
        """
        Args:
            dataset: map-style dataset.
            sampler: yields indices into it.
            shard_sampler: share the sampler's indices out between loader workers. Without it every worker
                goes through all of them, as is right for a sampler that knows of workers itself.
            shard_chunk_size: number of consecutive indices that go to one worker.
        """
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"ToIterableDataset: dataset is iterable already: {type(dataset).__name__}")
        if not isinstance(sampler, Sampler):
            raise TypeError(f"ToIterableDataset: sampler must be a Sampler, got {type(sampler).__name__}")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shard_sampler else None
        for position, index in enumerate(self.sampler):
            if worker is None or position // self.shard_chunk_size % worker.num_workers == worker.id:
                yield self.dataset[index]


class AspectRatioGroupedDataset(IterableDataset):
    """Batches of pictures that are all wider than high, or all not, so that little padding is needed.

    The order of the pictures changes as little as that allows. Pictures that are left over at the end of a
    finite dataset are dropped.
    """

    def __init__(self, dataset: Any, batch_size: int):
        """
        Args:
            dataset: iterable of dicts with "width" and "height".
            batch_size: number of dicts of each batch.
        """
        self.dataset = dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[dict]]:
        wide: list[dict] = []
        high: list[dict] = []
        for element in self.dataset:
            group = wide if element["width"] > element["height"] else high
            group.append(element)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()
