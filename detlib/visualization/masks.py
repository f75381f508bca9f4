"""Object masks and panoptic segments in a uniform representation for drawing."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from detlib.structures import BitMasks, PolygonMasks, polygons_to_bitmask
from detlib.structures.rle import decode_rle

__all__ = ["GenericMask", "PanopticSegments", "find_contours", "to_generic_masks"]


class GenericMask:
    """A mask of H x W pixels, created from polygons, a bitmask or COCO's run-length encoding."""

    def __init__(self, mask_or_polygons: Any, height: int, width: int):
        """Create the mask.

        Args:
            mask_or_polygons: list of flat vectors x0, y0, x1, y1, ...; or (H, W) array; or run-length
                encoding, a dict with "counts" and "size".
            height, width: height H and width W of the image.

        Raises:
            ValueError: the mask is none of these, or it has another size.
        """
        self.height, self.width = height, width
        if isinstance(mask_or_polygons, dict):
            mask_or_polygons = _decode_run_lengths(mask_or_polygons, height, width)
        if isinstance(mask_or_polygons, (list, tuple)):
            polygons = (np.asarray(p, dtype=np.float64).ravel() for p in mask_or_polygons)
            self.__dict__["polygons"] = [p for p in polygons if len(p) >= 6]
            self.__dict__["has_holes"] = False
            return
        mask = np.asarray(mask_or_polygons)
        if mask.shape != (height, width):
            raise ValueError(
                f"The mask must have the image size {(height, width)} (H, W), but has shape {mask.shape}"
            )
        self.__dict__["mask"] = mask.astype(bool)

    @cached_property
    def mask(self) -> np.ndarray:
        """Bitmask, (H, W) bool."""
        return polygons_to_bitmask(self.polygons, self.height, self.width)

    @cached_property
    def polygons(self) -> list[np.ndarray]:
        """Outlines as flat vectors x0, y0, x1, y1, ...; outlines of holes have the opposite orientation."""
        return find_contours(self.mask)[0]

    @cached_property
    def has_holes(self) -> bool:
        """Whether some of the polygons are outlines of holes."""
        return find_contours(self.mask)[1]

    def area(self) -> int:
        """Return the number of pixels."""
        return int(self.mask.sum())

    def bbox(self) -> np.ndarray:
        """Return the bounding box x0, y0, x1, y1, (4,) float64; zeros if the mask is empty."""
        if not self.polygons:
            return np.zeros(4)
        points = np.concatenate(self.polygons).reshape(-1, 2)
        return np.concatenate([points.min(axis=0), points.max(axis=0)])


def find_contours(mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Trace the outlines of a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        The outlines as flat vectors x0, y0, x1, y1, ... through the centers of the border pixels (outlines of
        holes have the opposite orientation), and whether there are holes.
    """
    import cv2

    contours, hierarchy = cv2.findContours(
        np.ascontiguousarray(mask, dtype=np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    if hierarchy is None:
        return [], False
    # The fourth column is the parent contour, or -1 if there is none.
    has_holes = bool((hierarchy.reshape(-1, 4)[:, 3] >= 0).any())
    polygons = [contour.astype(np.float64).ravel() + 0.5 for contour in contours]
    return [polygon for polygon in polygons if len(polygon) >= 6], has_holes


def to_generic_masks(masks: Any, height: int, width: int) -> list[GenericMask]:
    """Convert PolygonMasks, BitMasks, (N, H, W) tensors or arrays, or lists of masks to GenericMasks."""
    if isinstance(masks, PolygonMasks):
        masks = masks.polygons
    elif isinstance(masks, BitMasks):
        masks = masks.tensor
    if hasattr(masks, "detach"):
        masks = masks.detach().cpu().numpy()
    return [m if isinstance(m, GenericMask) else GenericMask(m, height, width) for m in masks]


def _decode_run_lengths(rle: dict, height: int, width: int) -> np.ndarray:
    if "counts" not in rle or "size" not in rle:
        raise ValueError(f'A run-length encoded mask needs "counts" and "size", got {sorted(rle)}')
    if tuple(rle["size"]) != (height, width):
        raise ValueError(
            f"The mask must have the image size {(height, width)} (H, W), got size {tuple(rle['size'])}"
        )
    return decode_rle({"size": [int(height), int(width)], "counts": rle["counts"]})


class PanopticSegments:
    """The panoptic segments of an image."""

    def __init__(self, panoptic_seg: np.ndarray, segments_info: list[dict] | None, metadata: Any = None):
        """Collect the segments of a panoptic segmentation.

        Args:
            panoptic_seg: (H, W) integer array of segment ids.
            segments_info: one dict per segment with "id", "category_id", "isthing" and optionally
                "score"; None if each id is category * metadata.label_divisor + instance, and -1 for unlabeled
                pixels.
            metadata: metadata with `label_divisor` and `thing_dataset_id_to_contiguous_id`; needed only if
                `segments_info` is None.

        Raises:
            ValueError: `segments_info` and `metadata.label_divisor` are both missing.
        """
        self.ids = panoptic_seg
        ids, areas = np.unique(panoptic_seg, return_counts=True)
        self._areas = dict(zip(ids.tolist(), areas.tolist()))
        if segments_info is None:
            divisor = getattr(metadata, "label_divisor", None)
            if divisor is None:
                raise ValueError("Without segments_info, metadata.label_divisor is needed to decode the ids")
            things = set(metadata.thing_dataset_id_to_contiguous_id.values())
            segments_info = [
                {"id": i, "category_id": i // divisor, "isthing": i // divisor in things}
                for i in self._areas
                if i != -1
            ]
        # Large segments first, so that small ones are drawn over them.
        present = [info for info in segments_info if info["id"] in self._areas]
        self._segments = sorted(present, key=lambda info: -self._areas[info["id"]])

    def non_empty_mask(self) -> np.ndarray:
        """Return which pixels belong to a segment, (H, W) bool."""
        return np.isin(self.ids, [info["id"] for info in self._segments])

    def semantic_masks(self) -> Iterator[tuple[np.ndarray, dict]]:
        """Yield the (H, W) bool mask and the info of each stuff segment."""
        return self._select(isthing=False)

    def instance_masks(self) -> Iterator[tuple[np.ndarray, dict]]:
        """Yield the (H, W) bool mask and the info of each thing segment."""
        return self._select(isthing=True)

    def _select(self, isthing: bool) -> Iterator[tuple[np.ndarray, dict]]:
        for info in self._segments:
            if bool(info["isthing"]) == isthing:
                yield self.ids == info["id"], info
