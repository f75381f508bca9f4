"""Tools for writing dataset mappers: transforming annotations, turning them into Instances, augmentation by
config; and by re-export, reading images and precomputed proposals.
"""

from collections.abc import Iterable
from itertools import chain

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


def decode_rle(rle: dict) -> np.ndarray:
    """A COCO RLE (compressed, or with counts as a list) as an (H, W) uint8 array of 0 and 1."""
    import pycocotools.mask as mask_util

    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    return mask_util.decode(rle)


def transform_instance_annotations(
    annotation: dict, transforms, image_size: tuple[int, int], *, keypoint_hflip_indices=None
) -> dict:
    """Apply transforms to the box, the mask and the keypoints of one instance.

    Args:
        annotation: dict of one instance in the standard format; it is changed in place. Arrays in it are not
            written to.
        transforms: a Transform, or a list of them.
        image_size: (height, width) of the transformed picture.
        keypoint_hflip_indices: see :func:`create_keypoint_hflip_indices`; needed where a picture with
            keypoints is mirrored.

    Returns:
        ``annotation``, with "bbox" (4,) float64 in XYXY_ABS, clipped to the picture, or where it was rotated
        (5,) float64 in XYWHA_ABS, not clipped; "segmentation" a list of (2P,) float64 polygons, or an (H, W)
        array where it was an RLE or an array; "keypoints" (K, 3) float64.
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


def _transform_segmentation(segmentation, transforms: Transform, image_size: tuple[int, int]):
    if isinstance(segmentation, list):
        polygons = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
        return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
    if isinstance(segmentation, (dict, np.ndarray)):
        source = decode_rle(segmentation) if isinstance(segmentation, dict) else segmentation
        # What a transform pads segmentations with (255, "ignore") is no part of an object.
        mask = (transforms.apply_segmentation((source != 0).astype(np.uint8)) == 1).astype(np.uint8)
        if tuple(mask.shape[:2]) != tuple(image_size):
            raise ValueError(
                f"the mask (RLE) has size {source.shape[:2]} and becomes {tuple(mask.shape[:2])} "
                f"under the transforms of the picture, which becomes {tuple(image_size)}; they must agree"
            )
        return mask
    raise TypeError(
        f"segmentation of type {type(segmentation).__name__} cannot be transformed; it must be a list of "
        "polygons [x0, y0, x1, y1, ...], a dict in COCO's RLE format or an (H, W) array"
    )


def _mirrors(transform: Transform) -> bool:
    """Whether left and right are swapped: by an odd number of horizontal flips, within lists too. A vertical
    flip does not count, as in detectron2; a transform may say for itself, by an attribute ``mirrors``."""
    if isinstance(transform, TransformList):
        return sum(_mirrors(step) for step in transform.transforms) % 2 == 1
    return isinstance(transform, HFlipTransform) or bool(getattr(transform, "mirrors", False))


def transform_keypoint_annotations(
    keypoints, transforms: Transform, image_size: tuple[int, int], keypoint_hflip_indices=None
) -> np.ndarray:
    """Apply transforms to the keypoints of one instance.

    Keypoints that leave the picture, or were not labelled, become (0, 0, 0), as COCO writes unlabelled ones.

    Args:
        keypoints: 3K numbers (x, y, visibility), absolute pixels.
        transforms: the transforms of the picture.
        image_size: (height, width) of the transformed picture.
        keypoint_hflip_indices: (K,) ints, which keypoint takes the place of each where the picture is
            mirrored (the left eye becomes a right eye).

    Returns:
        (K, 3) float64 array.

    Raises:
        ValueError: the picture is mirrored and ``keypoint_hflip_indices`` is missing or of another length.
    """
    keypoints = np.array(keypoints, dtype=np.float64).reshape(1, -1, 3)
    return move_keypoints(keypoints, transforms, image_size, keypoint_hflip_indices)[0]


def move_keypoints(
    keypoints: np.ndarray, transforms: Transform, image_size: tuple[int, int], keypoint_hflip_indices=None
) -> np.ndarray:
    """`transform_keypoint_annotations` for (R, K, 3) float64 keypoints of R instances, which it changes."""
    count = keypoints.shape[1]
    xy = transforms.apply_coords(keypoints[:, :, :2].reshape(-1, 2)).reshape(-1, count, 2)
    inside = ((xy >= 0) & (xy <= [image_size[1], image_size[0]])).all(axis=2)
    keypoints[:, :, :2] = xy
    keypoints[~inside, 2] = 0

    if _mirrors(transforms):
        if keypoint_hflip_indices is None:
            raise ValueError("keypoints cannot be mirrored without keypoint_hflip_indices")
        if count != len(keypoint_hflip_indices):
            raise ValueError(
                f"an instance has {count} keypoints, but keypoint_hflip_indices, made from the "
                f"metadata's keypoint_names, has {len(keypoint_hflip_indices)}"
            )
        keypoints = keypoints[:, np.asarray(keypoint_hflip_indices, dtype=np.int64)]
    keypoints[keypoints[:, :, 2] == 0] = 0
    return keypoints


def _field_of_all(annos: list[dict], key: str) -> list | None:
    """``annos[i][key]`` for all i; None where none has it. A mixture has no meaning as a tensor."""
    having = [key in anno for anno in annos]
    if not any(having):
        return None
    if not all(having):
        raise ValueError(f"{key!r} is missing in instance {having.index(False)}, while others have it")
    return [anno[key] for anno in annos]


def _boxes_of(annos: list[dict], mode: BoxMode) -> torch.Tensor:
    """(R, 4) or, in the mode XYWHA_ABS, (R, 5) float32."""
    boxes = [BoxMode.convert(anno["bbox"], anno["bbox_mode"], mode) for anno in annos]
    length = 5 if mode == BoxMode.XYWHA_ABS else 4
    return torch.as_tensor(np.array(boxes, dtype=np.float32).reshape(-1, length))


def _classes_of(annos: list[dict]) -> torch.Tensor:
    """(R,) int64."""
    return torch.tensor([int(anno["category_id"]) for anno in annos], dtype=torch.int64)


def annotations_to_instances_rotated(annos: list[dict], image_size: tuple[int, int]) -> Instances:
    """`annotations_to_instances` for rotated boxes.

    Args:
        annos: dicts in the standard format, transformed already; upright boxes among them get the angle 0.
            Masks and keypoints are not looked at.
        image_size: (height, width).

    Returns:
        Instances with ``gt_boxes`` (RotatedBoxes, upright ones clipped to the picture) and ``gt_classes``
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
    """Turn the annotations of one picture into the Instances that models are trained on.

    Args:
        annos: dicts in the standard format, transformed already.
        image_size: (height, width).
        mask_format: "polygon" or "bitmask".

    Returns:
        Instances with ``gt_boxes`` (Boxes), ``gt_classes`` ((R,) int64) and, where the annotations have them,
        ``gt_masks`` (PolygonMasks or BitMasks) and ``gt_keypoints`` (Keypoints).

    Raises:
        ValueError: a mask does not fit ``mask_format``, or only some of the instances have masks or
            keypoints.
    """
    target = Instances(image_size)
    target.gt_boxes = Boxes(_boxes_of(annos, BoxMode.XYXY_ABS))
    target.gt_classes = _classes_of(annos)

    segmentations = _field_of_all(annos, "segmentation")
    if segmentations is not None:
        target.gt_masks = _to_masks(segmentations, image_size, mask_format)
    keypoints = _field_of_all(annos, "keypoints")
    if keypoints is not None:
        keypoints = [np.asarray(points, dtype=np.float32).reshape(-1, 3) for points in keypoints]
        counts = sorted({len(points) for points in keypoints})
        if len(counts) > 1:
            raise ValueError(f"instances have {counts} keypoints; all must have as many")
        target.gt_keypoints = Keypoints(np.stack(keypoints))
    return target


