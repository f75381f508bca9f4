"""Data loaders for training and testing."""

import logging
import sys
from collections.abc import Callable, Sized
from functools import partial
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler

from detlib.config import configurable
from detlib.utils import comm
from detlib.utils.env import seed_all_rng

from .catalog import MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset
from .dataset_dicts import (
    check_category_ids,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    log_images_without_objects,
    print_instances_class_histogram,
)
from .dataset_mapper import DatasetMapper
from .detection_utils import check_metadata_consistency
from .proposals import load_proposals_into_dataset
from .resume import PlacedSampler, ResumableLoader
from .samplers import (
    ClassAwareTrainingSampler,
    InferenceSampler,
    MultiDatasetTrainingSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from .samplers.stream import EndlessSampler

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "pictures_per_epoch",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

logger = logging.getLogger(__name__)


def trivial_batch_collator(batch: list) -> list:
    """A batch is the list of its elements."""
    return batch


def _as_is(element: Any) -> Any:
    return element


def worker_init_reset_seed(worker_id: int) -> None:
    """Give each loader worker random numbers of its own, in Python, numpy and torch."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
    if "cv2" in sys.modules:  # its threads do not survive a fork, and workers are parallel already
        sys.modules["cv2"].setNumThreads(0)


def _batch_size_per_process(total_batch_size: int | None, single_gpu_batch_size: int | None) -> int:
    if (total_batch_size is None) == (single_gpu_batch_size is None):
        raise ValueError(
            "build_batch_data_loader: give either total_batch_size or single_gpu_batch_size, got "
            f"{total_batch_size} and {single_gpu_batch_size}"
        )
    if total_batch_size is None:
        return single_gpu_batch_size
    world_size = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world_size != 0:
        raise ValueError(
            f"the total batch size (SOLVER.IMS_PER_BATCH) must be a positive multiple of the number of "
            f"processes: got {total_batch_size} images for {world_size} processes"
        )
    return total_batch_size // world_size


def build_batch_data_loader(
    dataset: Dataset,
    sampler: Sampler | None,
    total_batch_size: int | None,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs,
):
    """Build a loader of batches.

    With a map-style dataset the order of the pictures does not depend on the number of workers.

    Args:
        dataset: map-style, or iterable; an iterable one must share itself out between processes and workers.
        sampler: yields indices into a map-style dataset; None for an iterable one.
        total_batch_size: number of pictures of a batch over all processes, a multiple of their number; None
            when ``single_gpu_batch_size`` is given.
        aspect_ratio_grouping: make each batch of pictures that are all wider than high, or all not. Elements
            must be dicts with "width" and "height".
        num_workers: number of loader processes; 0 loads in this process.
        collate_fn: makes a batch of a list of elements; the list itself is the batch when left out.
        drop_last: drop a last batch that is not full; must be True with ``aspect_ratio_grouping``.
        single_gpu_batch_size: number of pictures of a batch in this process, instead of ``total_batch_size``.
        prefetch_factor: number of batches (elements, with ``aspect_ratio_grouping``) that each worker
            prepares.
        persistent_workers: keep the workers when the loader is iterated again.
        pin_memory: see `torch.utils.data.DataLoader`.
        seed: of the workers' random numbers; None derives it from torch's global generator.
        **kwargs: further arguments of `torch.utils.data.DataLoader`.

    Returns:
        An iterable of batches. With an endless sampler of `detlib.data.samplers` its ``state_dict`` and
        ``load_state_dict`` save and restore the position, see `ResumableLoader`.

    Raises:
        ValueError: arguments do not go together, or the batch cannot be shared out between the processes.
    """
    batch_size = _batch_size_per_process(total_batch_size, single_gpu_batch_size)
    if isinstance(dataset, IterableDataset) and sampler is not None:
        raise ValueError("build_batch_data_loader: sampler must be None with an iterable dataset")
    if num_workers > 0:
        kwargs.update(prefetch_factor=prefetch_factor, persistent_workers=persistent_workers)
    placed = PlacedSampler(sampler) if isinstance(sampler, EndlessSampler) else None
    kwargs.update(num_workers=num_workers, pin_memory=pin_memory, sampler=placed or sampler)
    kwargs.setdefault("worker_init_fn", worker_init_reset_seed)
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)

    if not aspect_ratio_grouping:
        collate_fn = trivial_batch_collator if collate_fn is None else collate_fn
        loader = DataLoader(
            dataset, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn, **kwargs
        )
        return ResumableLoader(loader, batch_size, placed)
    if not drop_last:
        raise ValueError("build_batch_data_loader: aspect_ratio_grouping needs drop_last=True")
    if isinstance(dataset, MapDataset):  # a position is restored by the groups that indices have
        dataset.keep_groups(_group_of)
    elements = DataLoader(dataset, batch_size=None, collate_fn=_as_is, **kwargs)
    batches = AspectRatioGroupedDataset(elements, batch_size)
    batches = batches if collate_fn is None else MapDataset(batches, collate_fn)
    return ResumableLoader(batches, batch_size, placed, is_wide=partial(_is_wide, dataset))


def _is_wide(dataset: Dataset, index: int) -> bool:
    """The group of an element, told from what a dataset is before it is mapped."""
    while isinstance(dataset, MapDataset):
        dataset = dataset._dataset
    group = _group_of(dataset[int(index)])
    if group is None:
        raise ValueError(
            "a loader with aspect_ratio_grouping can go on at a saved position only if the records have "
            f"'width' and 'height'; element {int(index)} has none"
        )
    return group


def _group_of(record: Any) -> bool | None:
    """Whether a record's picture is wider than high; None where it does not say."""
    if not isinstance(record, dict) or not {"width", "height"} <= set(record):
        return None
    return record["width"] > record["height"]


def pictures_per_epoch(loader: Any) -> int | None:
    """Number of elements that a loader of `build_batch_data_loader` draws from; None if that is not known."""
    while hasattr(loader, "dataset"):
        loader = loader.dataset
    return len(loader) if isinstance(loader, Sized) else None


def _check_num_classes(cfg, dataset_dicts: list[dict]) -> None:
    """Compare the model's number of classes with the data, before a label fails in the middle of a loss."""
    from detlib.modeling import facts_of

    key = facts_of(cfg).num_classes_keys(cfg).get("thing_classes")
    if key is None:
        return
    num_classes = cfg
    for part in key.split("."):
        num_classes = num_classes[part]
    check_category_ids(dataset_dicts, num_classes, f"{key} is {num_classes}")
    name = _as_names(cfg.DATASETS.TRAIN)[0]
    class_names = getattr(MetadataCatalog.get(name), "thing_classes", None)
    if class_names is not None and len(class_names) != num_classes:
        logger.warning("%s is %d, but dataset %r has %d classes", key, num_classes, name, len(class_names))


def _as_names(names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "ClassAwareTrainingSampler",
    "MultiDatasetTrainingSampler",
)


def _build_train_sampler(cfg, dataset, parts: list | None = None) -> Sampler:
    """The sampler that a config names; ``parts`` are the data sets that ``dataset`` is made of."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logger.info("Using training sampler %s", name)
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(repeat_factors, seed=cfg.SEED)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO")
        if ratio is None:
            raise KeyError("DATALOADER.RANDOM_SUBSET_RATIO is needed by RandomSubsetTrainingSampler, not set")
        return RandomSubsetTrainingSampler(len(dataset), ratio, seed_shuffle=cfg.SEED, seed_subset=cfg.SEED)
    if name == "ClassAwareTrainingSampler":
        return ClassAwareTrainingSampler(ClassAwareTrainingSampler.categories_of(dataset), seed=cfg.SEED)
    if name == "MultiDatasetTrainingSampler":
        sizes = [len(part) for part in parts or [dataset]]
        return MultiDatasetTrainingSampler(sizes, cfg.DATALOADER.DATASET_WEIGHTS, seed=cfg.SEED)
    raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be one of {', '.join(_SAMPLERS)}, got {name!r}")


def _load_train_sets(cfg) -> tuple[list | Dataset, list]:
    """The training data as one data set, and the data sets that it is made of where the sampler asks."""
    names = _as_names(cfg.DATASETS.TRAIN)
    options = {
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "min_keypoints": cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    }
    files = list(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else []
    if cfg.DATALOADER.SAMPLER_TRAIN != "MultiDatasetTrainingSampler" or len(names) < 2:
        return get_detection_dataset_dicts(names, proposal_files=files or None, **options), []
    check_metadata_consistency("thing_classes", names)
    parts = [
        get_detection_dataset_dicts([name], proposal_files=files[i : i + 1] or None, **options)
        for i, name in enumerate(names)
    ]
    if all(isinstance(part, list) for part in parts):
        return [record for part in parts for record in part], parts
    return ConcatDataset(parts), parts


def _check_proposals(cfg, dataset: list | Dataset, key: str) -> None:
    """Tells of missing proposals before a model without a proposal generator misses them."""
    if cfg.MODEL.LOAD_PROPOSALS and isinstance(dataset, list):
        if any("proposal_boxes" not in record for record in dataset):
            raise ValueError(
                f"MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_{key} is empty and the dicts "
                f"have no 'proposal_boxes': name one file for each of DATASETS.{key}"
            )


def _train_loader_from_config(cfg, mapper=None, *, dataset=None, sampler=None) -> dict:
    parts: list = []
    if dataset is None:
        dataset, parts = _load_train_sets(cfg)
        if isinstance(dataset, list) and not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            log_images_without_objects(dataset)
        if mapper is None and isinstance(dataset, list):  # a mapper of the user's may change category ids
            _check_num_classes(cfg, dataset)
    if mapper is None:
        _check_proposals(cfg, dataset, "TRAIN")
        mapper = DatasetMapper(cfg, True)
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = _build_train_sampler(cfg, dataset, parts)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": mapper,
        "total_batch_size": _pictures_per_pass(cfg.SOLVER),
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _pictures_per_pass(solver) -> int:
    """Pictures of one forward and backward pass over all processes."""
    if solver.ACCUM_STEPS < 1 or solver.IMS_PER_BATCH % solver.ACCUM_STEPS:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH = {solver.IMS_PER_BATCH} must be a multiple of SOLVER.ACCUM_STEPS = "
            f"{solver.ACCUM_STEPS}, which is at least 1"
        )
    if solver.ACCUM_STEPS > 1 and solver.IMS_PER_BATCH % (solver.ACCUM_STEPS * comm.get_world_size()):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH = {solver.IMS_PER_BATCH} must be a multiple of SOLVER.ACCUM_STEPS = "
            f"{solver.ACCUM_STEPS} times the number of processes, {comm.get_world_size()}"
        )
    return solver.IMS_PER_BATCH // solver.ACCUM_STEPS


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: list | Dataset,
    *,
    mapper: Callable | None,
    sampler: Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    **kwargs,
):
    """Build the endless loader for training; also as ``build_detection_train_loader(cfg, mapper=...)``.

    Args:
        dataset: list of dicts in the standard format, or a map-style or iterable dataset.
        mapper: turns an element into a model's input; None if the elements are such already.
        sampler: yields indices; a shuffling :class:`TrainingSampler` when left out. None for an iterable
            dataset.
        total_batch_size: number of pictures of a batch over all processes.
        aspect_ratio_grouping, num_workers, collate_fn, **kwargs: see :func:`build_batch_data_loader`.

    Returns:
        An iterable of batches, each a list of the mapper's results, or what ``collate_fn`` makes of it.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = TrainingSampler(len(dataset))
    return build_batch_data_loader(
        dataset,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def _test_loader_from_config(cfg, dataset_name, mapper=None) -> dict:
    names = _as_names(dataset_name)
    proposal_files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        # The files are listed in the order of the datasets.
        files = dict(zip(_as_names(cfg.DATASETS.TEST), cfg.DATASETS.PROPOSAL_FILES_TEST))
        proposal_files = [files[name] for name in names if name in files] or None
    dataset = get_detection_dataset_dicts(names, filter_empty=False, proposal_files=proposal_files)
    if mapper is None:
        _check_proposals(cfg, dataset, "TEST")
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if isinstance(dataset, IterableDataset) else InferenceSampler(len(dataset)),
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list | Dataset,
    *,
    mapper: Callable | None,
    sampler: Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
) -> DataLoader:
    """Build the loader for testing, which gives each picture once and in order; also as
    ``build_detection_test_loader(cfg, dataset_name, mapper=...)``.

    Args:
        dataset: list of dicts in the standard format, or a map-style or iterable dataset.
        mapper: turns an element into a model's input; None if the elements are such already.
        sampler: yields indices; an :class:`InferenceSampler`, which shares them out between the processes,
            when left out. None for an iterable dataset.
        batch_size: number of pictures of a batch in each process.
        num_workers: number of loader processes; 0 loads in this process.
        collate_fn: makes a batch of a list of elements; the list itself is the batch when left out.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise ValueError("build_detection_test_loader: sampler must be None with an iterable dataset")
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        worker_init_fn=worker_init_reset_seed,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
    )
