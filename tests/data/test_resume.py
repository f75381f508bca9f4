"""Saving and restoring the position of a loader."""

import itertools
import json

import numpy as np
import pytest
import torch

from detlib.data import build as B
from detlib.data import samplers as S

RECORDS = [
    {"image_id": i, "width": 10 + (i % 3 == 0) * 10, "height": 15, "annotations": [{"category_id": i % 4}]}
    for i in range(17)
]


class Draw:
    """A mapper that shows which random numbers an element gets."""

    def __call__(self, record):
        drawn = [float(np.random.rand()), float(torch.rand(())), len(record["annotations"])]
        return {key: record[key] for key in ("image_id", "width", "height")} | {"drawn": drawn}


def sampler(kind, seed=4):
    if kind == "repeat":
        return S.RepeatFactorTrainingSampler(torch.linspace(0.3, 2.5, len(RECORDS)), seed=seed)
    if kind == "classes":
        return S.ClassAwareTrainingSampler(S.ClassAwareTrainingSampler.categories_of(RECORDS), seed=seed)
    if kind == "sets":
        return S.MultiDatasetTrainingSampler([5, 12], [3, 1], seed=seed)
    if kind == "subset":
        return S.RandomSubsetTrainingSampler(len(RECORDS), 0.5, seed_shuffle=seed, seed_subset=seed)
    return S.TrainingSampler(len(RECORDS), seed=seed)


def loader(kind="all", grouping=True, workers=0, batch=3, seed=4):
    return B.build_detection_train_loader(
        RECORDS,
        mapper=Draw(),
        sampler=sampler(kind, seed),
        total_batch_size=batch,
        aspect_ratio_grouping=grouping,
        num_workers=workers,
    )


def take(loader, count):
    return [
        [(element["image_id"], *element["drawn"]) for element in batch]
        for batch in itertools.islice(iter(loader), count)
    ]


@pytest.mark.parametrize("kind", ["all", "repeat", "classes", "sets", "subset"])
@pytest.mark.parametrize("grouping", [True, False])
def test_interrupted_equals_uninterrupted(kind, grouping):
    whole = take(loader(kind, grouping), 30)
    for stop in (0, 1, 7, 16):
        first = loader(kind, grouping)
        assert take(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        assert state["batches"] == stop
        second = loader(kind, grouping, seed=-1)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert take(second, 5) == whole[stop : stop + 5]
        # and once more
        third = loader(kind, grouping, seed=99)
        third.load_state_dict(second.state_dict())
        assert take(third, 4) == whole[stop + 5 : stop + 9]


@pytest.mark.parametrize("kind, grouping", [("repeat", True), ("all", False)])
def test_with_workers(kind, grouping):
    whole = take(loader(kind, grouping), 12)
    first = loader(kind, grouping, workers=2)
    # Workers have loaded more than the five batches that were taken.
    assert take(first, 5) == whole[:5]
    second = loader(kind, grouping, workers=2)
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_another_batch_size_goes_on_after_as_many_images():
    order = list(itertools.islice(sampler("all"), 40))
    first = loader(grouping=False, batch=4)
    take(first, 3)
    second = loader(grouping=False, batch=2)
    second.load_state_dict(first.state_dict())
    assert [e[0] for batch in take(second, 5) for e in batch] == order[12:22]


def test_random_numbers_of_the_process_are_left_alone():
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), float(torch.rand(()))
    batches = iter(loader())
    next(batches)  # torch's DataLoader draws a seed when it starts
    np.random.seed(3)
    torch.manual_seed(3)
    next(batches)
    assert (np.random.rand(), float(torch.rand(()))) == expected


def test_two_epochs_draw_other_numbers():
    drawn = [element[1] for batch in take(loader(grouping=False, batch=1), 40) for element in batch]
    assert len(set(drawn)) == 40


def test_records_without_sizes_raise():
    records = [{"image_id": i} for i in range(4)]

    def build():
        return B.build_detection_train_loader(
            records, mapper=add_size, sampler=S.TrainingSampler(4, seed=0), total_batch_size=2
        )

    first = build()
    assert len(next(iter(first))) == 2
    with pytest.raises(ValueError, match="'width' and 'height'; element"):
        build().load_state_dict(first.state_dict())


def add_size(record):
    return record | {"width": 4, "height": 3}


def test_custom_sampler_without_state_restarts_from_its_first_index(caplog):
    own = torch.utils.data.SequentialSampler(RECORDS)
    made = B.build_batch_data_loader(RECORDS, own, 2)
    batches = iter(made)
    next(batches)
    assert made.state_dict()["batches"] == 1
    made.load_state_dict(made.state_dict())
    assert "start from the beginning" in caplog.text
    assert next(iter(made))[0]["image_id"] == 0