def _to_masks(segmentations: list, image_size: tuple[int, int], mask_format: str) -> PolygonMasks | BitMasks:
    if mask_format == "polygon":
        for i, segmentation in enumerate(segmentations):
            if not isinstance(segmentation, list):
                raise ValueError(
                    f"the mask of instance {i} is not a list of polygons but {type(segmentation).__name__}; "
                    "for masks in RLE format set INPUT.MASK_FORMAT to 'bitmask'"
                )
        return PolygonMasks(segmentations)
    if mask_format != "bitmask":
        raise ValueError(f"mask_format must be 'polygon' or 'bitmask', got {mask_format!r}")
    masks = [_to_bitmask(segmentation, image_size, i) for i, segmentation in enumerate(segmentations)]
    return BitMasks(torch.from_numpy(np.stack(masks)))


def _to_bitmask(segmentation, image_size: tuple[int, int], index: int) -> np.ndarray:
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size)
    mask = decode_rle(segmentation) if isinstance(segmentation, dict) else segmentation
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
    """Drop instances of which nothing is left, as happens when a picture is cropped.

    Args:
        instances: with ``gt_boxes``, perhaps with ``gt_masks``.
        by_box: drop those whose box has a side of at most ``box_threshold``, or is rotated, and so not
            clipped, and lies outside the picture.
        by_mask: drop those with an empty mask.
        box_threshold: in pixels.
        return_mask: also return which ones stay.

    Returns:
        The remaining Instances; with ``return_mask``, a pair of them and an (R,) bool tensor.
    """
    if not (by_box or by_mask):
        raise ValueError("filter_empty_instances: at least one of by_box and by_mask must be True")
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep &= instances.gt_boxes.nonempty(threshold=box_threshold)
        if isinstance(instances.gt_boxes, RotatedBoxes):
            height, width = instances.image_size
            picture = RotatedBoxes([[width / 2, height / 2, width, height, 0]])
            keep &= instances.gt_boxes.pairwise_iou(picture)[:, 0] > 0
    if by_mask and instances.has("gt_masks"):
        keep &= instances.gt_masks.nonempty()
    kept = instances[keep]
    return (kept, keep) if return_mask else kept


