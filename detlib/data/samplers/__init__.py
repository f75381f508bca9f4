"""Samplers: which images, in which order, and which of them in which process."""

from detlib.data.samplers.distributed_sampler import (
    ClassAwareTrainingSampler,
    InferenceSampler,
    MultiDatasetTrainingSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detlib.data.samplers.grouped_batch_sampler import GroupedBatchSampler

__all__ = [
    "ClassAwareTrainingSampler",
    "GroupedBatchSampler",
    "InferenceSampler",
    "MultiDatasetTrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]
