"""Batches of elements of the same group."""

from collections.abc import Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler

__all__ = ["GroupedBatchSampler"]


class GroupedBatchSampler(BatchSampler):
    """Batches of indices of one group each, in an order as close to the sampler's as possible."""

    def __init__(self, sampler: Sampler, group_ids: Sequence[int], batch_size: int):
        """
        Args:
            sampler: yields indices of elements.
            group_ids: the group of each element.
            batch_size: size of all batches; incomplete batches at the end of a finite sampler are dropped.
        """
        if not isinstance(sampler, Sampler):
            raise TypeError(f"GroupedBatchSampler: sampler must be a Sampler, got {type(sampler).__name__}")
        self.sampler = sampler
        self.group_ids = group_ids
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = {}
        for index in self.sampler:
            group = waiting.setdefault(int(self.group_ids[index]), [])
            group.append(index)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()

    def __len__(self) -> int:
        raise TypeError("the number of batches of a GroupedBatchSampler is unknown before iterating over it")
