"""Loaders whose position can be saved and restored.

What counts is which batches the training has taken: workers load ahead. The order is a function of the
sampler's seed, so a position is a number of batches; and a picture's random numbers are a function of its
place in that order, so a resumed run also draws the same augmentations, on any number of workers.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from .samplers.stream import EndlessSampler, StreamIndex

__all__ = ["PlacedSampler", "ResumableLoader", "place_seed"]

logger = logging.getLogger(__name__)


def place_seed(index: int) -> int | None:
    """A seed made of the place of an index in its stream; None for a plain index."""
    if not isinstance(index, StreamIndex):
        return None
    return int(np.random.SeedSequence([index.seed, index.position]).generate_state(1, np.uint64)[0])


class PlacedSampler(Sampler):
    """The indices of an endless sampler with their places, from a given one on."""

    def __init__(self, sampler: EndlessSampler):
        self.sampler = sampler
        self.again: list[StreamIndex] = []
        self.skip = 0

    def __iter__(self) -> Iterator[StreamIndex]:
        yield from self.again
        yield from self.sampler.iterate_from(self.skip)


class ResumableLoader(IterableDataset):
    """Batches of a loader, with ``state_dict`` and ``load_state_dict``.

    Each iteration begins where the restored position says, or else at the start.
    """

    def __init__(
        self,
        loader: Any,
        batch_size: int,
        sampler: PlacedSampler | None,
        is_wide: Callable[[int], bool] | None = None,
    ):
        """
        Args:
            loader: an iterable of batches.
            batch_size: number of elements of each, in this process.
            sampler: the one that ``loader`` draws from; without it the position cannot be restored.
            is_wide: with grouping by aspect ratio, the group of the element of an index.
        """
        self.dataset = loader
        self.batch_size = batch_size
        self._placed = sampler
        self._is_wide = is_wide
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
        """What the loader was built with."""
        loader = self.dataset
        while self._placed is None and not hasattr(loader, "sampler"):
            loader = getattr(loader, "dataset", None) or getattr(loader, "_dataset", None)
        return loader.sampler if self._placed is None else self._placed.sampler

    def __getattr__(self, name: str) -> Any:
        # What people ask of a DataLoader (num_workers, collate_fn, ...).
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def state_dict(self) -> dict:
        """How many batches of which stream have been taken; the same in all processes."""
        state = {"batches": self._taken, "batch_size": self.batch_size}
        if self._placed is not None:
            state["world_size"] = self._placed.sampler._world_size
            state["sampler"] = self._placed.sampler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Make the next iteration go on after the batches that were taken when ``state`` was saved.

        With another number of processes or another batch size, it goes on after as many pictures.

        Args:
            state: what `state_dict` gave, in any process of the earlier run.
        """
        placed = self._placed
        if placed is None or "sampler" not in state:
            logger.warning("The data loader has no sampler with a position: data begin anew")
            return
        sampler = placed.sampler
        sampler.load_state_dict(state["sampler"])
        placed.again, placed.skip = [], 0
        layout = self.batch_size, sampler._world_size
        saved = state["batch_size"], state["world_size"]
        if layout != saved:
            sampler.start += state["batches"] * saved[0] * saved[1]
            self._restored = self._taken = 0
            return
        self._restored = self._taken = state["batches"]
        if self._is_wide is None:
            placed.skip = state["batches"] * self.batch_size
        else:
            placed.again, placed.skip = self._replay(sampler, state["batches"])

    def _replay(self, sampler: EndlessSampler, batches: int) -> tuple[list[StreamIndex], int]:
        """Go through the stream without loading, until so many batches are full.

        Returns:
            The indices that then wait for a batch, in order, and how many were drawn.
        """
        waiting: dict[bool, list[StreamIndex]] = {True: [], False: []}
        groups: dict[int, bool] = {}
        drawn = 0
        stream = sampler.iterate_from(0)
        while batches > 0:
            index = next(stream)
            drawn += 1
            if index not in groups:
                groups[int(index)] = self._is_wide(index)
            group = waiting[groups[index]]
            group.append(index)
            if len(group) == self.batch_size:
                group.clear()
                batches -= 1
        return sorted(waiting[True] + waiting[False], key=lambda index: index.position), drawn
