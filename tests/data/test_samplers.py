"""Samplers: orders, shares, repetition; alone and as if among several processes."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from detlib.data.samplers import (
    ClassAwareTrainingSampler,
    GroupedBatchSampler,
    InferenceSampler,
    MultiDatasetTrainingSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detlib.utils import comm


def take(sampler, n):
    return list(itertools.islice(sampler, n))


@pytest.fixture
def among(monkeypatch):
    """Make samplers see a given rank."""

    def set_rank(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return set_rank


def test_epochs_are_shuffles_of_one_seed():
    order = take(TrainingSampler(10, seed=3), 30)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20] != list(range(10))
    assert order == take(TrainingSampler(10, seed=3), 30)
    # The order that detectron2 gives for this seed: one generator, one randperm an epoch.
    generator = torch.Generator().manual_seed(3)
    assert order == [i for _ in range(3) for i in torch.randperm(10, generator=generator).tolist()]
    assert take(TrainingSampler(4, shuffle=False), 6) == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_runs_differ(seed):
    np.random.seed(0)
    first = take(TrainingSampler(50, seed=seed), 50)
    second = take(TrainingSampler(50, seed=seed), 50)
    assert first != second
    sampler = TrainingSampler(50, seed=seed)
    assert take(sampler, 50) == take(sampler, 50)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_one_stream(among, world_size):
    whole = take(TrainingSampler(10, seed=1), 60)
    for rank in range(world_size):
        among(rank, world_size)
        assert take(TrainingSampler(10, seed=1), 20) == whole[rank::world_size][:20]


@pytest.mark.parametrize("start", [1, 9, 10, 37])
def test_stream_can_be_entered_anywhere(among, start):
    for make in (
        lambda: TrainingSampler(10, seed=1),
        lambda: RepeatFactorTrainingSampler(torch.tensor([0.5, 2.25, 1.0, 0.0]), seed=1),
        lambda: RandomSubsetTrainingSampler(20, 0.5, seed_shuffle=1, seed_subset=2),
    ):
        whole = take(make(), 80)
        among(1, 2)
        sampler = make()
        sampler.start = start
        assert take(sampler, 20) == whole[start + 1 :: 2][:20]
        among(0, 1)


def test_random_subset():
    sampler = RandomSubsetTrainingSampler(20, 0.35, seed_shuffle=1, seed_subset=2)
    order = take(sampler, 21)
    assert len(set(order)) == 7
    assert sorted(order[:7]) == sorted(order[7:14])
    other_shuffle = take(RandomSubsetTrainingSampler(20, 0.35, seed_shuffle=3, seed_subset=2), 7)
    assert sorted(other_shuffle) == sorted(order[:7]) and other_shuffle != order[:7]
    assert set(take(RandomSubsetTrainingSampler(20, 0.35, seed_shuffle=1, seed_subset=4), 7)) != set(order)
    for ratio, message in [
        (0.0, "subset_ratio must be"),
        (1.5, "subset_ratio must be"),
        (0.01, "leaves none"),
    ]:
        with pytest.raises(ValueError, match=message):
            RandomSubsetTrainingSampler(20, ratio)


def test_repeat_factors():
    counts = Counter(take(RepeatFactorTrainingSampler(torch.tensor([1.0, 2.5, 0.25]), seed=0), 3750))
    # 1000 epochs of 3.75 elements on average
    assert abs(counts[0] - 1000) < 40 and abs(counts[1] - 2500) < 60 and abs(counts[2] - 250) < 50
    unshuffled = RepeatFactorTrainingSampler(torch.tensor([1.0, 3.0, 2.0]), shuffle=False)
    assert take(unshuffled, 7) == [0, 1, 1, 1, 2, 2, 0]
    with pytest.raises(ValueError, match="not all 0"):
        RepeatFactorTrainingSampler(torch.zeros(3))


def test_repeat_factors_from_category_frequency():
    images = [[0, 0], [0], [0, 1], [0, 2], []]
    dicts = [{"annotations": [{"category_id": c} for c in cats]} for cats in images]
    make = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    # Frequencies 4/5, 1/5, 1/5 against a threshold of 0.45.
    torch.testing.assert_close(make(dicts, 0.45), torch.tensor([1, 1, 1.5, 1.5, 1]))
    torch.testing.assert_close(make(dicts, 0.45, sqrt=False), torch.tensor([1, 1, 2.25, 2.25, 1]))
    # A record without annotations counts as one without objects.
    torch.testing.assert_close(make([*dicts[:-1], {}], 0.45), torch.tensor([1, 1, 1.5, 1.5, 1]))


@pytest.mark.parametrize("size, world_size", [(10, 1), (10, 3), (2, 4), (8, 4)])
def test_inference_parts(among, size, world_size):
    parts = []
    for rank in range(world_size):
        among(rank, world_size)
        sampler = InferenceSampler(size)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    assert list(itertools.chain.from_iterable(parts)) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_grouped_batches():
    sampler = torch.utils.data.SequentialSampler(range(9))
    batches = list(GroupedBatchSampler(sampler, [0, 1, 0, 1, 1, 0, 0, 0, 1], 2))
    assert batches == [[0, 2], [1, 3], [5, 6], [4, 8]]
    with pytest.raises(TypeError, match="must be a Sampler, got list"):
        GroupedBatchSampler([0, 1], [0, 0], 2)


@pytest.mark.parametrize("make", [TrainingSampler, InferenceSampler])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        make(0)
    with pytest.raises(TypeError, match="size must be an int, got float"):
        make(3.0)


def test_every_class_comes_equally_often():
    categories = [[0]] * 30 + [[0, 1]] * 5 + [[2, 2]] + [[]] * 2
    order = take(ClassAwareTrainingSampler(categories, seed=0), 39 * 20)
    assert set(order) <= set(range(36))
    # Class 2 has one image; class 1 five, in turn; 13 draws of each class in an epoch of 39.
    counts = Counter(order)
    assert counts[35] == 13 * 20
    of_one = [counts[i] for i in range(30, 35)]
    assert sum(of_one) >= 13 * 20 and min(of_one) > 40
    assert abs(sum(counts[i] for i in range(30)) - 260 * 30 / 35) < 15
    assert order == take(ClassAwareTrainingSampler(categories, seed=0), 39 * 20)
    assert order != take(ClassAwareTrainingSampler(categories, seed=1), 39 * 20)
    with pytest.raises(ValueError, match="no image has any objects"):
        ClassAwareTrainingSampler([[], []])


def test_sets_come_by_their_weights():
    order = np.array(take(MultiDatasetTrainingSampler([10, 90], [3, 1], seed=0), 5000))
    assert abs((order < 10).mean() - 0.75) < 0.01
    counts = np.bincount(order, minlength=100)
    assert counts[:10].max() - counts[:10].min() <= 50 and counts[10:].min() > 0
    third = np.array(take(MultiDatasetTrainingSampler([7, 7, 7], seed=0), 2100))
    assert np.bincount(third // 7).tolist() == [700, 700, 700]
    assert (np.array(take(MultiDatasetTrainingSampler([2, 3], [0, 1], seed=0), 100)) >= 2).all()
    for weights in ([1], [-1, 2], [0, 0]):
        with pytest.raises(ValueError, match="DATASET_WEIGHTS"):
            MultiDatasetTrainingSampler([2, 3], weights)


def test_the_state_holds_a_drawn_seed():
    first = TrainingSampler(50, seed=-1)
    second = TrainingSampler(50, seed=-1)
    second.load_state_dict(first.state_dict())
    assert take(first, 60) == take(second, 60)
    with pytest.raises(KeyError, match="lacks"):
        second.load_state_dict({})
