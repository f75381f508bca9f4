"""Loading, filtering and checking datasets for training and testing, and the data loaders over them."""

import logging
import sys
from collections.abc import Callable, Sized
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler

from detlib.config import configurable
from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.common import (
    AspectRatioGroupedDataset,
    DatasetFromList,
    MapDataset,
    PositionedSampler,
    ResumableLoader,
    aspect_ratio_group,
    identity,
    unmapped,
)
from detlib.data.dataset_mapper import DatasetMapper
from detlib.data.detection_utils import as_names, check_metadata_consistency
from detlib.data.proposals import check_proposals, load_proposals_into_dataset
from detlib.data.samplers.distributed_sampler import (
    EndlessSampler,
    InferenceSampler,
    TrainingSampler,
    build_train_sampler,
)
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from detlib.utils.logger import log_first_n

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "images_per_epoch",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

logger = logging.getLogger(__name__)


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Drop images without annotations or with only crowd regions.

    Args:
        dataset_dicts: annotated dataset in the standard format.

    Returns:
        The remaining images, in a new list.
    """
    kept = [record for record in dataset_dicts if _has_objects(record)]
    logger.info(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS: dropped %d of %d images that have no objects, %d are left",
        len(dataset_dicts) - len(kept),
        len(dataset_dicts),
        len(kept),
    )
    return kept


def log_images_without_objects(dataset_dicts: list[dict]) -> None:
    """Log the number of images that are kept as negatives: without objects, or with only crowd regions."""
    count = sum(not _has_objects(record) for record in dataset_dicts)
    if count:
        logger.info(
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False: kept %d of %d images that have no objects",
            count,
            len(dataset_dicts),
        )


def _has_objects(record: dict) -> bool:
    return any(anno.get("iscrowd", 0) == 0 for anno in record.get("annotations", ()))


def filter_images_with_few_keypoints(dataset_dicts: list[dict], min_keypoints_per_image: int) -> list[dict]:
    """Drop images with fewer than ``min_keypoints_per_image`` labeled keypoints.

    Args:
        dataset_dicts: annotated dataset in the standard format.
        min_keypoints_per_image: smallest number of keypoints of an image that is kept.

    Returns:
        The remaining images, in a new list.
    """

    def count(record: dict) -> int:
        points = (anno["keypoints"] for anno in record.get("annotations", ()) if "keypoints" in anno)
        return sum(int((np.asarray(p)[2::3] > 0).sum()) for p in points)

    kept = [record for record in dataset_dicts if count(record) >= min_keypoints_per_image]
    logger.info(
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE: dropped %d of %d images that have fewer than %d "
        "keypoints, %d are left",
        len(dataset_dicts) - len(kept),
        len(dataset_dicts),
        min_keypoints_per_image,
        len(kept),
    )
    return kept


def check_category_ids(dataset_dicts: list[dict], num_classes: int, source: str) -> None:
    """Check that every category id is an int in [0, num_classes).

    Args:
        dataset_dicts: dataset in the standard format.
        num_classes: number of classes.
        source: where the number of classes comes from, for the message.

    Raises:
        ValueError: if one is not, naming image and file.
    """
    legal = frozenset(range(num_classes))  # also contains 1.0 and numpy scalars
    annotations = chain.from_iterable(record.get("annotations", ()) for record in dataset_dicts)
    if legal.issuperset(anno.get("category_id") for anno in annotations):
        return
    for record in dataset_dicts:
        for index, anno in enumerate(record.get("annotations", ())):
            category_id = anno.get("category_id")
            if category_id not in legal:
                image = f"image {record.get('image_id')!r} (file {record.get('file_name')})"
                raise ValueError(
                    f"annotation {index} of {image}: category_id must be an int from 0 to {num_classes - 1} "
                    f"({source}), got {category_id!r}"
                )


def print_instances_class_histogram(dataset_dicts: list[dict], class_names: list[str]) -> None:
    """Log the number of objects of each class, without crowd regions.

    Args:
        dataset_dicts: annotated dataset in the standard format.
        class_names: the name of each category id.
    """
    check_category_ids(dataset_dicts, len(class_names), f"{len(class_names)} class names")
    annotations = chain.from_iterable(record.get("annotations", ()) for record in dataset_dicts)
    ids = [anno["category_id"] for anno in annotations if not anno.get("iscrowd", 0)]
    counts = np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(class_names))

    def shorten(name: str) -> str:  # LVIS has names that are too long for the table
        return name if len(name) <= 13 else name[:11] + ".."

    cells = list(chain.from_iterable((shorten(name), int(n)) for name, n in zip(class_names, counts)))
    if len(class_names) > 1:
        cells += [None] * (-len(cells) % 6) if len(class_names) > 3 else []
        cells += ["total", int(counts.sum())]
    columns = min(6, len(cells))
    rows = zip_longest(*[iter(cells)] * columns)
    table = tabulate(
        rows,
        headers=(["category", "#instances"] * 3)[:columns],
        tablefmt="pipe",
        numalign="right",
        stralign="center",
    )
    log_first_n(
        logging.INFO,
        f"Number of objects of each of the {len(class_names)} categories:\n{table}",
        key="message",
    )


def _load(names: list[str]) -> list:
    """Load datasets by name; raise ValueError if one is empty."""
    datasets = []
    for name in names:
        dataset = DatasetCatalog.get(name)
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise ValueError(f"dataset {name!r} is empty: it has no images")
        datasets.append(dataset)
    return datasets


def get_detection_dataset_dicts(
    names: str | list[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: list[str] | None = None,
    check_consistency: bool = True,
) -> list[dict] | Dataset:
    """Load datasets by name, check them, and drop images that have nothing to train on.

    Args:
        names: registered names or dataset URIs.
        filter_empty: drop images without annotations other than crowd regions
            (``DATALOADER.FILTER_EMPTY_ANNOTATIONS``).
        min_keypoints: drop images with fewer labeled keypoints
            (``MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE``); 0 keeps all.
        proposal_files: one file of precomputed proposals for each name, see `load_proposals_into_dataset`.
        check_consistency: require that all datasets have the same ``thing_classes``.

    Returns:
        All images in one list; if the catalog returns torch Datasets, these unchanged as one dataset.

    Raises:
        KeyError: if a name is unknown.
        ValueError: if a dataset is empty or the filters leave nothing of it, a category id has no class, the
            classes differ, or the numbers of proposal files and names differ.
    """
    names = as_names(names)
    if not names:
        raise ValueError("no dataset is given; set DATASETS.TRAIN or DATASETS.TEST")
    if proposal_files is not None and len(proposal_files) != len(names):
        raise ValueError(
            "there must be one proposal file for each dataset (DATASETS.PROPOSAL_FILES_TRAIN for "
            f"DATASETS.TRAIN, when MODEL.LOAD_PROPOSALS is True): got {list(proposal_files)} for {names}"
        )
    datasets = _load(names)
    if any(isinstance(dataset, Dataset) for dataset in datasets):
        if proposal_files:
            raise ValueError(
                "precomputed proposals can be added to lists of dicts only, not to torch Datasets"
            )
        return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
    if proposal_files:
        datasets = [load_proposals_into_dataset(*pair) for pair in zip(datasets, proposal_files)]

    for name, records in zip(names, datasets):
        class_names = getattr(MetadataCatalog.get(name), "thing_classes", None)
        if class_names is not None:
            source = f"dataset {name!r} has {len(class_names)} thing_classes"
            check_category_ids(records, len(class_names), source)

    records = list(chain.from_iterable(datasets))
    if any("annotations" in record for record in records):
        records = _filter(records, names, filter_empty, min_keypoints)
        if check_consistency:
            check_metadata_consistency("thing_classes", names)
        class_names = getattr(MetadataCatalog.get(names[0]), "thing_classes", None)
        if check_consistency and class_names is not None:
            print_instances_class_histogram(records, class_names)
    return records


def _filter(records: list[dict], names: list[str], filter_empty: bool, min_keypoints: int) -> list[dict]:
    """Apply the two filters; raise ValueError, naming the config key, if nothing is left."""
    quoted = ", ".join(repr(name) for name in names)
    total = len(records)
    annotations = [a for record in records for a in record.get("annotations", ())]
    crowds = sum(bool(annotation.get("iscrowd", 0)) for annotation in annotations)
    if crowds:
        level = logging.WARNING if crowds > 0.2 * len(annotations) else logging.INFO
        message = "%d of %d objects of dataset %s are crowd regions (iscrowd 1), which are not trained on"
        logger.log(level, message, crowds, len(annotations), quoted)
    if filter_empty:
        records = filter_images_with_only_crowd_annotations(records)
        if not records and crowds:
            raise ValueError(
                f"none of the {total} images of dataset {quoted} has an object to train on: all {crowds} are "
                "crowd regions (iscrowd 1). If they are objects, as with tools that export every mask so, "
                "read them with ?crowd=objects behind the dataset URI"
            )
        if not records:
            raise ValueError(
                f"none of the {total} images of dataset {quoted} has an object, and "
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True, which drops such images; set it to False to "
                "use them, or check the annotations"
            )
    if min_keypoints > 0:
        total = len(records)
        records = filter_images_with_few_keypoints(records, min_keypoints)
        if not records:
            raise ValueError(
                f"none of the {total} images of dataset {quoted} has {min_keypoints} labeled keypoints "
                "(MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)"
            )
    return records


def trivial_batch_collator(batch: list) -> list:
    """Return the list of elements itself as the batch."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed Python, numpy and torch of a loader worker with a seed of its own."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
    if "cv2" in sys.modules:  # OpenCV's threads do not survive a fork, and workers run in parallel already
        sys.modules["cv2"].setNumThreads(0)