# Their `apply_coords` does the same sums for each point, whichever others come along; so results are equal to
# the last bit. What is not known here may do anything.
_MOVE_POINTS = {
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
# These also cut polygons, which changes the number of points.
_CUT = {T.CropTransform, fvt.CropTransform}


def transform_annotations_batched(
    annotations: list[dict],
    transforms: fvt.TransformList,
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices=None,
) -> list[dict] | None:
    """Apply transforms to the boxes, polygons and keypoints of all instances of a picture.

    Args:
        annotations: dicts in the standard format; they are not changed.
        transforms: the transforms of the picture.
        image_size: (height, width) of the transformed picture.
        keypoint_hflip_indices: see `transform_instance_annotations`.

    Returns:
        New dicts with what `transform_instance_annotations` gives for each, to the last bit; None where they
        must be transformed one by one, or where something is wrong with one of them. The arrays of a picture
        are parts of few larger ones.
    """
    steps = [type(step) for step in transforms.transforms]
    if not all(step in _MOVE_POINTS or step in _CUT for step in steps):
        return None
    cut = any(step in _CUT for step in steps)
    if not annotations:
        return []
    columns = {}
    try:
        columns["bbox"] = _move_boxes(annotations, transforms, image_size)
        if _all_have(annotations, "segmentation"):
            columns["segmentation"] = _move_polygons(annotations, transforms, cut)
        if _all_have(annotations, "keypoints"):
            keypoints = np.array([a["keypoints"] for a in annotations], dtype=np.float64)
            keypoints = keypoints.reshape(len(annotations), -1, 3)
            columns["keypoints"] = move_keypoints(keypoints, transforms, image_size, keypoint_hflip_indices)
    except (_NotUniformError, KeyError, TypeError, ValueError):
        return None
    names = tuple(columns)
    return [
        {**annotation, **dict(zip(names, values)), "bbox_mode": BoxMode.XYXY_ABS}
        for annotation, values in zip(annotations, zip(*columns.values()))
    ]


class _NotUniformError(Exception):
    """The annotations are of several sorts, or of one that is not done here."""


def _all_have(annotations: list[dict], key: str) -> bool:
    having = sum(key in annotation for annotation in annotations)
    if having not in (0, len(annotations)):
        raise _NotUniformError
    return having > 0


def _move_boxes(
    annotations: list[dict], transforms: fvt.TransformList, image_size: tuple[int, int]
) -> np.ndarray:
    """(R, 4) float64 in XYXY_ABS, clipped to the picture."""
    modes = {annotation["bbox_mode"] for annotation in annotations}
    boxes = [annotation["bbox"] for annotation in annotations]
    if len(modes) > 1 or not modes <= {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        raise _NotUniformError
    if all(isinstance(box, np.ndarray) for box in boxes):
        plain = all(box.dtype == np.float64 for box in boxes)
    else:  # numbers of numpy may be short ones, whose sums are rounded
        plain = set(map(type, chain.from_iterable(boxes))) <= {float, int}
    moved = np.array(boxes, dtype=np.float64)
    if not plain or moved.shape != (len(boxes), 4):
        raise _NotUniformError
    if modes == {BoxMode.XYWH_ABS}:
        moved[:, 2:] += moved[:, :2]
    height, width = image_size
    return np.minimum(transforms.apply_box(moved).clip(min=0), [width, height, width, height])


def _move_polygons(
    annotations: list[dict], transforms: fvt.TransformList, cut: bool
) -> list[list[np.ndarray]]:
    """For each object its polygons, (2P,) float64 each."""
    objects = [annotation["segmentation"] for annotation in annotations]
    if not all(isinstance(polygons, list) for polygons in objects):
        raise _NotUniformError
    if cut:
        return [
            [
                points.reshape(-1)
                for points in transforms.apply_polygons([_to_points(polygon) for polygon in polygons])
            ]
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


def _to_points(polygon) -> np.ndarray:
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)


def as_names(names: str | Iterable[str]) -> list[str]:
    """Return dataset names as a list; DATASETS.TRAIN and DATASETS.TEST may be a single string."""
    return [names] if isinstance(names, str) else list(names)


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
    """Class weights of the federated loss: the number of pictures of each class, to a power.

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
