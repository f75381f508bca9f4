"""Datasets built from other datasets, and loaders whose position can be saved and restored.

The position of a loader is the number of batches that the training run has consumed; workers load ahead of
it. The order is a function of the sampler's seed, and the random numbers of an element are a function of its
position in that order, so a resumed run draws the same augmentations, on any number of workers.
"""

import copy
import itertools
import logging
import operator
import pickle
import random
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from detlib.data.samplers.distributed_sampler import EndlessSampler, StreamPosition
from detlib.utils.env import seeded
from detlib.utils.serialize import PicklableWrapper

__all__ = [
    "AspectRatioGroupedDataset",
    "DatasetFromList",
    "MapDataset",
    "PositionedSampler",
    "ResumableLoader",
    "ToIterableDataset",
    "aspect_ratio_group",
    "identity",
    "unmapped",
]

logger = logging.getLogger(__name__)


class _SerializedList:
    """A list stored as the pickles of its elements, concatenated in one buffer.

    Forked processes share memory until it is written to, and Python writes to the reference count of each
    object that it reads; a list of dicts is therefore copied bit by bit into every worker. One buffer has one
    reference count. As a torch tensor it is passed to spawned processes by shared memory, too.
    """

    def __init__(self, elements: list):
        buffer = bytearray()
        ends = np.empty(len(elements), dtype=np.int64)
        for i, element in enumerate(elements):
            buffer += pickle.dumps(element, protocol=pickle.HIGHEST_PROTOCOL)
            ends[i] = len(buffer)
        self._ends = torch.from_numpy(ends)
        # frombuffer does not take an empty buffer.
        self._bytes = torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)
        logger.info("Serialized %d dataset elements into %.2f MiB", len(elements), len(buffer) / 2**20)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} elements")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index > 0 else 0
        return pickle.loads(memoryview(cast(Any, self._bytes.numpy()))[begin : int(self._ends[index])])


