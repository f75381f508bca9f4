"""Annotations of pictures: applying transforms to them, and turning them into Instances."""

import numpy as np
import torch
from fvcore.transforms.transform import HFlipTransform, Transform, TransformList

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
    "annotations_to_instances",
    "annotations_to_instances_rotated",
    "filter_empty_instances",
    "move_keypoints",
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
    "proposal_objectness_logits" ((P,), falling) are replaced by "proposals", an Instances with
    ``proposal_boxes`` and ``objectness_logits``.

    Args:
        dataset_dict: dict of one picture, changed in place.
        image_shape: (height, width) of the transformed picture.
        transforms: the transforms of the picture.
        proposal_topk: keep this many of the best.
        min_box_size: proposals of which a side is not longer than this are dropped.
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
