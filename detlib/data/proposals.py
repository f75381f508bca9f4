"""Precomputed box proposals, which a region proposal network wrote for another model."""

import logging
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import Transform

from detlib.data.datasets.file_values import MAX_COORDINATE, is_id
from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detlib.utils.file_io import PathManager
from detlib.utils.safe_pickle import load_plain_pickle

__all__ = ["check_proposals", "load_proposals_into_dataset", "transform_proposals"]

logger = logging.getLogger(__name__)

# The keys of Detectron's files.
_OLD_KEYS = {"indexes": "ids", "scores": "objectness_logits"}
_KEYS = ("ids", "boxes", "objectness_logits")


def load_proposals_into_dataset(dataset_dicts: list[dict], proposal_file: str) -> list[dict]:
    """Add precomputed proposals to dataset dicts, in place.

    The file is a pickle of plain data, such as the ``box_proposals.pkl`` that the evaluation of a proposal
    network writes: a dict of "ids" (image ids), "boxes" (for each image an array (P, 4), or (P, 5) for
    rotated boxes), "objectness_logits" ((P,) for each image; or "scores") and "bbox_mode" (the number of a
    `BoxMode`; XYXY_ABS if missing). Nothing in it is executed.

    Args:
        dataset_dicts: dataset in the standard format, with "image_id".
        proposal_file: path or URL of the pickle.

    Returns:
        ``dataset_dicts``, with "proposal_boxes", "proposal_objectness_logits" (both in descending score
        order) and "proposal_bbox_mode" in every dict.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not such a pickle, or an image is missing.
    """
    ids, boxes, logits, mode = _read(proposal_file)
    positions = {str(image_id): i for i, image_id in enumerate(ids)}
    missing = [record["image_id"] for record in dataset_dicts if str(record["image_id"]) not in positions]
    if missing:
        raise ValueError(
            f"{proposal_file} has no proposals for {len(missing)} of {len(dataset_dicts)} images, "
            f"such as image {missing[0]!r}; it has {len(positions)} images, such as "
            f"{next(iter(positions), 'none')!r}. Was it computed on this dataset?"
        )
    for record in dataset_dicts:
        position = positions[str(record["image_id"])]
        order = np.argsort(-np.asarray(logits[position]), kind="stable")
        record["proposal_boxes"] = np.asarray(boxes[position])[order]
        record["proposal_objectness_logits"] = np.asarray(logits[position])[order]
        record["proposal_bbox_mode"] = mode
    logger.info("Loaded proposals of %d images from %s", len(dataset_dicts), proposal_file)
    return dataset_dicts


def transform_proposals(
    dataset_dict: dict,
    image_shape: tuple[int, int],
    transforms: Transform,
    *,
    proposal_topk: int,
    min_box_size: float = 0,
) -> None:
    """Apply transforms to the precomputed proposals in a dataset dict, if it has any.

    The fields "proposal_boxes" ((P, 4), or (P, 5) rotated ones), "proposal_bbox_mode" and
    "proposal_objectness_logits" ((P,), descending) are replaced by "proposals", an Instances with
    ``proposal_boxes`` and ``objectness_logits``.

    Args:
        dataset_dict: dict of one image, changed in place.
        image_shape: (height, width) of the transformed image.
        transforms: the transforms of the image.
        proposal_topk: number of the best proposals to keep.
        min_box_size: drop proposals with a side of at most this length.
    """
    if "proposal_boxes" not in dataset_dict:
        return
    boxes, mode = dataset_dict.pop("proposal_boxes"), dataset_dict.pop("proposal_bbox_mode")
    if mode == BoxMode.XYWHA_ABS:
        boxes = RotatedBoxes(torch.as_tensor(transforms.apply_rotated_box(boxes).astype(np.float32)))
    else:
        boxes = BoxMode.convert(boxes, mode, BoxMode.XYXY_ABS)
        boxes = Boxes(torch.as_tensor(transforms.apply_box(boxes).astype(np.float32)))
    logits = torch.as_tensor(np.array(dataset_dict.pop("proposal_objectness_logits"), dtype=np.float32))
    boxes.clip(image_shape)
    keep = boxes.nonempty(threshold=min_box_size)
    proposals = Instances(image_shape)
    proposals.proposal_boxes = boxes[keep][:proposal_topk]
    proposals.objectness_logits = logits[keep][:proposal_topk]
    dataset_dict["proposals"] = proposals