class DatasetFromList(Dataset):
    """A list as a map-style dataset whose memory all loader workers share."""

    def __init__(self, lst: list, copy: bool = True, serialize: bool | Callable = True):
        """
        Args:
            lst: the elements.
            copy: return deep copies, so that users may change them. Serialized elements are copies in any
                case.
            serialize: store the elements as bytes in one buffer that workers share, instead of as Python
                objects that each worker copies. A callable takes the list and returns the list-like object to
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
    """Return a description of a dataset element for error messages."""
    if not isinstance(element, dict):
        return f"a dataset element of type {type(element).__name__}"
    keys = [key for key in ("file_name", "image_id") if key in element]
    known = ", ".join(f"{key}={element[key]!r}" for key in keys)
    return f"the dataset element with {known or 'no file_name'}"


def _apply(map_func: Callable, element: Any, *others: Callable) -> Any:
    """Return ``map_func(element, *others)``; add a note about the element to an exception."""
    try:
        return map_func(element, *others)
    except Exception as error:
        error.add_note(f"This happened while loading {_describe(element)}.")
        raise


# After this many draws, MapDataset assumes that the group of an element has no other members.
_MAX_DRAWS = 1000


class MapDataset(Dataset):
    """A function applied to the elements of a dataset.

    If the function returns None, a map-style dataset returns another element, drawn at random, instead, and
    an iterable dataset skips the element. Exceptions of the function are passed on with a note that names the
    element's file.

    A function with a true attribute ``takes_others`` builds its result from several elements (as copy-paste
    does): it is called with the element and a function that draws another one at random.

    Indexed by a `StreamPosition`, as the loaders of `build_batch_data_loader` do, all random numbers follow
    from the position: they are the same on any number of workers, and in a resumed run.
    """

    def __new__(cls, dataset: Dataset, map_func: Callable):
        # DataLoader recognizes iterable datasets by their type, and `MapDataset(...)` must serve both types.
        if isinstance(dataset, IterableDataset):
            if getattr(map_func, "takes_others", False):
                raise TypeError(
                    f"MapDataset: {type(map_func).__name__} draws further elements at random, which an "
                    f"iterable dataset ({type(dataset).__name__}) cannot provide"
                )
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __init__(self, dataset: Dataset, map_func: Callable):
        """
        Args:
            dataset: a map-style or an iterable dataset; the result is of the same type.
            map_func: function of an element; may return None, see above.
        """
        self._dataset = dataset
        self._map_func = map_func
        self._others = (self._draw_element,) if getattr(map_func, "takes_others", False) else ()
        self._rng = random.Random(42)
        self._rejected: set[int] = set()
        self._group_of: Callable[[Any], Any] | None = None

    def __getnewargs__(self):
        return self._dataset, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map_func": PicklableWrapper(self._map_func)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _map_func=state["_map_func"]._obj)

    def __len__(self) -> int:
        return len(cast(Sized, self._dataset))

    def keep_groups(self, group_of: Callable[[Any], Any]) -> None:
        """Prefer one from the same group when an element has to be replaced.

        Args:
            group_of: returns the group of an element of the dataset, before the function is applied.
        """
        self._group_of = group_of

    def __getitem__(self, idx: int | StreamPosition) -> Any:
        if not isinstance(idx, StreamPosition):
            return self._load(int(idx), self._rng)
        sequence = np.random.SeedSequence([idx.seed, idx.position])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        with seeded(seed):
            return self._load(idx.index, random.Random(seed))

    def _load(self, idx: int, rng: random.Random) -> Any:
        index = idx
        tries = 0
        while True:
            data = _apply(self._map_func, self._dataset[index], *self._others)
            if data is not None:
                self._rejected.discard(index)
                return data
            self._rejected.add(index)
            tries += 1
            if tries == 3:
                logger.warning("The mapper returned None for 3 elements in a row, starting at index %d", idx)
            index = self._draw_replacement(idx, rng)

    def _draw_element(self) -> Any:
        return self._dataset[int(np.random.randint(len(cast(Sized, self._dataset))))]

    def _draw_replacement(self, idx: int, rng: random.Random) -> int:
        size = len(cast(Sized, self._dataset))
        if len(self._rejected) >= size:
            raise ValueError(
                f"the mapper returned None for all {size} elements of the dataset (requested index {idx})"
            )
        group_of = self._group_of or (lambda element: None)
        group = group_of(self._dataset[idx])
        for draws in itertools.count(1):
            index = rng.randrange(size)
            if index in self._rejected:
                continue
            if draws > _MAX_DRAWS or group_of(self._dataset[index]) == group:
                return index
        raise AssertionError("the loop above never ends")


class _MapIterableDataset(IterableDataset):
    def __init__(self, dataset: IterableDataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(cast(Sized, self._dataset))

    def __iter__(self) -> Iterator[Any]:
        for element in self._dataset:
            data = _apply(self._map_func, element)
            if data is not None:
                yield data


class ToIterableDataset(IterableDataset):
    """An iterable dataset that yields the elements of a map-style one in the order of a sampler."""

    def __init__(
        self, dataset: Dataset, sampler: Sampler, shard_sampler: bool = True, shard_chunk_size: int = 1
    ):
        """
        Args:
            dataset: map-style dataset.
            sampler: yields indices into it.
            shard_sampler: split the sampler's indices across loader workers. If False, every worker iterates
                over all of them, as a sampler that handles workers itself needs.
            shard_chunk_size: number of consecutive indices of one worker.
        """
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"ToIterableDataset: dataset must be map-style, got the iterable {type(dataset).__name__}"
            )
        if not isinstance(sampler, Sampler):
            raise TypeError(f"ToIterableDataset: sampler must be a Sampler, got {type(sampler).__name__}")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shard_sampler else None
        for position, index in enumerate(self.sampler):
            if worker is None or position // self.shard_chunk_size % worker.num_workers == worker.id:
                yield self.dataset[index]


def aspect_ratio_group(record: Any) -> bool | None:
    """Return whether a record's image is wider than high; None if the record does not have its size."""
    if not isinstance(record, dict) or not {"width", "height"} <= set(record):
        return None
    return record["width"] > record["height"]


