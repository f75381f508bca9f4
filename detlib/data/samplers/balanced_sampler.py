"""Samplers that balance classes or data sets."""

from collections.abc import Sequence

import torch

from .stream import EndlessSampler

__all__ = ["ClassAwareTrainingSampler", "MultiDatasetTrainingSampler"]


def _draw(elements: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` of ``elements`` in random order; none comes once more before all others have come."""
    rounds = -(-count // len(elements))
    orders = [torch.randperm(len(elements), generator=generator) for _ in range(rounds)]
    return elements[torch.cat(orders)[:count]] if rounds else elements[:0]


class ClassAwareTrainingSampler(EndlessSampler):
    """Endless stream that draws each class equally often, and then a picture that shows it.

    Paper: "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks"
    (https://arxiv.org/abs/1512.05830), section 4.1. An epoch is at least as long as the data set and has each
    class the same number of times; pictures of a class come in turn. Pictures without objects never come.
    """

    def __init__(self, categories: Sequence[Sequence[int]], *, seed: int | None = None):
        """
        Args:
            categories: the classes of the objects of each picture; repetitions do not count.
            seed: see `TrainingSampler`.
        """
        pictures: dict[int, list[int]] = {}
        for index, found in enumerate(categories):
            for category in set(found):
                pictures.setdefault(int(category), []).append(index)
        if not pictures:
            raise ValueError("ClassAwareTrainingSampler: no picture has an object")
        super().__init__(seed)
        self._pictures = [torch.tensor(pictures[category]) for category in sorted(pictures)]
        self._rounds = -(-len(categories) // len(pictures))

    @staticmethod
    def categories_of(dataset_dicts: list[dict]) -> list[list[int]]:
        """The classes of each picture's objects; crowd regions are left out."""
        return [
            [a["category_id"] for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            for record in dataset_dicts
        ]

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.stack([_draw(found, self._rounds, generator) for found in self._pictures])
        order = [torch.randperm(len(drawn), generator=generator) for _ in range(self._rounds)]
        return torch.cat([drawn[classes, turn] for turn, classes in enumerate(order)])


class MultiDatasetTrainingSampler(EndlessSampler):
    """Endless stream over several data sets, of each as much as its weight says.

    An epoch is as long as the data sets together. Each has its share of it, rounded at random, and gives all
    its pictures before it gives one again.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] = (), *, seed: int | None = None):
        """
        Args:
            sizes: number of pictures of each data set, in the order in which they are concatenated.
            weights: of each data set, not negative; only their ratios count. Equal ones when left out.
            seed: see `TrainingSampler`.
        """
        sizes, weights = list(sizes), list(weights) or [1.0] * len(sizes)
        if not sizes or min(sizes) <= 0:
            raise ValueError(f"MultiDatasetTrainingSampler: sizes must all be positive, got {sizes}")
        if len(weights) != len(sizes) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"MultiDatasetTrainingSampler: weights (DATALOADER.DATASET_WEIGHTS) must be {len(sizes)} "
                f"numbers, one for each data set, none negative and not all 0; got {weights}"
            )
        super().__init__(seed)
        self._sets = torch.arange(sum(sizes)).split(sizes)
        share = torch.tensor(weights, dtype=torch.float64)
        self._bounds = (share / share.sum()).cumsum(0) * sum(sizes)

    def _draw_epoch(self, generator: torch.Generator) -> torch.Tensor:
        # One random offset rounds all bounds, so that each count is right on average and they add up.
        total = sum(len(elements) for elements in self._sets)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        bounds = (self._bounds + offset).floor().long().clamp(max=total)
        bounds[-1] = total
        counts = torch.diff(bounds, prepend=torch.zeros(1, dtype=torch.long)).tolist()
        parts = [_draw(elements, n, generator) for elements, n in zip(self._sets, counts)]
        drawn = torch.cat(parts)
        return drawn[torch.randperm(len(drawn), generator=generator)]
