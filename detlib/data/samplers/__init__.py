"""Samplers: which pictures, in which order, and which of them in which process."""

from .balanced_sampler import ClassAwareTrainingSampler, MultiDatasetTrainingSampler
from .distributed_sampler import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from .grouped_batch_sampler import GroupedBatchSampler

__all__ = [
    "ClassAwareTrainingSampler",
    "GroupedBatchSampler",
    "InferenceSampler",
    "MultiDatasetTrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]