def _batch_size_per_process(total_batch_size: int | None, single_gpu_batch_size: int | None) -> int:
    if (total_batch_size is None) == (single_gpu_batch_size is None):
        raise ValueError(
            "build_batch_data_loader: pass either total_batch_size or single_gpu_batch_size, got "
            f"{total_batch_size} and {single_gpu_batch_size}"
        )
    if total_batch_size is None:
        return single_gpu_batch_size  # type: ignore[return-value]  # one of them is given
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

    The order of the images of a map-style dataset does not depend on the number of workers.

    Args:
        dataset: map-style or iterable; an iterable one must shard itself across processes and workers.
        sampler: yields indices into a map-style dataset; None for an iterable one.
        total_batch_size: number of images of a batch over all processes, a multiple of their number; None if
            ``single_gpu_batch_size`` is set.
        aspect_ratio_grouping: build each batch from images that are all wider than high, or all not.
            Elements must be dicts with "width" and "height".
        num_workers: number of loader processes; 0 loads in this process.
        collate_fn: turns a list of elements into a batch; by default, the list itself is the batch.
        drop_last: drop the last batch if it is not full; must be True with ``aspect_ratio_grouping``.
        single_gpu_batch_size: number of images of a batch in this process, instead of ``total_batch_size``.
        prefetch_factor: number of batches (elements, with ``aspect_ratio_grouping``) that each worker
            prepares.
        persistent_workers: keep the workers for the next iteration over the loader.
        pin_memory: see `torch.utils.data.DataLoader`.
        seed: seed of the workers' random numbers; by default derived from torch's global generator.
        **kwargs: further arguments of `torch.utils.data.DataLoader`.

    Returns:
        A `ResumableLoader`, an iterable of batches. With an endless sampler of `detlib.data.samplers`, its
        ``state_dict`` and ``load_state_dict`` save and restore the position.

    Raises:
        ValueError: if arguments contradict each other, or the processes cannot get equal shares of the batch.
    """
    batch_size = _batch_size_per_process(total_batch_size, single_gpu_batch_size)
    if isinstance(dataset, IterableDataset) and sampler is not None:
        raise ValueError("build_batch_data_loader: sampler must be None with an iterable dataset")
    if num_workers > 0:
        kwargs.update(prefetch_factor=prefetch_factor, persistent_workers=persistent_workers)
    positioned = None
    if isinstance(sampler, EndlessSampler):
        positioned = PositionedSampler(sampler, with_positions=isinstance(dataset, MapDataset))
    kwargs.update(num_workers=num_workers, pin_memory=pin_memory, sampler=positioned or sampler)
    kwargs.setdefault("worker_init_fn", worker_init_reset_seed)
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)

    if not aspect_ratio_grouping:
        collate_fn = trivial_batch_collator if collate_fn is None else collate_fn
        loader = DataLoader(
            dataset, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn, **kwargs
        )
        return ResumableLoader(loader, batch_size, positioned)
    if not drop_last:
        raise ValueError("build_batch_data_loader: aspect_ratio_grouping needs drop_last=True")
    if isinstance(
        dataset, MapDataset
    ):  # the groups must be known from the unmapped elements to restore a position
        dataset.keep_groups(aspect_ratio_group)
    elements = DataLoader(dataset, batch_size=None, collate_fn=identity, **kwargs)
    batches = AspectRatioGroupedDataset(elements, batch_size)
    batches = batches if collate_fn is None else MapDataset(batches, collate_fn)
    return ResumableLoader(batches, batch_size, positioned, grouped_dataset=unmapped(dataset))


def images_per_epoch(loader: Any) -> int | None:
    """Return the number of elements that a loader of `build_batch_data_loader` draws from, None if
    unknown."""
    while hasattr(loader, "dataset"):
        loader = loader.dataset
    return len(loader) if isinstance(loader, Sized) else None


def _check_num_classes(cfg, dataset_dicts: list[dict]) -> None:
    """Compare the model's number of classes with the data, before a label fails inside a loss."""
    from detlib.modeling import facts_of

    key = facts_of(cfg).num_classes_keys(cfg).get("thing_classes")
    if key is None:
        return
    num_classes = cfg
    for part in key.split("."):
        num_classes = num_classes[part]
    check_category_ids(dataset_dicts, num_classes, f"{key} is {num_classes}")
    name = as_names(cfg.DATASETS.TRAIN)[0]
    class_names = getattr(MetadataCatalog.get(name), "thing_classes", None)
    if class_names is not None and len(class_names) != num_classes:
        logger.warning("%s is %d, but dataset %r has %d classes", key, num_classes, name, len(class_names))


