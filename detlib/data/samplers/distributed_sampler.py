"""Samplers: which images, in which order, and which of them in which process.

For training, all processes follow one endless stream of indices, epoch after epoch, and each takes every n-th
index, so that with a fixed seed a step sees the same images on any number of processes. The stream depends on
the seed alone and can be entered at any position, at the cost of drawing the indices of the epochs before it.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from detlib.utils import comm

__all__ = [
    "ClassAwareTrainingSampler",
    "EndlessSampler",
    "InferenceSampler",
    "MultiDatasetTrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "StreamPosition",
    "TrainingSampler",
    "build_train_sampler",
]

logger = logging.getLogger(__name__)


def check_size(owner: str, size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{owner}: size must be an int, got {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{owner}: size must be positive, got {size}")


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``; if it is None or negative, a random seed that all processes share."""
    return comm.shared_random_seed() if seed is None or seed < 0 else int(seed)


class StreamPosition(NamedTuple):
    """An index and its position in a sampler's stream, which seeds the random numbers of its element.

    Attributes:
        index: index into the dataset.
        seed: seed of the stream.
        position: position of the index in the stream of all processes together.
    """

    index: int  # type: ignore[assignment]  # hides `tuple.index`
    seed: int
    position: int


class EndlessSampler(Sampler):
    """An endless stream of indices, epoch after epoch, split across the processes.

    Attributes:
        start: position in the stream of all processes together at which iteration starts; set it before
            iterating to resume where an earlier run stopped.
    """

    def __init__(self, seed: int | None):
        self._seed = resolve_seed(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()
        self.start = 0

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        """Return the (L,) int64 indices of the next epoch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _draw_epoch")

    def _epochs(self, start: int) -> Iterator[list[int]]:
        """Yield the indices of one epoch after the other, from position ``start`` of the stream on."""
        generator = torch.Generator().manual_seed(self._seed)
        skip = start
        while True:
            indices = self._draw_epoch(generator)
            if skip < len(indices):
                yield indices[skip:].tolist()
            skip = max(skip - len(indices), 0)

    def _local_stream(self, start: int) -> Iterator[int]:
        stream = itertools.chain.from_iterable(self._epochs(start))
        return itertools.islice(stream, self._rank, None, self._world_size)

    def __iter__(self) -> Iterator[int]:
        return self._local_stream(self.start)

    def iterate_from(self, count: int) -> Iterator[StreamPosition]:
        """Return the stream of this process without its first ``count`` indices, each with its position."""
        begin = self.start + count * self._world_size
        positions = itertools.count(begin + self._rank, self._world_size)
        return map(StreamPosition, self._local_stream(begin), itertools.repeat(self._seed), positions)

    def state_dict(self) -> dict[str, int]:
        """Return the seed, also a random one, and ``start``, which reproduce the stream in another process.

        The position within the stream belongs to the loader, which draws ahead; see
        `detlib.data.common.ResumableLoader`.
        """
        return {"seed": self._seed, "start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the seed and the start of a saved sampler."""
        if missing := {"seed", "start"} - set(state):
            raise KeyError(f"{type(self).__name__}: the saved state lacks {sorted(missing)}")
        self._seed, self.start = int(state["seed"]), int(state["start"])


class TrainingSampler(EndlessSampler):
    """Endless stream of epochs, each a fresh shuffle of all indices."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        """
        Args:
            size: number of elements of the dataset.
            shuffle: whether to shuffle each epoch.
            seed: seed of the shuffle, equal in all processes. None or a negative one (``cfg.SEED = -1``)
                draws another order in each run.
        """
        check_size(type(self).__name__, size)
        super().__init__(seed)
        self._size = size
        self._shuffle = shuffle

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self._size, generator=generator) if self._shuffle else torch.arange(self._size)


class RandomSubsetTrainingSampler(TrainingSampler):
    """A `TrainingSampler` on a random subset of the dataset, which is drawn once."""

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        """
        Args:
            size: number of elements of the dataset.
            subset_ratio: fraction of the dataset to use, in (0, 1].
            shuffle: whether to shuffle each epoch.
            seed_shuffle: seed of the shuffle, see `TrainingSampler`.
            seed_subset: seed of the choice of the subset, see `TrainingSampler`.
        """
        if not 0.0 < subset_ratio <= 1.0:
            raise ValueError(f"{type(self).__name__}: subset_ratio must be in (0, 1], got {subset_ratio}")
        super().__init__(size=size, shuffle=shuffle, seed=seed_shuffle)
        self._size_subset = int(size * subset_ratio)
        if self._size_subset == 0:
            raise ValueError(
                f"RandomSubsetTrainingSampler: subset_ratio {subset_ratio} of {size} elements leaves none"
            )
        self._choose(resolve_seed(seed_subset))

    def _choose(self, seed: int) -> None:
        self._seed_subset = seed
        generator = torch.Generator().manual_seed(seed)
        self._subset = torch.randperm(self._size, generator=generator)[: self._size_subset]

    def state_dict(self) -> dict[str, int]:
        return super().state_dict() | {"seed_subset": self._seed_subset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self._choose(state["seed_subset"])

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        if not self._shuffle:
            return self._subset
        return self._subset[torch.randperm(self._size_subset, generator=generator)]


class RepeatFactorTrainingSampler(EndlessSampler):
    """Endless stream in which images with rare categories occur more often.

    Paper: "LVIS: A Dataset for Large Vocabulary Instance Segmentation" (https://arxiv.org/abs/1908.03195),
    appendix B.2.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None):
        """
        Args:
            repeat_factors: (N,) float, how often each element occurs in an epoch on average: the fractional
                part is the probability of one more repetition.
            shuffle: whether to shuffle each epoch.
            seed: see `TrainingSampler`.
        """
        repeat_factors = torch.as_tensor(repeat_factors, dtype=torch.float32)
        if repeat_factors.dim() != 1 or len(repeat_factors) == 0:
            raise ValueError(
                "RepeatFactorTrainingSampler: repeat_factors must be a vector with one number for each "
                f"element, got shape {tuple(repeat_factors.shape)}"
            )
        if not bool((repeat_factors >= 0).all()) or float(repeat_factors.sum()) == 0:
            raise ValueError("RepeatFactorTrainingSampler: repeat_factors must be >= 0 and not all 0")
        super().__init__(seed)
        self._shuffle = shuffle
        self._whole = torch.trunc(repeat_factors)
        self._fraction = repeat_factors - self._whole

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Return the repeat factor of each image: the largest one of its categories.

        A category c has the factor ``max(1, sqrt(repeat_thresh / f(c)))``, where f(c) is the fraction of
        images that contain c.

        Args:
            dataset_dicts: annotated dataset in the standard format. A record without annotations has no
                objects.
            repeat_thresh: categories at least this frequent are not repeated.
            sqrt: whether to take the square root.

        Returns:
            (N,) float32 tensor.
        """
        categories = [
            {anno["category_id"] for anno in record.get("annotations", ())} for record in dataset_dicts
        ]
        images_with = Counter(itertools.chain.from_iterable(categories))
        factor = {}
        for category, count in images_with.items():
            ratio = repeat_thresh / (count / len(dataset_dicts))
            factor[category] = max(1.0, math.sqrt(ratio) if sqrt else ratio)
        factors = [max((factor[category] for category in found), default=1.0) for found in categories]
        return torch.tensor(factors, dtype=torch.float32)

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        extra = torch.rand(len(self._fraction), generator=generator) < self._fraction
        repeats = (self._whole + extra.float()).to(torch.int64)
        indices = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
        return indices[torch.randperm(len(indices), generator=generator)] if self._shuffle else indices


def _draw(elements: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``count`` of ``elements`` in random order; none is repeated before all others have been drawn."""
    rounds = -(-count // len(elements))
    orders = [torch.randperm(len(elements), generator=generator) for _ in range(rounds)]
    return elements[torch.cat(orders)[:count]] if rounds else elements[:0]


class ClassAwareTrainingSampler(EndlessSampler):
    """Endless stream that draws each class equally often, and then an image that contains it.

    Paper: "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks"
    (https://arxiv.org/abs/1512.05830), section 4.1. An epoch is at least as long as the dataset and has each
    class the same number of times; the images of a class take turns. Images without objects never occur.
    """

    def __init__(self, categories: Sequence[Sequence[int]], *, seed: int | None = None):
        """
        Args:
            categories: the classes of the objects of each image; duplicates do not count.
            seed: see `TrainingSampler`.
        """
        images: dict[int, list[int]] = {}
        for index, found in enumerate(categories):
            for category in set(found):
                images.setdefault(int(category), []).append(index)
        if not images:
            raise ValueError("ClassAwareTrainingSampler: no image has any objects")
        super().__init__(seed)
        self._images = [torch.tensor(images[category]) for category in sorted(images)]
        self._rounds = -(-len(categories) // len(images))

    @staticmethod
    def categories_of(dataset_dicts: list[dict]) -> list[list[int]]:
        """Return the classes of each image's objects, without crowd regions."""
        return [
            [a["category_id"] for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            for record in dataset_dicts
        ]

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.stack([_draw(found, self._rounds, generator) for found in self._images])
        order = [torch.randperm(len(drawn), generator=generator) for _ in range(self._rounds)]
        return torch.cat([drawn[classes, turn] for turn, classes in enumerate(order)])


class MultiDatasetTrainingSampler(EndlessSampler):
    """Endless stream over several datasets, in proportion to their weights.

    An epoch is as long as all datasets together. Each dataset gets its share of it, rounded at random, and no
    image is repeated before all others of its dataset have occurred.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] = (), *, seed: int | None = None):
        """
        Args:
            sizes: number of images of each dataset, in the order of concatenation.
            weights: weight of each dataset, not negative; only their ratios matter. By default all are equal.
            seed: see `TrainingSampler`.
        """
        sizes, weights = list(sizes), list(weights) or [1.0] * len(sizes)
        if not sizes or min(sizes) <= 0:
            raise ValueError(f"MultiDatasetTrainingSampler: sizes must all be positive, got {sizes}")
        if len(weights) != len(sizes) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"MultiDatasetTrainingSampler: weights (DATALOADER.DATASET_WEIGHTS) must be {len(sizes)} "
                f"numbers, one for each dataset, none negative and not all 0, got {weights}"
            )
        super().__init__(seed)
        self._sets = torch.arange(sum(sizes)).split(sizes)
        share = torch.tensor(weights, dtype=torch.float64)
        self._bounds = (share / share.sum()).cumsum(0) * sum(sizes)

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        # One random offset rounds all bounds, so that counts are right on average and add up.
        total = sum(len(elements) for elements in self._sets)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        bounds = (self._bounds + offset).floor().long().clamp(max=total)
        bounds[-1] = total
        counts = torch.diff(bounds, prepend=torch.zeros(1, dtype=torch.long)).tolist()
        parts = [_draw(elements, n, generator) for elements, n in zip(self._sets, counts)]
        drawn = torch.cat(parts)
        return drawn[torch.randperm(len(drawn), generator=generator)]


_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "ClassAwareTrainingSampler",
    "MultiDatasetTrainingSampler",
)


def build_train_sampler(cfg, dataset, parts: list | None = None) -> Sampler:
    """Build the sampler of a config; ``parts`` are the datasets that ``dataset`` was concatenated from."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logger.info("Using training sampler %s", name)
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(repeat_factors, seed=cfg.SEED)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO")
        if ratio is None:
            raise KeyError(
                "RandomSubsetTrainingSampler needs DATALOADER.RANDOM_SUBSET_RATIO, which is not set"
            )
        return RandomSubsetTrainingSampler(len(dataset), ratio, seed_shuffle=cfg.SEED, seed_subset=cfg.SEED)
    if name == "ClassAwareTrainingSampler":
        return ClassAwareTrainingSampler(ClassAwareTrainingSampler.categories_of(dataset), seed=cfg.SEED)
    if name == "MultiDatasetTrainingSampler":
        sizes = [len(part) for part in parts or [dataset]]
        return MultiDatasetTrainingSampler(sizes, cfg.DATALOADER.DATASET_WEIGHTS, seed=cfg.SEED)
    raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be one of {', '.join(_SAMPLERS)}, got {name!r}")


class InferenceSampler(Sampler):
    """Yields each index once: every process gets one contiguous part, and sizes differ by at most 1."""

    def __init__(self, size: int):
        """
        Args:
            size: number of elements of the dataset.
        """
        check_size("InferenceSampler", size)
        self._size = size
        rank, world_size = comm.get_rank(), comm.get_world_size()
        share, rest = divmod(size, world_size)
        begin = rank * share + min(rank, rest)
        self._local_indices = range(begin, begin + share + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)
