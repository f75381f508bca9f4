"""Datasets made of other datasets, and the memory they take in forked processes."""

import gc
import itertools
import multiprocessing
import os
import pickle
import re

import pytest
from torch.utils.data import DataLoader, IterableDataset

from detlib.data.common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from detlib.data.samplers import InferenceSampler, TrainingSampler


def identity(x):
    return x


@pytest.mark.parametrize("serialize", [True, False, list])
def test_dataset_from_list(serialize):
    elements = [{"a": [1, 2]}, {"b": "x" * 1000}, {}, {"c": None}]
    dataset = DatasetFromList(elements, serialize=serialize)
    assert len(dataset) == 4
    assert [dataset[i] for i in range(4)] == elements and dataset[-1] == {"c": None}
    with pytest.raises(IndexError):
        dataset[4]


def test_dataset_from_list_gives_copies():
    elements = [{"a": [1]}]
    for dataset in (DatasetFromList(elements), DatasetFromList(elements, serialize=False)):
        dataset[0]["a"].append(2)
        assert dataset[0] == {"a": [1]}
    shared = DatasetFromList(elements, copy=False, serialize=False)
    assert shared[0] is elements[0]
    assert len(DatasetFromList([])) == 0
    again = pickle.loads(pickle.dumps(DatasetFromList(elements)))
    assert again[0] == {"a": [1]}


def private_memory() -> int:
    """Return the number of bytes that this process shares with no other."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(kb) * 1024 for kb in re.findall(r"Private_\w+: +(\d+) kB", f.read()))


def memory_of_reading(dataset, queue):
    gc.disable()
    warm_up = 500
    for i in range(warm_up):  # what reading takes once, whatever the number of elements
        dataset[i]
    before = private_memory()
    for i in range(warm_up, len(dataset)):
        dataset[i]
    queue.put(private_memory() - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_forked_processes_share_a_serialized_list():
    elements = [
        {"file_name": f"{i}.jpg", "boxes": [[i + j + 0.5] * 4 for j in range(5)]} for i in range(15000)
    ]
    context = multiprocessing.get_context("fork")
    grown = {}
    for serialize in (True, False):
        dataset = DatasetFromList(elements, copy=False, serialize=serialize)
        queue = context.Queue()
        process = context.Process(target=memory_of_reading, args=(dataset, queue))
        process.start()
        grown[serialize] = queue.get(timeout=60)
        process.join()
    assert grown[True] < 2**21
    assert grown[False] > 2 * grown[True]  # so that the measurement is seen to measure


def test_map_dataset_replaces_refused_elements():
    odd_only = MapDataset(list(range(6)), lambda x: x if x % 2 else None)
    assert len(odd_only) == 6
    values = [odd_only[i] for i in range(6)]
    assert values[1::2] == [1, 3, 5]
    assert set(values) <= {1, 3, 5}
    nothing = MapDataset([1, 2, 3], lambda x: None)
    with pytest.raises(ValueError, match="returned None for all 3 elements"):
        nothing[0]
    again = pickle.loads(pickle.dumps(MapDataset([1, 2], identity)))
    assert again[1] == 2


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(6))

    def __len__(self):
        return 6


def test_map_of_iterable_skips_refused_elements():
    mapped = MapDataset(Numbers(), lambda x: x * 10 if x % 2 else None)
    assert isinstance(mapped, IterableDataset)
    assert list(mapped) == [10, 30, 50] and len(mapped) == 6


def test_errors_of_the_mapper_name_the_element():
    def fail(x):
        raise RuntimeError("no luck")

    records = [{"file_name": "dir/a.jpg", "image_id": 3}]
    with pytest.raises(RuntimeError, match="no luck") as info:
        MapDataset(records, fail)[0]
    assert "file_name='dir/a.jpg', image_id=3" in info.value.__notes__[0]
    with pytest.raises(RuntimeError) as info:
        next(iter(MapDataset(Numbers(), fail)))
    assert "of type int" in info.value.__notes__[0]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 2])
def test_to_iterable_shares_out_between_workers(num_workers, chunk):
    dataset = ToIterableDataset([i * 10 for i in range(12)], InferenceSampler(12), shard_chunk_size=chunk)
    assert len(dataset) == 12
    loader = DataLoader(dataset, batch_size=chunk, num_workers=num_workers, collate_fn=identity)
    batches = list(loader)
    if num_workers == 0:
        batches = [batch[i : i + chunk] for batch in batches for i in range(0, len(batch), chunk)]
    assert batches == [[10 * (i + j) for j in range(chunk)] for i in range(0, 12, chunk)]


def test_to_iterable_without_sharing_and_refusals():
    dataset = ToIterableDataset(list(range(3)), InferenceSampler(3), shard_sampler=False)
    assert sorted(DataLoader(dataset, batch_size=None, num_workers=2)) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(TypeError, match="must be map-style, got the iterable Numbers"):
        ToIterableDataset(Numbers(), InferenceSampler(3))
    with pytest.raises(TypeError, match="must be a Sampler, got list"):
        ToIterableDataset([1], [0])


def test_aspect_ratio_groups():
    sizes = [(4, 3), (3, 4), (5, 5), (6, 3), (3, 9), (8, 1), (2, 1)]  # (width, height)
    dataset = AspectRatioGroupedDataset(
        [{"width": w, "height": h, "id": i} for i, (w, h) in enumerate(sizes)], 2
    )
    assert [[d["id"] for d in batch] for batch in dataset] == [[1, 2], [0, 3], [5, 6]]
    # A new iteration starts with empty groups: image 4, which was left over, does not come first.
    assert [[d["id"] for d in batch] for batch in dataset] == [[1, 2], [0, 3], [5, 6]]


def test_endless_sampler_in_workers():
    dataset = ToIterableDataset(list(range(10)), TrainingSampler(10, seed=1))
    expected = list(itertools.islice(TrainingSampler(10, seed=1), 14))
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert list(itertools.islice(loader, 14)) == expected
