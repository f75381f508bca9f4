"""Tools for writing dataset mappers: reading pictures, transforming annotations, augmentation by config.

What is not specific to a config or a catalog lives in `readers` and `annotations` and is handed on here.
"""

import numpy as np
import torch

from detlib.structures import BoxMode

from .annotations import (
    annotations_to_instances,
    annotations_to_instances_rotated,
    filter_empty_instances,
    transform_instance_annotations,
    transform_keypoint_annotations,
    transform_proposals,
)
from .catalog import MetadataCatalog
from .readers import (
    ImageReadError,
    SizeMismatchError,
    check_image_size,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
    image_to_tensor,
    read_image,
    read_label_map,
)
from .transforms import (
    Augmentation,
    CropTransform,
    FixedSizeCrop,
    RandomColorJitter,
    RandomFlip,
    ResizeScale,
    ResizeShortestEdge,
)

__all__ = [
    "ImageReadError",
    "SizeMismatchError",
    "annotations_to_instances",
    "annotations_to_instances_rotated",
    "build_augmentation",
    "build_transform_gen",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "create_keypoint_hflip_indices",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "get_fed_loss_cls_weights",
    "image_to_tensor",
    "read_image",
    "read_label_map",
    "transform_instance_annotations",
    "transform_keypoint_annotations",
    "transform_proposals",
]


def check_metadata_consistency(key: str, dataset_names: list[str]) -> None:
    """Check that datasets which are used together agree in one entry of their metadata.

    Args:
        key: name of the entry, such as "thing_classes".
        dataset_names: at least one name.

    Raises:
        ValueError: they differ.
    """
    if len(dataset_names) == 0:
        raise ValueError("check_metadata_consistency: dataset_names must not be empty")
    first = getattr(MetadataCatalog.get(dataset_names[0]), key, None)
    for name in dataset_names[1:]:
        other = getattr(MetadataCatalog.get(name), key, None)
        if other != first:
            raise ValueError(
                f"datasets that are used together must have the same {key!r}: {dataset_names[0]!r} has "
                f"{first}, {name!r} has {other}"
            )


def create_keypoint_hflip_indices(dataset_names: str | list[str]) -> list[int]:
    """Find which keypoint takes the place of each when a picture is mirrored.

    Args:
        dataset_names: datasets whose metadata has ``keypoint_names`` and ``keypoint_flip_map``, a list of
            pairs such as ("left_eye", "right_eye").

    Returns:
        For each keypoint, the index of the one that takes its place.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    check_metadata_consistency("keypoint_names", names)
    check_metadata_consistency("keypoint_flip_map", names)
    metadata = MetadataCatalog.get(names[0])
    keypoint_names = list(metadata.keypoint_names)
    partner = {}
    for left, right in metadata.keypoint_flip_map:
        partner[left], partner[right] = right, left
    return [keypoint_names.index(partner.get(name, name)) for name in keypoint_names]


def get_fed_loss_cls_weights(dataset_names: str | list[str], freq_weight_power: float = 1.0) -> torch.Tensor:
    """Class weights of the federated loss: the number of pictures of each class, to a power.

    Args:
        dataset_names: datasets whose metadata has ``class_image_count``, a list of dicts with "id" and
            "image_count".
        freq_weight_power: the exponent.

    Returns:
        (K,) float32 tensor, in the order of the ids.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    check_metadata_consistency("class_image_count", names)
    counts = sorted(MetadataCatalog.get(names[0]).class_image_count, key=lambda entry: entry["id"])
    return torch.tensor([entry["image_count"] for entry in counts]).float() ** freq_weight_power


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: dict
) -> CropTransform:
    """Draw a crop that holds the centre of one instance's box.

    Args:
        crop_size: (height, width) of the crop.
        image_size: (height, width) of the picture.
        instance: annotation with "bbox" and "bbox_mode".

    Raises:
        ValueError: the crop is larger than the picture, or the centre lies outside it.
    """
    crop_size, image_size = np.asarray(crop_size, dtype=np.int64), np.asarray(image_size, dtype=np.int64)
    x0, y0, x1, y1 = BoxMode.convert(instance["bbox"], instance["bbox_mode"], BoxMode.XYXY_ABS)
    center = np.array([(y0 + y1) * 0.5, (x0 + x1) * 0.5])
    if (center < 0).any() or (center > image_size).any():
        raise ValueError(f"the centre (y, x) = {tuple(center)} of the box is outside {tuple(image_size)}")
    if (crop_size > image_size).any():
        raise ValueError(f"crop_size {tuple(crop_size)} is larger than the picture {tuple(image_size)}")
    low = np.maximum(np.floor(center).astype(np.int64) - crop_size, 0)
    high = np.minimum(np.maximum(image_size - crop_size, 0), np.ceil(center).astype(np.int64))
    crop_y = np.random.randint(low[0], high[0] + 1)
    crop_x = np.random.randint(low[1], high[1] + 1)
    return CropTransform(crop_x, crop_y, int(crop_size[1]), int(crop_size[0]))


def _build_color_jitter(cfg) -> list[Augmentation]:
    jitter = cfg.INPUT.COLOR_JITTER
    strengths = jitter.BRIGHTNESS, jitter.CONTRAST, jitter.SATURATION, jitter.HUE
    return [RandomColorJitter(*strengths, image_format=cfg.INPUT.FORMAT)] if any(strengths) else []


def build_augmentation(cfg, is_train: bool) -> list[Augmentation]:
    """The default augmentations of a config: resizing and, for training, flips and colours.

    Args:
        cfg: reads ``INPUT.{MIN,MAX}_SIZE_{TRAIN,TEST}``, ``INPUT.MIN_SIZE_TRAIN_SAMPLING``,
            ``INPUT.RANDOM_FLIP``, ``INPUT.LSJ`` and ``INPUT.COLOR_JITTER``.
        is_train: for training or for testing.
    """
    if not is_train:
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP must be 'none', 'horizontal' or 'vertical', got {flip!r}")
    flips = (
        [] if flip == "none" else [RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]
    )
    if cfg.INPUT.LSJ.ENABLED:
        size = tuple(cfg.INPUT.LSJ.SIZE)
        resize = [ResizeScale(*cfg.INPUT.LSJ.SCALE, *size), FixedSizeCrop(size)]
    else:
        resize = [
            ResizeShortestEdge(
                cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
            )
        ]
    return resize + flips + _build_color_jitter(cfg)


build_transform_gen = build_augmentation  # an earlier name, still found in projects
