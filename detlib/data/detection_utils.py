"""Tools for writing dataset mappers: annotations, their transforms, and augmentations built from a config.

R instances, P points of a polygon, K keypoints.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from fvcore.transforms import transform as fvt
from fvcore.transforms.transform import HFlipTransform, Transform, TransformList

from detlib.data.catalog import MetadataCatalog
from detlib.data.image_io import (
    ImageReadError,
    SizeMismatchError,
    check_image_size,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
    image_to_tensor,
    read_image,
    read_label_map,
)
from detlib.data.proposals import transform_proposals
from detlib.data.transforms import (
    Augmentation,
    CropTransform,
    FixedSizeCrop,
    RandomColorJitter,
    RandomFlip,
    ResizeScale,
    ResizeShortestEdge,
)
from detlib.data.transforms import transform as T  # noqa: N812 (the name that mappers use)
from detlib.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
    polygons_to_bitmask,
)
from detlib.structures.rle import decode_rle

__all__ = [
    "ImageReadError",
    "SizeMismatchError",
    "annotations_to_instances",
    "annotations_to_instances_rotated",
    "as_names",
    "build_augmentation",
    "build_transform_gen",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "create_keypoint_hflip_indices",
    "decode_rle",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "get_fed_loss_cls_weights",
    "image_to_tensor",
    "read_image",
    "read_label_map",
    "transform_annotations_batched",
    "transform_instance_annotations",
    "transform_keypoint_annotations",
    "transform_proposals",
]

# The `apply_coords` of these computes the same for each point, whatever other points come along, so that
# results for a batch are equal to the last bit. Unknown transforms may do anything.
_POINTWISE = {
    T.ColorTransform,
    T.ExtentTransform,
    T.HFlipTransform,
    T.NoOpTransform,
    T.PILColorTransform,
    T.PadTransform,
    T.ResizeTransform,
    T.VFlipTransform,
    fvt.BlendTransform,
    fvt.PadTransform,
    fvt.ScaleTransform,
}
# These also clip polygons, which changes the number of points.
_CROPS = {T.CropTransform, fvt.CropTransform}


def transform_instance_annotations(
    annotation: dict, transforms, image_size: tuple[int, int], *, keypoint_hflip_indices=None
) -> dict:
    """Apply transforms to the box, the mask and the keypoints of one instance.

    Args:
        annotation: dict of one instance in the standard format, changed in place; its arrays are not.
        transforms: a Transform, or a list of them.
        image_size: (height, width) of the transformed image.
        keypoint_hflip_indices: see `create_keypoint_hflip_indices`; needed if an image with keypoints is
            flipped horizontally.

    Returns:
        ``annotation``, with "bbox" (4,) float64 in XYXY_ABS, clipped to the image, or for a rotated box (5,)
        float64 in XYWHA_ABS, not clipped; "segmentation" a list of (2P,) float64 polygons, or an (H, W) array
        if it was an RLE or an array; "keypoints" (K, 3) float64.
    """
    if isinstance(transforms, (tuple, list)):
        transforms = TransformList(transforms)
    if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
        annotation["bbox"] = _transform_rotated_box(annotation["bbox"], transforms)
    else:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        height, width = image_size
        box = transforms.apply_box(np.array([box], dtype=np.float64))[0].clip(min=0)
        annotation["bbox"] = np.minimum(box, [width, height, width, height])
        annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(
            annotation["segmentation"], transforms, image_size
        )
    if "keypoints" in annotation:
        annotation["keypoints"] = transform_keypoint_annotations(
            annotation["keypoints"], transforms, image_size, keypoint_hflip_indices
        )
    return annotation


def _transform_rotated_box(box, transforms: Transform) -> np.ndarray:
    box = np.asarray(box, dtype=np.float64)
    if box.shape != (5,):
        raise ValueError(
            f"a bbox in BoxMode.XYWHA_ABS has 5 numbers (center x, center y, width, height, angle), got {box}"
        )
    return transforms.apply_rotated_box(box[None])[0]


def _to_points(polygon) -> np.ndarray:
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)


def _transform_segmentation(segmentation, transforms: Transform, image_size: tuple[int, int]):
    if isinstance(segmentation, list):
        polygons = transforms.apply_polygons([_to_points(polygon) for polygon in segmentation])
        return [polygon.reshape(-1) for polygon in polygons]
    if isinstance(segmentation, (dict, np.ndarray)):
        source = decode_rle(segmentation) if isinstance(segmentation, dict) else segmentation
        # Transforms pad segmentations with 255 ("ignore"), which is not part of an object.
        mask = (transforms.apply_segmentation((source != 0).astype(np.uint8)) == 1).astype(np.uint8)
        if tuple(mask.shape[:2]) != tuple(image_size):
            raise ValueError(
                f"the mask (RLE) of size {source.shape[:2]} becomes {tuple(mask.shape[:2])} under the "
                f"transforms of the image, but the image becomes {tuple(image_size)}; they must agree"
            )
        return mask
    raise TypeError(
        f"segmentation of type {type(segmentation).__name__} cannot be transformed; it must be a list of "
        "polygons [x0, y0, x1, y1, ...], a dict in COCO's RLE format or an (H, W) array"
    )


def _is_mirrored(transform: Transform) -> bool:
    """Return whether left and right are swapped: by an odd number of horizontal flips, also inside lists.

    A vertical flip does not count, as in detectron2. Other transforms may have an attribute ``mirrors``.
    """
    if isinstance(transform, TransformList):
        return sum(_is_mirrored(step) for step in transform.transforms) % 2 == 1
    return isinstance(transform, HFlipTransform) or bool(getattr(transform, "mirrors", False))


def transform_keypoint_annotations(
    keypoints, transforms: Transform, image_size: tuple[int, int], keypoint_hflip_indices=None
) -> np.ndarray:
    """Apply transforms to the keypoints of one instance.

    Unlabeled keypoints and those outside the transformed image become (0, 0, 0).

    Args:
        keypoints: 3K numbers (x, y, visibility), absolute pixels.
        transforms: the transforms of the image.
        image_size: (height, width) of the transformed image.
        keypoint_hflip_indices: (K,) ints, for each keypoint the one that takes its place if the image is
            flipped horizontally (the left eye becomes a right eye).

    Returns:
        (K, 3) float64 array.

    Raises:
        ValueError: if the image is flipped and ``keypoint_hflip_indices`` is missing or of another length.
    """
    keypoints = np.array(keypoints, dtype=np.float64).reshape(1, -1, 3)
    return _transform_keypoints(keypoints, transforms, image_size, keypoint_hflip_indices)[0]


def _transform_keypoints(
    keypoints: np.ndarray, transforms: Transform, image_size: tuple[int, int], keypoint_hflip_indices=None
) -> np.ndarray:
    """Apply transforms to the (R, K, 3) float64 keypoints of R instances, in place."""
    count = keypoints.shape[1]
    xy = transforms.apply_coords(keypoints[:, :, :2].reshape(-1, 2)).reshape(-1, count, 2)
    inside = ((xy >= 0) & (xy <= [image_size[1], image_size[0]])).all(axis=2)
    keypoints[:, :, :2] = xy
    keypoints[~inside, 2] = 0

    if _is_mirrored(transforms):
        if keypoint_hflip_indices is None:
            raise ValueError("keypoints cannot be flipped without keypoint_hflip_indices")
        if count != len(keypoint_hflip_indices):
            raise ValueError(
                f"an instance has {count} keypoints, but keypoint_hflip_indices, built from the metadata's "
                f"keypoint_names, has {len(keypoint_hflip_indices)}"
            )
        keypoints = keypoints[:, np.asarray(keypoint_hflip_indices, dtype=np.int64)]
    keypoints[keypoints[:, :, 2] == 0] = 0
    return keypoints


class _NotUniformError(Exception):
    """The annotations are of different types, or of one that has no batched path."""


def transform_annotations_batched(
    annotations: list[dict],
    transforms: fvt.TransformList,
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices=None,
) -> list[dict] | None:
    """Apply transforms to the boxes, polygons and keypoints of all instances of an image in one call.

    A numpy call for one box takes as long as for a hundred. This is the fast path for images whose
    annotations are all of one type, under transforms that move each point by itself; the others are left to
    `transform_instance_annotations`, which also reports what is wrong with an annotation.

    Args:
        annotations: dicts in the standard format; they are not changed.
        transforms: the transforms of the image.
        image_size: (height, width) of the transformed image.
        keypoint_hflip_indices: see `transform_instance_annotations`.

    Returns:
        New dicts, equal to the last bit to the results of `transform_instance_annotations`; None if the
        annotations must be transformed one by one, or one of them is invalid. The arrays of an image are
        views of a few larger ones.
    """
    types = {type(step) for step in transforms.transforms}
    if not types <= _POINTWISE | _CROPS:
        return None
    if not annotations:
        return []
    columns = {}
    try:
        boxes = _stack_boxes(annotations)
        height, width = image_size
        with_polygons = _all_have(annotations, "segmentation")
        boxes = transforms.apply_box(boxes).clip(min=0)
        columns["bbox"] = np.minimum(boxes, [width, height, width, height])
        if with_polygons:
            polygons = [annotation["segmentation"] for annotation in annotations]
            columns["segmentation"] = _transform_polygons(polygons, transforms, bool(types & _CROPS))
        if _all_have(annotations, "keypoints"):
            keypoints = np.array([a["keypoints"] for a in annotations], dtype=np.float64)
            columns["keypoints"] = _transform_keypoints(
                keypoints.reshape(len(annotations), -1, 3), transforms, image_size, keypoint_hflip_indices
            )
    except (_NotUniformError, KeyError, TypeError, ValueError):
        return None
    names = tuple(columns)
    return [
        {**annotation, **dict(zip(names, values)), "bbox_mode": BoxMode.XYXY_ABS}
        for annotation, values in zip(annotations, zip(*columns.values()))
    ]


def _all_have(annotations: list[dict], key: str) -> bool:
    count = sum(key in annotation for annotation in annotations)
    if count not in (0, len(annotations)):
        raise _NotUniformError
    return count > 0


def _stack_boxes(annotations: list[dict]) -> np.ndarray:
    """Return the boxes as (R, 4) float64 in XYXY_ABS."""
    modes = {annotation["bbox_mode"] for annotation in annotations}
    boxes = [annotation["bbox"] for annotation in annotations]
    if len(modes) > 1 or not modes <= {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        raise _NotUniformError
    if all(isinstance(box, np.ndarray) for box in boxes):
        exact = all(box.dtype == np.float64 for box in boxes)
    else:  # numpy scalars may be of lower precision, whose sums are rounded
        exact = set(map(type, chain.from_iterable(boxes))) <= {float, int}
    stacked = np.array(boxes, dtype=np.float64)
    if not exact or stacked.shape != (len(boxes), 4):
        raise _NotUniformError
    if modes == {BoxMode.XYWH_ABS}:
        stacked[:, 2:] += stacked[:, :2]
    return stacked


def _transform_polygons(
    objects: list[list], transforms: fvt.TransformList, cropped: bool
) -> list[list[np.ndarray]]:
    """Return the transformed polygons of each object, (2P,) float64 each."""
    if not all(isinstance(polygons, list) for polygons in objects):
        raise _NotUniformError
    if cropped:
        return [
            [p.reshape(-1) for p in transforms.apply_polygons([_to_points(polygon) for polygon in polygons])]
            for polygons in objects
        ]
    parts = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in chain.from_iterable(objects)]
    if not parts:
        return [[] for _ in objects]
    if any(len(part) % 2 for part in parts):
        raise _NotUniformError
    moved = transforms.apply_coords(np.concatenate(parts).reshape(-1, 2)).reshape(-1)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    pieces = iter([moved[begin:end] for begin, end in zip([0, *ends], ends)])
    return [[next(pieces) for _ in polygons] for polygons in objects]


def _field_of_all(annos: list[dict], key: str) -> list | None:
    """Return ``annos[i][key]`` for all i, or None if none has it. A mixture cannot become a tensor."""
    present = [key in anno for anno in annos]
    if not any(present):
        return None
    if not all(present):
        raise ValueError(f"{key!r} is missing in instance {present.index(False)}, while others have it")
    return [anno[key] for anno in annos]


def _boxes_of(annos: list[dict], mode: BoxMode) -> torch.Tensor:
    """Return the boxes as (R, 4) float32, or (R, 5) in the mode XYWHA_ABS."""
    boxes = [BoxMode.convert(anno["bbox"], anno["bbox_mode"], mode) for anno in annos]
    length = 5 if mode == BoxMode.XYWHA_ABS else 4
    return torch.as_tensor(np.array(boxes, dtype=np.float32).reshape(-1, length))


def _classes_of(annos: list[dict]) -> torch.Tensor:
    """Return the category ids as (R,) int64."""
    return torch.tensor([int(anno["category_id"]) for anno in annos], dtype=torch.int64)


def annotations_to_instances_rotated(annos: list[dict], image_size: tuple[int, int]) -> Instances:
    """Turn the annotations of one image into Instances with rotated boxes; ignore masks and keypoints.

    Args:
        annos: transformed annotations in the standard format; axis-aligned boxes among them get the angle 0.
        image_size: (height, width).

    Returns:
        Instances with ``gt_boxes`` (RotatedBoxes, axis-aligned ones clipped to the image) and ``gt_classes``
        ((R,) int64).
    """
    target = Instances(image_size)
    target.gt_boxes = RotatedBoxes(_boxes_of(annos, BoxMode.XYWHA_ABS))
    target.gt_boxes.clip(image_size)
    target.gt_classes = _classes_of(annos)
    return target


def annotations_to_instances(
    annos: list[dict], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Turn the annotations of one image into the Instances that models are trained on.

    Args:
        annos: transformed annotations in the standard format.
        image_size: (height, width).
        mask_format: "polygon" or "bitmask". Images with a mask that is not polygons get BitMasks anyway.

    Returns:
        Instances with ``gt_boxes`` (Boxes), ``gt_classes`` ((R,) int64) and, if the annotations have them,
        ``gt_masks`` (PolygonMasks or BitMasks) and ``gt_keypoints`` (Keypoints).

    Raises:
        ValueError: if a mask is neither polygons, RLE nor an array, or only some of the instances have masks
            or keypoints.
    """
    boxes = _boxes_of(annos, BoxMode.XYXY_ABS)
    fields: dict[str, Any] = {"gt_classes": _classes_of(annos)}
    segmentations, keypoints = _field_of_all(annos, "segmentation"), _field_of_all(annos, "keypoints")
    if keypoints is not None:
        keypoints = [np.asarray(points, dtype=np.float32).reshape(-1, 3) for points in keypoints]
        counts = sorted({len(points) for points in keypoints})
        if len(counts) > 1:
            raise ValueError(f"instances have {counts} keypoints; all must have the same number")
    if segmentations is not None:
        fields["gt_masks"] = _to_masks(segmentations, image_size, mask_format)
    if keypoints is not None:
        fields["gt_keypoints"] = Keypoints(np.stack(keypoints))
    return Instances(image_size, gt_boxes=Boxes(boxes), **fields)