class AspectRatioGroupedDataset(IterableDataset):
    """Batches of images that are all wider than high, or all not, so that little padding is needed.

    The order of the images changes as little as possible. Images left over at the end of a finite dataset are
    dropped.
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


def identity(element: Any) -> Any:
    """Return ``element``: the ``collate_fn`` of a loader that yields single elements."""
    return element


def unmapped(dataset: Dataset) -> Dataset:
    """Return the dataset that a chain of `MapDataset` starts from."""
    while isinstance(dataset, MapDataset):
        dataset = dataset._dataset
    return dataset


class PositionedSampler(Sampler):
    """The indices of an endless sampler from a restored position on."""

    def __init__(self, sampler: EndlessSampler, with_positions: bool):
        """
        Args:
            sampler: the endless sampler.
            with_positions: yield each index as a `StreamPosition`, as `MapDataset` takes them, or as an int.
        """
        self.sampler = sampler
        self.with_positions = with_positions
        self.pending: list[StreamPosition] = []
        self.skip = 0

    def __iter__(self) -> Iterator[StreamPosition | int]:
        stream = itertools.chain(self.pending, self.sampler.iterate_from(self.skip))
        return stream if self.with_positions else map(operator.attrgetter("index"), stream)


class ResumableLoader(IterableDataset):
    """Batches of a loader, with ``state_dict`` and ``load_state_dict``.

    Each iteration begins at the restored position, or else at the start.
    """

    def __init__(
        self,
        loader: Any,
        batch_size: int,
        sampler: PositionedSampler | None,
        grouped_dataset: Dataset | None = None,
    ):
        """
        Args:
            loader: an iterable of batches.
            batch_size: number of elements of each batch, in this process.
            sampler: the one that ``loader`` draws from; without it the position cannot be restored.
            grouped_dataset: with grouping by aspect ratio, the dataset of records that the indices refer to.
        """
        self.dataset = loader
        self.batch_size = batch_size
        self._positioned = sampler
        self._grouped_dataset = grouped_dataset
        self._restored = 0
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:
        self._taken = self._restored
        for batch in self.dataset:
            self._taken += 1
            yield batch

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sampler(self) -> Sampler | None:
        """The sampler that the loader was built with."""
        if self._positioned is not None:
            return self._positioned.sampler
        loader: Any = self.dataset
        while not hasattr(loader, "sampler"):
            loader = getattr(loader, "dataset", None) or getattr(loader, "_dataset", None)
        return loader.sampler

    def __getattr__(self, name: str) -> Any:
        # Attributes of a DataLoader (num_workers, collate_fn, ...).
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def state_dict(self) -> dict:
        """Return how many batches of which stream have been taken; the same in all processes."""
        state: dict[str, Any] = {"batches": self._taken, "batch_size": self.batch_size}
        if self._positioned is not None:
            state["world_size"] = self._positioned.sampler._world_size
            state["sampler"] = self._positioned.sampler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Let the next iteration resume after the batches that were taken when ``state`` was saved.

        With another number of processes or another batch size, it resumes after the same number of images.

        Args:
            state: what `state_dict` returned, in any process of the earlier run.
        """
        positioned = self._positioned
        if positioned is None or "sampler" not in state:
            logger.warning("The data loader has no sampler with a position: data start from the beginning")
            return
        sampler = positioned.sampler
        sampler.load_state_dict(state["sampler"])
        positioned.pending, positioned.skip = [], 0
        layout = self.batch_size, sampler._world_size
        saved = state["batch_size"], state["world_size"]
        if layout != saved:
            sampler.start += state["batches"] * saved[0] * saved[1]
            self._restored = self._taken = 0
            return
        self._restored = self._taken = state["batches"]
        if self._grouped_dataset is None:
            positioned.skip = state["batches"] * self.batch_size
        else:
            positioned.pending, positioned.skip = self._replay(sampler, state["batches"])

    def _replay(self, sampler: EndlessSampler, batches: int) -> tuple[list[StreamPosition], int]:
        """Follow the stream without loading until ``batches`` batches are full.

        Returns:
            The positions that wait for a batch by then, in order, and how many were drawn.
        """
        waiting: dict[bool, list[StreamPosition]] = {True: [], False: []}
        groups: dict[int, bool] = {}
        drawn = 0
        stream = sampler.iterate_from(0)
        while batches > 0:
            entry = next(stream)
            drawn += 1
            if entry.index not in groups:
                groups[entry.index] = self._is_wide(entry.index)
            group = waiting[groups[entry.index]]
            group.append(entry)
            if len(group) == self.batch_size:
                group.clear()
                batches -= 1
        return sorted(waiting[True] + waiting[False], key=operator.attrgetter("position")), drawn

    def _is_wide(self, index: int) -> bool:
        group = aspect_ratio_group(cast(Dataset, self._grouped_dataset)[index])
        if group is None:
            raise ValueError(
                "a loader with aspect_ratio_grouping can resume at a saved position only if the records have "
                f"'width' and 'height'; element {index} has none"
            )
        return group
