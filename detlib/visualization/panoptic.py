"""A panoptic segmentation taken apart into its segments, for drawing."""

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["PanopticSegments"]


class PanopticSegments:
    """The segments of a picture.

    Args:
        panoptic_seg: (H, W) integer array of segment ids.
        segments_info: for each segment a dict with "id", "category_id", "isthing", perhaps "score"; or None
            if each id is category * metadata.label_divisor + instance, and -1 is no segment.
        metadata: needed if `segments_info` is None, with `label_divisor` and
            `thing_dataset_id_to_contiguous_id`.
    """

    def __init__(self, panoptic_seg: np.ndarray, segments_info: list[dict] | None, metadata: Any = None):
        self.ids = panoptic_seg
        ids, areas = np.unique(panoptic_seg, return_counts=True)
        self._areas = dict(zip(ids.tolist(), areas.tolist()))
        if segments_info is None:
            divisor = getattr(metadata, "label_divisor", None)
            if divisor is None:
                raise ValueError("Without segments_info, metadata.label_divisor must say how ids are formed")
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
        """(H, W) bool: which pixels belong to a segment."""
        return np.isin(self.ids, [info["id"] for info in self._segments])

    def stuff(self) -> Iterator[tuple[np.ndarray, dict]]:
        """Yields (H, W) bool mask and info of each segment of stuff."""
        return self._of_kind(False)

    def things(self) -> Iterator[tuple[np.ndarray, dict]]:
        """Yields (H, W) bool mask and info of each object."""
        return self._of_kind(True)

    def _of_kind(self, isthing: bool) -> Iterator[tuple[np.ndarray, dict]]:
        for info in self._segments:
            if bool(info["isthing"]) == isthing:
                yield self.ids == info["id"], info