def _check_masks_and_keypoints(cfg, dataset_dicts: list[dict]) -> None:
    """Raise ValueError if the config trains a head for which some objects have no ground truth."""
    for key, what, switch in (
        ("segmentation", "mask", "MODEL.MASK_ON"),
        ("keypoints", "keypoints", "MODEL.KEYPOINT_ON"),
    ):
        if not getattr(cfg.MODEL, switch.removeprefix("MODEL.")):
            continue
        total, lacking = 0, []
        for record in dataset_dicts:
            objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            total += len(objects)
            lacking += [record.get("file_name") for a in objects if a.get(key) is None or len(a[key]) == 0]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {total} objects have no {what} ({key!r}), the first one in {lacking[0]}, "
                f"but {switch} is True. Set {switch} to False to train without, or leave such objects out of "
                "the annotations"
            )


def _load_train_sets(cfg) -> tuple[list | Dataset, list]:
    """Return the training data as one dataset, and its parts if the sampler needs them."""
    names = as_names(cfg.DATASETS.TRAIN)
    options = {
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "min_keypoints": cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    }
    files = list(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else []
    if cfg.DATALOADER.SAMPLER_TRAIN != "MultiDatasetTrainingSampler" or len(names) < 2:
        return get_detection_dataset_dicts(names, proposal_files=files or None, **options), []
    check_metadata_consistency("thing_classes", names)
    parts: list[Any] = [
        get_detection_dataset_dicts([name], proposal_files=files[i : i + 1] or None, **options)
        for i, name in enumerate(names)
    ]
    if all(isinstance(part, list) for part in parts):
        return [record for part in parts for record in part], parts
    return ConcatDataset(parts), parts


def _train_loader_from_config(cfg, mapper=None, *, dataset=None, sampler=None) -> dict:
    parts: list = []
    if dataset is None:
        dataset, parts = _load_train_sets(cfg)
        if isinstance(dataset, list) and not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            log_images_without_objects(dataset)
        if mapper is None and isinstance(dataset, list):  # a custom mapper may change category ids
            _check_num_classes(cfg, dataset)
            _check_masks_and_keypoints(cfg, dataset)
    if mapper is None:
        check_proposals(cfg, dataset, "TRAIN")
        mapper = DatasetMapper(cfg, True)
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = build_train_sampler(cfg, dataset, parts)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": mapper,
        "total_batch_size": _images_per_pass(cfg.SOLVER),
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _images_per_pass(solver) -> int:
    """Return the number of images of one forward and backward pass over all processes."""
    if solver.ACCUM_STEPS < 1 or solver.IMS_PER_BATCH % solver.ACCUM_STEPS:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH = {solver.IMS_PER_BATCH} must be a multiple of SOLVER.ACCUM_STEPS = "
            f"{solver.ACCUM_STEPS}, which must be at least 1"
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
    """Build the endless training loader; also called as ``build_detection_train_loader(cfg, mapper=...)``.

    Args:
        dataset: list of dicts in the standard format, or a map-style or iterable dataset.
        mapper: turns an element into a model's input; None if the elements are model inputs already.
        sampler: yields indices; by default a shuffling `TrainingSampler`. None for an iterable dataset.
        total_batch_size: number of images of a batch over all processes.
        aspect_ratio_grouping, num_workers, collate_fn, **kwargs: see `build_batch_data_loader`.

    Returns:
        An iterable of batches, each a list of the mapper's results, or the result of ``collate_fn`` on it.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = TrainingSampler(len(dataset))  # type: ignore[arg-type]
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
    names = as_names(dataset_name)
    proposal_files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        # The files come in the order of the datasets.
        files = dict(zip(as_names(cfg.DATASETS.TEST), cfg.DATASETS.PROPOSAL_FILES_TEST))
        proposal_files = [files[name] for name in names if name in files] or None
    dataset = get_detection_dataset_dicts(names, filter_empty=False, proposal_files=proposal_files)
    if mapper is None:
        check_proposals(cfg, dataset, "TEST")
    streams = isinstance(dataset, IterableDataset)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if streams else InferenceSampler(len(dataset)),  # type: ignore[arg-type]
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
    """Build the test loader, which yields each image once and in order.

    Also called as ``build_detection_test_loader(cfg, dataset_name, mapper=...)``.

    Args:
        dataset: list of dicts in the standard format, or a map-style or iterable dataset.
        mapper: turns an element into a model's input; None if the elements are model inputs already.
        sampler: yields indices; by default an `InferenceSampler`, which shards them across the processes.
            None for an iterable dataset.
        batch_size: number of images of a batch in each process.
        num_workers: number of loader processes; 0 loads in this process.
        collate_fn: turns a list of elements into a batch; by default, the list itself is the batch.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise ValueError("build_detection_test_loader: sampler must be None with an iterable dataset")
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        worker_init_fn=worker_init_reset_seed,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
    )
