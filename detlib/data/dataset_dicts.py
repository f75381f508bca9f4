"""Loading datasets in the standard format for training and testing: filters, checks, statistics."""

import logging
from itertools import chain, zip_longest

import numpy as np
from tabulate import tabulate
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from detlib.utils.logger import log_first_n

from .catalog import DatasetCatalog, MetadataCatalog
from .detection_utils import check_metadata_consistency
from .proposals import load_proposals_into_dataset

__all__ = [
    "check_category_ids",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "log_images_without_objects",
    "print_instances_class_histogram",
]

logger = logging.getLogger(__name__)


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Drop pictures without annotations, or with crowd regions only.

    Args:
        dataset_dicts: annotated dataset in the standard format.

    Returns:
        The pictures that stay, in a new list.
    """
    kept = [record for record in dataset_dicts if _has_objects(record)]
    logger.info(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS: dropped %d of %d images, those without objects; %d are left",
        len(dataset_dicts) - len(kept),
        len(dataset_dicts),
        len(kept),
    )
    return kept


def log_images_without_objects(dataset_dicts: list[dict]) -> None:
    """Log how many pictures without objects, or with crowd regions only, are kept as negatives, if any."""
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
    """Drop pictures with fewer than ``min_keypoints_per_image`` labelled keypoints.

    Args:
        dataset_dicts: annotated dataset in the standard format.
        min_keypoints_per_image: smallest number that stays.

    Returns:
        The pictures that stay, in a new list.
    """

    def count(record: dict) -> int:
        points = (anno["keypoints"] for anno in record.get("annotations", ()) if "keypoints" in anno)
        return sum(int((np.asarray(p)[2::3] > 0).sum()) for p in points)

    kept = [record for record in dataset_dicts if count(record) >= min_keypoints_per_image]
    logger.info(
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE: dropped %d of %d images, those with fewer than %d "
        "keypoints; %d are left",
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
        source: what the number of classes comes from, for the message.

    Raises:
        ValueError: one is not; image and file are named.
    """
    legal = frozenset(range(num_classes))  # 1.0 and numpy's numbers are found in it as well
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
    """Log how many objects of each class there are; crowd regions do not count.

    Args:
        dataset_dicts: annotated dataset in the standard format.
        class_names: the name of each category id.
    """
    check_category_ids(dataset_dicts, len(class_names), f"{len(class_names)} class names")
    annotations = chain.from_iterable(record.get("annotations", ()) for record in dataset_dicts)
    ids = [anno["category_id"] for anno in annotations if not anno.get("iscrowd", 0)]
    counts = np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(class_names))

    def shorten(name: str) -> str:  # LVIS has names that would break the table
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
    log_first_n(logging.INFO, f"Objects of all {len(class_names)} categories:\n{table}", key="message")


def _load(names: list[str]) -> list:
    """The datasets of these names; none of them empty."""
    datasets = []
    for name in names:
        dataset = DatasetCatalog.get(name)
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise ValueError(f"dataset {name!r} is empty: it holds no image")
        datasets.append(dataset)
    return datasets


def get_detection_dataset_dicts(
    names: str | list[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: list[str] | None = None,
    check_consistency: bool = True,
) -> list[dict] | Dataset:
    """Load datasets by name, check them, and drop the pictures that have nothing to train on.

    Args:
        names: registered names or addresses.
        filter_empty: drop pictures without annotations other than crowd regions
            (``DATALOADER.FILTER_EMPTY_ANNOTATIONS``).
        min_keypoints: drop pictures with fewer labelled keypoints
            (``MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE``); 0 for no such filter.
        proposal_files: one file of precomputed proposals for each name, see
            :func:`load_proposals_into_dataset`; None for none.
        check_consistency: require that all datasets have the same ``thing_classes``.

    Returns:
        All pictures in one list; or, where the catalog gives torch Datasets, these as one dataset, as they
        are.

    Raises:
        KeyError: a name is not known.
        ValueError: a dataset is empty, or nothing is left of it; a category id has no class; the classes
            differ; there are not as many files of proposals as names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("no dataset is named; set DATASETS.TRAIN or DATASETS.TEST")
    if proposal_files is not None and len(proposal_files) != len(names):
        raise ValueError(
            "there must be one file of proposals for each dataset (DATASETS.PROPOSAL_FILES_TRAIN for "
            f"DATASETS.TRAIN, when MODEL.LOAD_PROPOSALS is True): got {list(proposal_files)} for {names}"
        )
    datasets = _load(names)
    if any(isinstance(dataset, Dataset) for dataset in datasets):
        if proposal_files:
            raise ValueError("precomputed proposals are added to lists of dicts, not to torch Datasets")
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
    """Apply the two filters; an empty result is an error that names the key."""
    quoted = ", ".join(repr(name) for name in names)
    total = len(records)
    if filter_empty:
        records = filter_images_with_only_crowd_annotations(records)
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
                f"none of the {total} images of dataset {quoted} has {min_keypoints} labelled keypoints "
                "(MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)"
            )
    return records
