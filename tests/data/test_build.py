"""Loaders: order, grouping, seeds, workers, filters, and errors that name file, key or dataset."""

import itertools
import logging
import multiprocessing
import os
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data import build as B
from detlib.data import detection_utils as utils
from detlib.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detlib.structures import BoxMode
from detlib.utils import comm


def annotation(category_id=0, **kwargs):
    return {"bbox": [1, 1, 6, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, **kwargs}


@pytest.fixture
def records(tmp_path):
    """Twelve images, every third one high and the others wide, with one object each."""
    made = []
    for i in range(12):
        height, width = (16, 12) if i % 3 == 0 else (12, 16)
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((height, width, 3), 10 * i, dtype=np.uint8)).save(path)
        made.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": [annotation(i % 2)],
            }
        )
    return made


@pytest.fixture
def register():
    names = []

    def add(name, dataset, **metadata):
        DatasetCatalog.register(name, lambda: dataset)
        names.append(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_cfg(train, batch=2, workers=0, seed=1):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (train,) if isinstance(train, str) else train
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.SEED = seed
    return cfg


def ids(loader, n):
    return [[element["image_id"] for element in batch] for batch in itertools.islice(loader, n)]


def error_of(loader):
    """Return the exception that ends the loading of 12 batches, without references to the workers."""
    try:
        ids(loader, 12)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return error
    return None


def only_id(record):
    return {key: record[key] for key in ("image_id", "height", "width")}


@pytest.mark.parametrize("grouping", [True, False])
def test_order_is_that_of_the_seed_on_any_number_of_workers(records, grouping):
    def load(workers):
        sampler = TrainingSampler(len(records), seed=5)
        return ids(
            B.build_detection_train_loader(
                records,
                mapper=only_id,
                sampler=sampler,
                total_batch_size=3,
                aspect_ratio_grouping=grouping,
                num_workers=workers,
            ),
            16,
        )

    batches = load(0)
    assert load(1) == load(2) == batches
    if grouping:
        assert all(len({i % 3 == 0 for i in batch}) == 1 for batch in batches)
    else:
        expected = list(itertools.islice(TrainingSampler(len(records), seed=5), 48))
        assert list(itertools.chain.from_iterable(batches)) == expected


def test_train_loader_by_config(records, register):
    name = register("build_train", records, thing_classes=["a", "b"])
    for workers in (0, 2):
        loader = B.build_detection_train_loader(make_cfg(name, workers=workers))
        batch = next(iter(loader))
        assert len(batch) == 2
        for element in batch:
            assert element["file_name"].endswith(f"{element['image_id']}.png")
            assert (element["image"] == 10 * element["image_id"]).all()
            assert element["instances"].gt_classes.tolist() == [element["image_id"] % 2]


def test_seed_of_the_config(records, register):
    name = register("build_seed", records, thing_classes=["a", "b"])
    np.random.seed(0)

    def order(seed, sampler="TrainingSampler"):
        cfg = make_cfg(name, batch=1, seed=seed)
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
        cfg.DATALOADER.SAMPLER_TRAIN = sampler
        cfg.DATALOADER.REPEAT_THRESHOLD = 0.1
        return ids(B.build_detection_train_loader(cfg, mapper=only_id), 36)

    for sampler in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        assert order(3, sampler) == order(3, sampler)
        assert order(3, sampler) != order(4, sampler)
        assert order(-1, sampler) != order(-1, sampler)


def test_sampler_by_config(records, register):
    name = register("build_sampler", records, thing_classes=["a", "b"])
    cfg = make_cfg(name)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def sampler():
        return B.build_detection_train_loader(cfg, mapper=only_id).sampler

    assert type(sampler()) is TrainingSampler
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    assert type(sampler()) is RepeatFactorTrainingSampler
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(KeyError, match="DATALOADER.RANDOM_SUBSET_RATIO"):
        sampler()
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    assert type(sampler()) is RandomSubsetTrainingSampler
    cfg.DATALOADER.SAMPLER_TRAIN = "Other"
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN must be.*'Other'"):
        sampler()


def test_workers_draw_different_numbers_and_repeat_by_seed(records):
    def load():
        loader = B.build_batch_data_loader(
            B.MapDataset(records, lambda record: float(np.random.rand())),
            TrainingSampler(12, seed=0),
            4,
            num_workers=2,
            seed=11,
        )
        return list(itertools.islice(loader, 4))

    first = load()
    assert first == load()
    assert len(set(itertools.chain.from_iterable(first))) == 16


def test_test_loader(records, register):
    empty = {**records[0], "image_id": 12, "annotations": []}
    name = register("build_test", [*records, empty], thing_classes=["a", "b"])
    cfg = make_cfg(name)
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        loader = B.build_detection_test_loader(cfg, name)
        assert len(loader) == 13
        batches = list(loader)
        assert [batch[0]["image_id"] for batch in batches] == list(range(13))
        assert all("instances" not in batch[0] for batch in batches)
    assert len(B.build_detection_test_loader(cfg, [name, name])) == 26
    explicit = B.build_detection_test_loader(records, mapper=only_id, batch_size=5, collate_fn=len)
    assert list(explicit) == [5, 5, 2]


def test_test_loader_shares_out_between_processes(records, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    loader = B.build_detection_test_loader(records, mapper=only_id)
    assert ids(loader, 100) == [[i] for i in range(6, 12)]


def test_batch_must_be_a_multiple_of_the_processes(records, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    sampler = TrainingSampler(12, seed=0)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH.*6 images for 4 processes"):
        B.build_detection_train_loader(records, mapper=None, sampler=sampler, total_batch_size=6)
    with pytest.raises(ValueError, match="got 0 images"):
        B.build_detection_train_loader(records, mapper=None, sampler=sampler, total_batch_size=0)
    loader = B.build_detection_train_loader(records, mapper=None, sampler=sampler, total_batch_size=8)
    assert len(next(iter(loader))) == 2
    with pytest.raises(ValueError, match="either total_batch_size or single_gpu_batch_size"):
        B.build_batch_data_loader(records, sampler, 4, single_gpu_batch_size=2)
    single = B.build_batch_data_loader(records, sampler, None, single_gpu_batch_size=3)
    assert len(next(iter(single))) == 3


@pytest.mark.parametrize("grouping", [True, False])
def test_collate_fn(records, grouping):
    loader = B.build_detection_train_loader(
        records, mapper=only_id, total_batch_size=3, aspect_ratio_grouping=grouping, collate_fn=len
    )
    assert list(itertools.islice(loader, 3)) == [3, 3, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter({"image_id": i, "width": 2, "height": 1} for i in itertools.count())


def test_iterable_dataset(records):
    for grouping in (True, False):
        loader = B.build_detection_train_loader(
            Stream(), mapper=only_id, total_batch_size=2, aspect_ratio_grouping=grouping
        )
        assert ids(loader, 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="sampler must be None"):
        B.build_detection_train_loader(Stream(), mapper=None, sampler=TrainingSampler(3), total_batch_size=2)
    with pytest.raises(ValueError, match="sampler must be None"):
        B.build_detection_test_loader(Stream(), mapper=None, sampler=TrainingSampler(3))
    with pytest.raises(ValueError, match="drop_last"):
        B.build_batch_data_loader(records, TrainingSampler(3), 2, aspect_ratio_grouping=True, drop_last=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
def test_a_broken_image_is_named(records, register, workers, grouping):
    name = register("build_broken", records, thing_classes=["a", "b"])
    path = records[4]["file_name"]
    with open(path, "r+b") as f:
        f.truncate(45)
    cfg = make_cfg(name, batch=1, workers=workers)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    broken = error_of(B.build_detection_train_loader(cfg))
    assert isinstance(broken, utils.ImageReadError) and f"{path} is broken" in str(broken)
    os.remove(path)
    missing = error_of(B.build_detection_train_loader(cfg))
    assert isinstance(missing, FileNotFoundError) and path in str(missing)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_users_mapper_names_the_file(records, workers):
    def fail(record):
        if record["image_id"] == 4:
            raise RuntimeError("no luck")
        return only_id(record)

    loader = B.build_detection_train_loader(records, mapper=fail, total_batch_size=1, num_workers=workers)
    error = error_of(loader)
    text = str(error) + "".join(getattr(error, "__notes__", ()))
    assert isinstance(error, RuntimeError) and "no luck" in text and records[4]["file_name"] in text


@pytest.mark.parametrize("grouping", [True, False])
def test_new_iterators_leave_no_workers_behind(records, grouping):
    loader = B.build_detection_train_loader(
        records, mapper=only_id, total_batch_size=2, aspect_ratio_grouping=grouping, num_workers=2
    )
    before = len(multiprocessing.active_children())
    for _ in range(4):
        iterator = iter(loader)
        next(iterator)
        assert len(multiprocessing.active_children()) == before + 2
    del iterator
    assert len(multiprocessing.active_children()) == before


def test_dropped_empty_images_are_counted_in_the_log(records, register, caplog):
    crowd = {**records[0], "image_id": "crowd", "annotations": [annotation(iscrowd=1)]}
    empty = {**records[0], "image_id": "empty", "annotations": []}
    name = register("build_filter", [*records, crowd, empty], thing_classes=["a", "b"])
    with caplog.at_level(logging.INFO, logger="detlib"):
        kept = B.get_detection_dataset_dicts(name)
    assert [record["image_id"] for record in kept] == list(range(12))
    (line,) = [r.message for r in caplog.records if "FILTER_EMPTY" in r.message]
    assert "DATALOADER.FILTER_EMPTY_ANNOTATIONS: dropped 2 of 14 images" in line and "12 are left" in line
    assert len(B.get_detection_dataset_dicts(name, filter_empty=False)) == 14
    unlabeled = [{k: v for k, v in record.items() if k != "annotations"} for record in records]
    assert len(B.get_detection_dataset_dicts(register("build_unlabeled", unlabeled))) == 12


@pytest.mark.parametrize(
    ("switch", "key", "value"),
    [("MASK_ON", "segmentation", [[1, 1, 6, 1, 6, 5]]), ("KEYPOINT_ON", "keypoints", [2, 3, 2] * 17)],
)
def test_objects_without_masks_or_keypoints_raise_before_training(records, register, switch, key, value):
    names = [f"point {i}" for i in range(17)]
    metadata = {"thing_classes": ["a", "b"], "keypoint_names": names, "keypoint_flip_map": []}
    cfg = make_cfg(register("build_fields", records, **metadata))
    cfg.MODEL[switch] = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    for record in records[1:]:
        record["annotations"][0][key] = value
    with pytest.raises(
        ValueError, match=rf"1 of 12 objects have no .*'{key}'.*0.png, but MODEL.{switch} is True"
    ):
        B.build_detection_train_loader(cfg)
    records[0]["annotations"] = [annotation(iscrowd=1), annotation(**{key: value})]
    B.build_detection_train_loader(cfg)
    records[1]["annotations"][0][key] = []
    with pytest.raises(ValueError, match=rf"1 of 12 objects.*MODEL.{switch}"):
        B.build_detection_train_loader(cfg)


def test_nothing_left_is_an_error(records, register):
    empty = [{**record, "annotations": []} for record in records]
    name = register("build_all_empty", empty, thing_classes=["a", "b"])
    with pytest.raises(ValueError, match="12 images.*'build_all_empty'.*FILTER_EMPTY_ANNOTATIONS"):
        B.get_detection_dataset_dicts(name)
    with pytest.raises(ValueError, match="'build_none' is empty"):
        B.get_detection_dataset_dicts([name, register("build_none", [])], filter_empty=False)
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        B.build_detection_train_loader(make_cfg(()))
    with pytest.raises(KeyError, match="build_all_emty"):
        B.get_detection_dataset_dicts("build_all_emty")


def test_few_keypoints(records, register):
    for i, record in enumerate(records):
        record["annotations"][0]["keypoints"] = [1, 1, 2] * i + [0, 0, 0] * (12 - i)
    name = register("build_keypoints", records, thing_classes=["a", "b"])
    kept = B.get_detection_dataset_dicts(name, min_keypoints=5)
    assert [record["image_id"] for record in kept] == [5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="MIN_KEYPOINTS_PER_IMAGE"):
        B.get_detection_dataset_dicts(name, min_keypoints=99)


@pytest.mark.parametrize("bad", [2, -1, "0", None, 0.5])
def test_category_ids_outside_the_list(records, register, bad):
    records[7]["annotations"].append(annotation(bad))
    name = register("build_ids", records, thing_classes=["a", "b"])
    with pytest.raises(
        ValueError, match=r"annotation 1 of image 7 \(file .*7.png\).*from 0 to 1 .*'build_ids'"
    ):
        B.get_detection_dataset_dicts(name, filter_empty=False)


def test_number_of_classes_against_the_config(records, register, caplog):
    name = register("build_classes", records, thing_classes=["a", "b"])
    cfg = make_cfg(name)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    with pytest.raises(ValueError, match="image 1 .*MODEL.ROI_HEADS.NUM_CLASSES is 1"):
        B.build_detection_train_loader(cfg)
    B.build_detection_train_loader(cfg, mapper=only_id)  # which may well change the ids
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with caplog.at_level(logging.WARNING, logger="detlib"):
        B.build_detection_train_loader(cfg)
    assert "NUM_CLASSES is 80, but dataset 'build_classes' has 2 classes" in caplog.text
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    with pytest.raises(ValueError, match="MODEL.RETINANET.NUM_CLASSES is 1"):
        B.build_detection_train_loader(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    B.build_detection_train_loader(cfg)


def test_datasets_of_different_classes(records, register):
    names = [
        register("build_ab", records, thing_classes=["a", "b"]),
        register("build_ba", records, thing_classes=["b", "a"]),
    ]
    with pytest.raises(ValueError, match="'thing_classes'.*'build_ab'.*'build_ba'"):
        B.get_detection_dataset_dicts(names)
    assert len(B.get_detection_dataset_dicts(names, check_consistency=False)) == 24


def test_torch_datasets_come_as_they_are(records, register):
    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index

    one, two = Plain(), Plain()
    names = [register("build_torch1", one), register("build_torch2", two)]
    assert B.get_detection_dataset_dicts(names[0]) is one
    assert [*map(B.get_detection_dataset_dicts(names).__getitem__, range(6))] == [0, 1, 2, 0, 1, 2]
    stream = Stream()
    assert B.get_detection_dataset_dicts(register("build_stream", stream)) is stream


def test_histogram(records, caplog):
    records[0]["annotations"].append(annotation(1, iscrowd=1))
    records[0]["annotations"].append(annotation(0))
    names = ["a very long name", "b", "c", "d"]
    with caplog.at_level(logging.INFO, logger="detlib"):
        B.print_instances_class_histogram(records, names)
    cells = [cell.strip() for cell in caplog.records[-1].message.replace("\n", "").split("|")]
    found = {name: cells[cells.index(name) + 1] for name in ("a very long..", "b", "c", "d", "total")}
    assert found == {"a very long..": "7", "b": "6", "c": "0", "d": "0", "total": "13"}
