"""What users hand to the visualizer, made into arrays.

Shapes: N objects, K keypoints.
"""

from typing import Any

import numpy as np
import torch

from detlib.structures import Boxes, BoxMode, Keypoints
from detlib.utils.file_io import PathManager
from detlib.visualization.masks import GenericMask

__all__ = [
    "annotated_column",
    "annotated_boxes",
    "annotated_keypoints",
    "mask_center",
    "object_extents",
    "read_png",
    "to_boxes",
    "to_keypoints",
    "to_numpy",
]


def to_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def to_boxes(boxes: Any) -> np.ndarray:
    """(N, 4), or (N, 5) for rotated boxes."""
    boxes = to_numpy(boxes.tensor if isinstance(boxes, Boxes) else boxes)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise ValueError(f"boxes must have shape (N, 4), or (N, 5) if they are rotated, got {boxes.shape}")
    return boxes


def to_keypoints(keypoints: Any) -> np.ndarray:
    return to_numpy(keypoints.tensor if isinstance(keypoints, Keypoints) else keypoints)


def object_extents(num_objects, boxes, masks, keypoints) -> np.ndarray:
    """(N, 4) x0, y0, x1, y1 around each object: its box, else its mask, else its keypoints."""
    if boxes is not None:
        is_rotated = boxes.shape[1] == 5
        return BoxMode.convert(boxes, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS) if is_rotated else boxes
    if masks is not None:
        return np.array([mask.bbox() for mask in masks]).reshape(-1, 4)
    if keypoints is not None:
        return np.concatenate([keypoints[:, :, :2].min(axis=1), keypoints[:, :, :2].max(axis=1)], axis=1)
    return np.zeros((num_objects, 4))


def mask_center(mask: GenericMask) -> tuple[float, float] | None:
    """The median pixel of a mask, x and y."""
    pixels = np.argwhere(mask.mask)
    return tuple(np.median(pixels, axis=0)[::-1].tolist()) if len(pixels) else None


def annotated_column(annotations: list[dict], key: str, default: Any) -> list | None:
    """The values of a key that some annotations have; None if none has it."""
    if not any(key in annotation for annotation in annotations):
        return None
    return [annotation.get(key, default) for annotation in annotations]


def annotated_boxes(annotations: list[dict]) -> np.ndarray | None:
    """(N, 4), or (N, 5) if one is rotated; None if one has no box."""
    if not all("bbox" in annotation for annotation in annotations):
        return None
    is_rotated = any(annotation["bbox_mode"] == BoxMode.XYWHA_ABS for annotation in annotations)
    mode = BoxMode.XYWHA_ABS if is_rotated else BoxMode.XYXY_ABS
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], mode) for a in annotations]
    return np.array(boxes, dtype=np.float64)


def annotated_keypoints(annotations: list[dict]) -> np.ndarray | None:
    lists = annotated_column(annotations, "keypoints", ())
    if lists is None:
        return None
    num_keypoints = max(len(keypoints) for keypoints in lists) // 3
    # Objects without keypoints have them all invisible.
    points = [np.asarray(k if len(k) else [0] * (3 * num_keypoints), dtype=np.float64) for k in lists]
    return np.stack(points).reshape(len(annotations), num_keypoints, 3)


def read_png(path: str, mode: str | None = None) -> np.ndarray:
    from PIL import Image

    with PathManager.open(path, "rb") as file:
        image = Image.open(file)
        return np.asarray(image.convert(mode) if mode else image)