def _read(proposal_file: str) -> tuple[Sequence, Sequence, Sequence, BoxMode]:
    """Return image ids, boxes, logits and box mode of a file, after checking them against each other."""
    path = PathManager.get_local_path(proposal_file)
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"The proposal file {proposal_file!r} (DATASETS.PROPOSAL_FILES_TRAIN or _TEST) does not exist."
        )
    with PathManager.open(path, "rb") as file:
        try:
            content = load_plain_pickle(file)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{proposal_file} is not a proposal file: {error}.") from error
    if isinstance(content, dict):
        content = {_OLD_KEYS.get(key, key): value for key, value in content.items()}
    if not isinstance(content, dict) or not all(key in content for key in _KEYS):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{proposal_file} is not a proposal file: it must have {', '.join(_KEYS)}, but has {found}."
        )
    ids, boxes, logits = (content[key] for key in _KEYS)
    mode = _box_mode(proposal_file, content.get("bbox_mode", BoxMode.XYXY_ABS))
    _check_lengths(proposal_file, ids, boxes, logits)
    ids = [i.item() if isinstance(i, np.generic) else i for i in ids]
    columns = 5 if mode == BoxMode.XYWHA_ABS else 4
    for image_id, image_boxes, image_logits in zip(ids, boxes, logits):
        _check_image(proposal_file, image_id, image_boxes, image_logits, columns)
    return ids, boxes, logits, mode


def _box_mode(proposal_file: str, value: Any) -> BoxMode:
    try:
        return BoxMode(int(value))
    except (TypeError, ValueError, OverflowError) as error:
        legal = ", ".join(f"{mode.value} ({mode.name})" for mode in BoxMode)
        raise ValueError(f"{proposal_file}: bbox_mode must be one of {legal}, not {value!r:.100}.") from error


def _check_lengths(proposal_file: str, ids: Any, boxes: Any, logits: Any) -> None:
    for key, values in zip(_KEYS, (ids, boxes, logits)):
        if not isinstance(values, list | tuple | np.ndarray) or getattr(values, "ndim", 1) == 0:
            raise ValueError(
                f"{proposal_file}: {key!r} must be a list with one entry for each image, not a "
                f"{type(values).__name__}."
            )
    if not len(ids) == len(boxes) == len(logits):
        raise ValueError(
            f"{proposal_file}: ids, boxes and objectness_logits must have one entry for each image, but have "
            f"{len(ids)}, {len(boxes)} and {len(logits)}."
        )


def _check_image(proposal_file: str, image_id: Any, boxes: Any, logits: Any, columns: int) -> None:
    """Check the proposals of an image: (P, `columns`) boxes and (P,) logits of finite numbers."""
    if not is_id(image_id):
        raise ValueError(
            f"{proposal_file}: image ids must be strings or integers of up to 64 bits, not a "
            f"{type(image_id).__name__}."
        )
    found = f"{proposal_file}: image {image_id!r} has"
    try:
        boxes, logits = np.asarray(boxes), np.asarray(logits)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found} boxes or logits that are not arrays: {error}.") from error
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5) or logits.shape != boxes.shape[:1]:
        raise ValueError(
            f"{found} boxes of shape {boxes.shape} and logits of shape {logits.shape}; they must be (P, 4) "
            "or (P, 5), and (P,)."
        )
    if boxes.shape[1] != columns:
        raise ValueError(f"{found} boxes of {boxes.shape[1]} numbers; in its bbox_mode they have {columns}.")
    # The comparison is False for NaN.
    if boxes.dtype.kind not in "iuf" or not (np.abs(boxes) <= MAX_COORDINATE).all():
        raise ValueError(f"{found} boxes with values that are not finite numbers up to {MAX_COORDINATE}.")
    if logits.dtype.kind not in "iuf" or np.isnan(logits).any():
        raise ValueError(f"{found} logits that are not numbers.")


def check_proposals(cfg: Any, dataset: Any, key: str) -> None:
    """Check that a model without a proposal generator gets proposals.

    Args:
        cfg: the config.
        dataset: list of dicts in the standard format; other datasets are not checked.
        key: "TRAIN" or "TEST", for the message.

    Raises:
        ValueError: A dict has no "proposal_boxes".
    """
    if cfg.MODEL.LOAD_PROPOSALS and isinstance(dataset, list):
        if any("proposal_boxes" not in record for record in dataset):
            raise ValueError(
                f"MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_{key} is empty and the dicts "
                f"have no 'proposal_boxes': name one file for each of DATASETS.{key}"
            )
