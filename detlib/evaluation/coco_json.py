"""Inputs of the COCO metric: predictions in COCO's result format, and the ground truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detlib.data.catalog import Metadata
from detlib.data.datasets.coco import convert_to_coco_dict, read_coco_json
from detlib.ops import encode_rle, paste_masks_to_rle
from detlib.structures import BoxMode, Instances, ROIMasks, RotatedBoxes
from detlib.structures.masks import bounded_polygons
from detlib.structures.rle import rle_runs

__all__ = ["GroundTruth", "instances_to_coco_json", "load_ground_truth"]

# Polygons with larger coordinates are clipped.
_FAR = 1e5
_HIGHEST_ID = 2**53  # faster-coco-eval converts ids to float64


def instances_to_coco_json(instances: Instances, img_id: Any) -> list[dict]:
    """Convert the predictions for an image to COCO's result format (https://cocodataset.org/#format-results).

    Args:
        instances: N instances with `pred_boxes`, `scores` and `pred_classes`. Optional fields: `pred_masks`,
            (N, H, W) bool, `ROIMasks` (which are pasted into the image), or a list of RLE dicts; and
            `pred_keypoints`, (N, K, 3). 0.5 is subtracted from the x and y of keypoints, which gives COCO's
            pixel indices.
        img_id: the image's id.

    Returns:
        One dict for each instance, with `image_id`, `category_id` (the class index), `bbox` (XYWH, or center
        x, center y, width, height and angle for rotated boxes) and `score`, and optionally `segmentation`
        (compressed RLE) and `keypoints` (a flat list).
    """
    if len(instances) == 0:
        return []
    boxes = instances.pred_boxes.tensor.detach().cpu().numpy()
    if not isinstance(instances.pred_boxes, RotatedBoxes):
        boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    boxes = boxes.tolist()
    scores = instances.scores.tolist()
    classes = instances.pred_classes.tolist()
    results = [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for box, score, category in zip(boxes, scores, classes)
    ]
    if instances.has("pred_masks"):
        for result, rle in zip(results, _encode_masks(instances)):
            result["segmentation"] = rle
    if instances.has("pred_keypoints"):
        keypoints = instances.pred_keypoints.detach().cpu().numpy().astype(np.float64)
        keypoints[:, :, :2] -= 0.5
        for result, flat in zip(results, keypoints.reshape(len(keypoints), -1).tolist()):
            result["keypoints"] = flat
    return results


def _encode_masks(instances: Instances) -> list[dict]:
    """Encode a tensor, BitMasks or ROIMasks as RLE that JSON can store. RLE is returned unchanged."""
    masks = instances.pred_masks
    if isinstance(masks, list):
        return masks
    if isinstance(masks, ROIMasks):
        boxes = instances.pred_boxes.tensor.detach()
        rles = paste_masks_to_rle(masks.tensor.detach(), boxes, instances.image_size)
    else:
        masks = getattr(masks, "tensor", masks)
        rles = encode_rle(masks if masks.dtype == torch.bool else masks.to(torch.uint8) != 0)
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles


@dataclass(frozen=True)
class GroundTruth:
    """The annotations of a dataset in COCO's format, with all fields that the metric needs.

    Attributes:
        coco: `images`, `categories` and `annotations`. Each annotation has `id` (starting at 1), `area` and
            `iscrowd`. Image ids are integers.
        image_numbers: maps the dataset's image ids, of any type, to the ids in `coco`.
        has_annotations: False for a test set without annotations.
    """

    coco: dict
    image_numbers: dict[Any, int]
    has_annotations: bool

    @property
    def category_ids(self) -> list[int]:
        """The category ids in ascending order."""
        return sorted(category["id"] for category in self.coco["categories"])

    def count(self, key: str) -> int:
        """Return the number of annotations with a non-empty `key`."""
        return sum(bool(annotation.get(key)) for annotation in self.coco["annotations"])

    @property
    def class_names(self) -> list[str]:
        """The names of the categories in the order of `category_ids`."""
        names = {category["id"]: category["name"] for category in self.coco["categories"]}
        return [names[i] for i in self.category_ids]


def load_ground_truth(dataset_name: str, metadata: Metadata) -> GroundTruth:
    """Read `metadata.json_file`, or convert the registered dataset if there is no such file."""
    json_file = metadata.get("json_file")
    return complete_ground_truth(
        read_coco_json(json_file) if json_file else convert_to_coco_dict(dataset_name)
    )


def complete_ground_truth(coco: dict) -> GroundTruth:
    """Add the fields that the metric needs and that annotation files may lack, without modifying `coco`.

    Annotations are renumbered, because the metric takes id 0 for "no match" and ids may be missing. Images
    are renumbered if their ids are not integers, or are too large for the backends. As in data loading,
    annotations without an image and polygons of fewer than three points are dropped.
    """
    ids = [image["id"] for image in coco["images"]]
    keep_ids = all(type(i) is int and 0 <= i <= _HIGHEST_ID for i in ids)
    numbers = {i: i if keep_ids else n for n, i in enumerate(ids, start=1)}
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in coco["images"]}
    annotations: list[dict] = []
    with_masks = any("segmentation" in annotation for annotation in coco.get("annotations") or ())
    num_values = max((len(a.get("keypoints") or ()) for a in coco.get("annotations") or ()), default=0)
    for annotation in coco.get("annotations") or ():
        image_id = annotation.get("image_id")
        if not isinstance(image_id, int | float | str) or image_id not in numbers:
            continue
        complete = {
            **annotation,
            "id": len(annotations) + 1,
            "image_id": numbers[image_id],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        if with_masks:
            try:
                complete["segmentation"] = _good_mask(annotation.get("segmentation"), *sizes[image_id])
            except ValueError as error:
                number = annotation.get("id", len(annotations) + 1)
                raise ValueError(f"Image {image_id!r}, annotation {number!r}: {error}") from error
        if not _is_area(complete.get("area")):
            complete["area"] = _area(complete, *sizes[image_id])
        if num_values:  # an object without keypoints is one without labeled keypoints
            complete["keypoints"] = annotation.get("keypoints") or [0] * num_values
            complete.setdefault("num_keypoints", sum(v > 0 for v in complete["keypoints"][2::3]))
        annotations.append(complete)
    completed = {
        "info": coco.get("info", {}),
        "images": [
            {**image, "id": numbers[image["id"]], "height": size[0], "width": size[1]}
            for image, size in zip(coco["images"], sizes.values())
        ],
        "categories": coco["categories"],
        "annotations": annotations,
    }
    return GroundTruth(completed, numbers, "annotations" in coco)


def _good_mask(segmentation: Any, height: int, width: int) -> list | dict:
    """Return a mask that both backends accept: an RLE, or polygons of at least three points, perhaps none.

    Raises:
        ValueError: a coordinate is NaN or infinite, or the RLE is malformed. The backends would crash.
    """
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        # The sum is NaN if a value is; minimum and maximum may pass over it.
        if all(-_FAR <= min(p) and max(p) <= _FAR and math.isfinite(sum(p)) for p in polygons):
            return polygons
        return [polygon.tolist() for polygon in bounded_polygons(polygons, height, width)]
    if segmentation:
        rle_runs(segmentation)
    return segmentation or []


def _is_area(area: Any) -> bool:
    """Return whether `area` is a number that the metric can compare with its area ranges."""
    return isinstance(area, int | float) and area >= 0


def _area(annotation: dict, height: int, width: int) -> float:
    """Return the area of the annotation's mask in pixels, or of its box if it has no mask."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    from pycocotools import mask as mask_utils

    rle = segmentation
    if isinstance(rle, list):
        rle = mask_utils.merge(mask_utils.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = mask_utils.frPyObjects(rle, height, width)
    return float(mask_utils.area(rle))
