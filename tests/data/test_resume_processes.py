"""Resuming grouped loaders in several processes: each goes on with the batches that it would have had."""

import itertools
import json

import numpy as np
import pytest
import torch

from detlib.data import build as B
from detlib.data import samplers as S
from detlib.engine import launch
from detlib.utils import comm

pytestmark = pytest.mark.distributed

# Groups of unequal size, so that processes draw unequally far for as many batches.
RECORDS = [
    {"image_id": i, "width": 20 if i % 7 in (0, 3) else 10, "height": 15, "annotations": []}
    for i in range(23)
]
TAKEN = 12
RUNS = ((1, 0), (6, 0), (5, 2))  # batches taken before the stop, and loader workers


class Draw:
    """A mapper that shows which random numbers an element gets, and refuses some images."""

    def __init__(self, refused=()):
        self.refused = refused

    def __call__(self, record):
        if record["image_id"] in self.refused:
            return None
        drawn = [float(np.random.rand()), float(torch.rand(()))]
        return {key: record[key] for key in ("image_id", "width", "height")} | {"drawn": drawn}


def make_loader(seed, workers, refused=()):
    return B.build_detection_train_loader(
        RECORDS,
        mapper=Draw(refused),
        sampler=S.TrainingSampler(len(RECORDS), seed=seed),
        total_batch_size=4 if comm.get_world_size() > 1 else 2,
        aspect_ratio_grouping=True,
        num_workers=workers,
    )


def take(loader, count):
    return [
        [[element["image_id"], *element["drawn"]] for element in batch]
        for batch in itertools.islice(iter(loader), count)
    ]


def run(folder, stops):
    """Run in each process: a full run, and runs that stop and resume from the state of the main process."""
    found = {"whole": take(make_loader(5, 0), TAKEN)}
    for stop, workers in stops:
        first = make_loader(5, workers)
        before = take(first, stop)
        # As a checkpoint does it: the main process writes, all read.
        path = f"{folder}/state_{stop}_{workers}.json"
        if comm.is_main_process():
            with open(path, "w") as file:
                json.dump(first.state_dict(), file)
        comm.synchronize()
        with open(path) as file:
            state = json.load(file)
        second = make_loader(None, workers)  # another seed, which is drawn
        second.load_state_dict(state)
        found[f"stop after {stop}, {workers} workers"] = before + take(second, TAKEN - stop)
    with open(f"{folder}/rank_{comm.get_rank()}.json", "w") as file:
        json.dump(found, file)


@pytest.mark.parametrize("stops", [RUNS[:1], pytest.param(RUNS[1:], marks=pytest.mark.slow)])
def test_two_processes(tmp_path, stops):
    launch(run, 2, dist_url="auto", args=(str(tmp_path), stops))
    widths = {record["image_id"]: record["width"] for record in RECORDS}
    seen = []
    for rank in range(2):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        whole = found.pop("whole")
        assert len(whole) == TAKEN and len(found) == len(stops)
        for name, batches in found.items():
            assert batches == whole, f"rank {rank}, {name}"
        assert all(widths[one[0]] == widths[other[0]] for one, other in whole), "grouped"
        seen.append({tuple(element) for batch in whole for element in batch})
    assert not seen[0] & seen[1], "the processes share the stream out"


@pytest.mark.parametrize("refused", [(3,), (0, 4, 10)])
def test_refused_images_do_not_shift_the_batches(refused):
    """What stands in for them is of their group, so a resumed run knows the batches without mapping."""
    whole = take(make_loader(6, 0, refused), 24)
    assert not {element[0] for batch in whole for element in batch} & set(refused)
    for stop in (5, 12, 18):
        first = make_loader(6, 0, refused)
        take(first, stop)
        second = make_loader(8, 0, refused)
        second.load_state_dict(first.state_dict())
        assert take(second, 24 - stop) == whole[stop:], stop


def test_a_group_without_others_is_left():
    """Where all of a group are refused, an image of the other group comes in their place."""
    wide = tuple(record["image_id"] for record in RECORDS if record["width"] > record["height"])
    assert all(element[0] not in wide for batch in take(make_loader(6, 0, wide), 12) for element in batch)
