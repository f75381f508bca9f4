"""The annotations of one picture transformed together, where that gives what they give one by one.

A call of numpy for one box takes as long as for a hundred. Most pictures have annotations that are all of one
sort, under transforms that move each point by itself; those are done here. All others are left to
`transform_instance_annotations`, which also finds the words for what is wrong with them.
"""

from itertools import chain

import numpy as np
from fvcore.transforms import transform as fvt

from detlib.structures import BoxMode

from .annotations import move_keypoints
from .transforms import transform as T  # noqa: N812 (the name that mappers use)

__all__ = ["transform_annotations_together"]

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


def transform_annotations_together(
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
    except (_NotAlikeError, KeyError, TypeError, ValueError):
        return None
    names = tuple(columns)
    return [
        {**annotation, **dict(zip(names, values)), "bbox_mode": BoxMode.XYXY_ABS}
        for annotation, values in zip(annotations, zip(*columns.values()))
    ]


class _NotAlikeError(Exception):
    """The annotations are of several sorts, or of one that is not done here."""


def _all_have(annotations: list[dict], key: str) -> bool:
    having = sum(key in annotation for annotation in annotations)
    if having not in (0, len(annotations)):
        raise _NotAlikeError
    return having > 0


def _move_boxes(
    annotations: list[dict], transforms: fvt.TransformList, image_size: tuple[int, int]
) -> np.ndarray:
    """(R, 4) float64 in XYXY_ABS, clipped to the picture."""
    modes = {annotation["bbox_mode"] for annotation in annotations}
    boxes = [annotation["bbox"] for annotation in annotations]
    if len(modes) > 1 or not modes <= {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        raise _NotAlikeError
    if all(isinstance(box, np.ndarray) for box in boxes):
        plain = all(box.dtype == np.float64 for box in boxes)
    else:  # numbers of numpy may be short ones, whose sums are rounded
        plain = set(map(type, chain.from_iterable(boxes))) <= {float, int}
    moved = np.array(boxes, dtype=np.float64)
    if not plain or moved.shape != (len(boxes), 4):
        raise _NotAlikeError
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
        raise _NotAlikeError
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
        raise _NotAlikeError
    moved = transforms.apply_coords(np.concatenate(parts).reshape(-1, 2)).reshape(-1)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    pieces = iter([moved[begin:end] for begin, end in zip([0, *ends], ends)])
    return [[next(pieces) for _ in polygons] for polygons in objects]


def _to_points(polygon) -> np.ndarray:
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)
