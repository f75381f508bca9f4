"""Samplers that know of several processes.

For training, all processes follow one endless stream of indices, epoch after epoch, and each takes every n-th
of it; so with a fixed seed a step sees the same pictures on any number of processes. The stream depends on
the seed alone and can be entered at any position, which costs the drawing of the epochs before it and no
loading.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from detlib.utils import comm

from .stream import EndlessSampler, check_size, resolve_seed

__all__ = [
    "InferenceSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]


class TrainingSampler(EndlessSampler):
    """Endless stream of epochs, each a fresh shuffle of all indices."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        """
        Args:
            size: number of elements of the dataset.
            shuffle: whether to shuffle each epoch.
            seed: of the shuffle, equal in all processes. None or a negative one (``cfg.SEED = -1``) draws
                another order in each run.
        """
        check_size(type(self).__name__, size)
        super().__init__(seed)
        self._size = size
        self._shuffle = shuffle

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self._size, generator=generator) if self._shuffle else torch.arange(self._size)


class RandomSubsetTrainingSampler(TrainingSampler):
    """:class:`TrainingSampler` on a random subset of the dataset, which is drawn once."""

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
            subset_ratio: part of it to use, in (0, 1].
            shuffle: whether to shuffle each epoch.
            seed_shuffle: of the shuffle; see :class:`TrainingSampler`.
            seed_subset: of the choice of the subset; likewise.
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
    """Endless stream in which pictures with rare categories come more often.

    Paper: "LVIS: A Dataset for Large Vocabulary Instance Segmentation" (https://arxiv.org/abs/1908.03195),
    appendix B.2.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None):
        """
        Args:
            repeat_factors: (N,) float, how often each element comes in an epoch, on average: the fractional
                part is the probability of one time more.
            shuffle: whether to shuffle each epoch.
            seed: see :class:`TrainingSampler`.
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
        """Repeat factor of each picture: the largest one of its categories.

        That of category c is ``max(1, sqrt(repeat_thresh / f(c)))``, with f(c) the part of the pictures that
        contain c.

        Args:
            dataset_dicts: annotated dataset in the standard format.
            repeat_thresh: categories at least this frequent are not repeated.
            sqrt: whether to take the square root.

        Returns:
            (N,) float32 tensor.
        """
        categories = [{anno["category_id"] for anno in record["annotations"]} for record in dataset_dicts]
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


class InferenceSampler(Sampler):
    """Each index once: every process gets one contiguous part; sizes differ by at most 1."""

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