def _to_masks(segmentations: list, image_size: tuple[int, int], mask_format: str) -> PolygonMasks | BitMasks:
    if mask_format not in ("polygon", "bitmask"):
        raise ValueError(f"mask_format must be 'polygon' or 'bitmask', got {mask_format!r}")
    if mask_format == "polygon" and all(isinstance(segmentation, list) for segmentation in segmentations):
        return PolygonMasks(segmentations)
    masks = [_to_bitmask(segmentation, image_size, i) for i, segmentation in enumerate(segmentations)]
    return BitMasks(torch.from_numpy(np.stack(masks)))


def _to_bitmask(segmentation, image_size: tuple[int, int], index: int) -> np.ndarray:
    try:
        if isinstance(segmentation, list):
            return polygons_to_bitmask(segmentation, *image_size)
        mask = decode_rle(segmentation) if isinstance(segmentation, dict) else segmentation
    except ValueError as error:
        raise ValueError(f"the mask of instance {index}: {error}") from error
    if not isinstance(mask, np.ndarray) or mask.ndim != 2:
        raise ValueError(
            f"the mask of instance {index} must be a list of polygons, an RLE dict or an (H, W) array, got "
            f"{type(segmentation).__name__} {getattr(segmentation, 'shape', '')}"
        )
    return mask.astype(bool)


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
):
    """Drop instances that a crop has left empty.

    Args:
        instances: with ``gt_boxes`` and optionally ``gt_masks``.
        by_box: drop boxes with a side of at most ``box_threshold``, and rotated boxes, which are not clipped,
            outside the image.
        by_mask: drop instances with an empty mask.
        box_threshold: in pixels.
        return_mask: also return which instances are kept.

    Returns:
        The remaining Instances (``instances`` itself if none is dropped); with ``return_mask``, a pair of
        them and an (R,) bool tensor.
    """
    if not (by_box or by_mask):
        raise ValueError("filter_empty_instances: at least one of by_box and by_mask must be True")
    if by_box:
        boxes = instances.gt_boxes
        keep = boxes.nonempty(threshold=box_threshold)
        if isinstance(boxes, RotatedBoxes):
            height, width = instances.image_size
            frame = RotatedBoxes(torch.tensor([[width / 2, height / 2, width, height, 0.0]]))
            keep &= boxes.pairwise_iou(frame)[:, 0] > 0
    else:
        keep = torch.ones(len(instances), dtype=torch.bool)
    if by_mask and instances.has("gt_masks"):
        keep &= instances.gt_masks.nonempty()
    kept = instances if bool(keep.all()) else instances[keep]
    return (kept, keep) if return_mask else kept


