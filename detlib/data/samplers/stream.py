"""Endless streams of indices that all processes share, and whose position can be saved and restored."""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from detlib.utils import comm

__all__ = ["EndlessSampler", "StreamIndex", "check_size", "resolve_seed"]


def check_size(owner: str, size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{owner}: size must be an int, got {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{owner}: size must be positive, got {size}")


def resolve_seed(seed: int | None) -> int:
    """``seed``, or, for None or a negative one, a random seed that all processes share."""
    return comm.shared_random_seed() if seed is None or seed < 0 else int(seed)


class StreamIndex(int):
    """An index that knows its place in a stream, so that what is random about its element depends on nothing
    else.

    Attributes:
        seed: of the stream.
        position: in the stream of all processes together.
    """

    seed: int
    position: int

    def __new__(cls, index: int, seed: int, position: int):
        made = super().__new__(cls, index)
        made.seed = seed
        made.position = position
        return made

    def __reduce__(self):
        return StreamIndex, (int(self), self.seed, self.position)


class EndlessSampler(Sampler):
    """An endless stream of indices, made of epochs, shared out between the processes.

    Attributes:
        start: position in the stream of all processes together at which iteration begins; set it before
            iterating, to go on where an earlier run stopped.
    """

    def __init__(self, seed: int | None):
        self._seed = resolve_seed(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()
        self.start = 0

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        """The (L,) int64 indices of the next epoch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _draw_epoch")

    def _stream(self, start: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        skip = start
        while True:
            indices = self._draw_epoch(generator)
            if skip < len(indices):
                yield from indices[skip:].tolist()
            skip = max(skip - len(indices), 0)

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._stream(self.start), self._rank, None, self._world_size)

    def iterate_from(self, count: int) -> Iterator[StreamIndex]:
        """The stream of this process without its first ``count`` indices, each with its place."""
        begin = self.start + count * self._world_size
        mine = itertools.islice(self._stream(begin), self._rank, None, self._world_size)
        for position, index in zip(itertools.count(begin + self._rank, self._world_size), mine):
            yield StreamIndex(index, self._seed, position)

    def state_dict(self) -> dict[str, int]:
        """The seed, also one that was drawn, and ``start``: with them another process gives the same stream.

        How far a loader has come is known to the loader, which draws ahead; see
        `detlib.data.resume.ResumableLoader`.
        """
        return {"seed": self._seed, "start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the seed and the start of a saved sampler."""
        if missing := {"seed", "start"} - set(state):
            raise KeyError(f"{type(self).__name__}: the saved state lacks {sorted(missing)}")
        self._seed, self.start = int(state["seed"]), int(state["start"])