def as_names(names: str | Iterable[str]) -> list[str]:
    """Return dataset names as a list; DATASETS.TRAIN and DATASETS.TEST may be a single string."""
    return [names] if isinstance(names, str) else list(names)


def check_metadata_consistency(key: str, dataset_names: list[str]) -> None:
    """Check that datasets which are used together agree in one entry of their metadata.

    Args:
        key: name of the entry, such as "thing_classes".
        dataset_names: at least one name.

    Raises:
        ValueError: if they differ.
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
    """Return the permutation of keypoints under a horizontal flip.

    Args:
        dataset_names: datasets whose metadata has ``keypoint_names`` and ``keypoint_flip_map``, a list of
            pairs such as ("left_eye", "right_eye").

    Returns:
        For each keypoint, the index of the one that takes its place.
    """
    names = as_names(dataset_names)
    check_metadata_consistency("keypoint_names", names)
    check_metadata_consistency("keypoint_flip_map", names)
    metadata = MetadataCatalog.get(names[0])
    keypoint_names = list(metadata.keypoint_names)
    partner = {}
    for left, right in metadata.keypoint_flip_map:
        partner[left], partner[right] = right, left
    return [keypoint_names.index(partner.get(name, name)) for name in keypoint_names]


def get_fed_loss_cls_weights(dataset_names: str | list[str], freq_weight_power: float = 1.0) -> torch.Tensor:
    """Return the class weights of the federated loss: the number of images of each class, to a power.

    Args:
        dataset_names: datasets whose metadata has ``class_image_count``, a list of dicts with "id" and
            "image_count".
        freq_weight_power: the exponent.

    Returns:
        (K,) float32 tensor, in the order of the ids.
    """
    names = as_names(dataset_names)
    check_metadata_consistency("class_image_count", names)
    counts = sorted(MetadataCatalog.get(names[0]).class_image_count, key=lambda entry: entry["id"])
    return torch.tensor([entry["image_count"] for entry in counts]).float() ** freq_weight_power


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: dict
) -> CropTransform:
    """Draw a crop that contains the center of one instance's box.

    Args:
        crop_size: (height, width) of the crop.
        image_size: (height, width) of the image.
        instance: annotation with "bbox" and "bbox_mode".

    Raises:
        ValueError: if the crop is larger than the image, or the center is outside it.
    """
    crop_size, image_size = np.asarray(crop_size, dtype=np.int64), np.asarray(image_size, dtype=np.int64)
    x0, y0, x1, y1 = BoxMode.convert(instance["bbox"], instance["bbox_mode"], BoxMode.XYXY_ABS)
    center = np.array([(y0 + y1) * 0.5, (x0 + x1) * 0.5])
    if (center < 0).any() or (center > image_size).any():
        raise ValueError(f"the center (y, x) = {tuple(center)} of the box is outside {tuple(image_size)}")
    if (crop_size > image_size).any():
        raise ValueError(f"crop_size {tuple(crop_size)} is larger than the image {tuple(image_size)}")
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
    """Build the default augmentations of a config: resizing and, for training, flips and color jitter.

    Args:
        cfg: reads ``INPUT.{MIN,MAX}_SIZE_{TRAIN,TEST}``, ``INPUT.MIN_SIZE_TRAIN_SAMPLING``,
            ``INPUT.RANDOM_FLIP``, ``INPUT.LSJ`` and ``INPUT.COLOR_JITTER``.
        is_train: whether they are for training.
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


build_transform_gen = build_augmentation  # detectron2's earlier name
