"""Masks as polygons, and their rasterisation with pycocotools.

Shapes: N objects, M side of a cropped mask. A polygon is a flat vector x0, y0, x1, y1, ...
of absolute pixels.
"""

import itertools
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .boxes import Boxes

__all__ = ["PolygonMasks", "polygon_area", "polygons_to_bitmask", "rasterize_polygons_within_box"]


def polygon_area(x, y):
    """Area of the polygon with the corner coordinates `x` and `y`, (V,) each (shoelace formula)."""
    return 0.5 * np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterises the union of polygons as COCO does.

    Args:
        polygons: flat coordinate vectors of at least 6 numbers; none gives an empty mask.
        height: of the mask.
        width: of the mask.

    Returns:
        (height, width) bool array.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    import pycocotools.mask as mask_util

    rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return mask_util.decode(rle).astype(bool)


def rasterize_polygons_within_box(
    polygons: list[np.ndarray], box: np.ndarray, mask_size: int
) -> torch.Tensor:
    """Rasterises the part of polygons within a box, stretched to a square mask.

    The polygons are moved and scaled first and rasterised at the mask's resolution, which keeps what a
    mask of the whole picture would lose.

    Args:
        polygons: flat coordinate vectors of one object.
        box: (4,) xyxy in the same coordinates.
        mask_size: side M of the mask.

    Returns:
        (M, M) bool tensor.
    """
    x0, y0, x1, y1 = np.asarray(box, dtype=np.float64)
    # Boxes of (nearly) no size would make the scale infinite.
    scale = mask_size / np.maximum([x1 - x0, y1 - y0], 0.1)
    moved = [((polygon.reshape(-1, 2) - (x0, y0)) * scale).ravel() for polygon in polygons]
    return torch.from_numpy(polygons_to_bitmask(moved, mask_size, mask_size))


class PolygonMasks:
    """The masks of N objects, each the union of polygons.

    The polygons are float64 arrays in main memory whatever `to()` is asked for.

    Args:
        polygons: for each object a list of its polygons, each a flat vector x0, y0, x1, y1, ... of absolute
            pixels (tensor, array or list).

    Attributes:
        polygons: list of N lists of float64 arrays.

    Raises:
        ValueError: if the nesting is wrong, or a polygon has fewer than 6 or an odd number of coordinates;
            the message names object and polygon.
    """

    def __init__(self, polygons: list[list[torch.Tensor | np.ndarray]]):
        if not isinstance(polygons, (list, tuple)):
            raise ValueError(
                f"PolygonMasks takes a list of polygons for each object, got {type(polygons).__name__}"
            )
        self.polygons: list[list[np.ndarray]] = [
            _to_polygons(polygons_of_object, i) for i, polygons_of_object in enumerate(polygons)
        ]

    @classmethod
    def _from_checked(cls, polygons: list[list[np.ndarray]]) -> "PolygonMasks":
        masks = cls([])
        masks.polygons = polygons
        return masks

    def to(self, *args: Any, **kwargs: Any) -> "PolygonMasks":
        """The object itself: polygons stay on the CPU."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """The smallest box around the polygons of each object; zeros for an object without polygons."""
        boxes = torch.zeros(len(self), 4)
        for box, polygons in zip(boxes, self.polygons):
            if polygons:
                points = np.concatenate(polygons).reshape(-1, 2)
                box[:2] = torch.from_numpy(points.min(axis=0))
                box[2:] = torch.from_numpy(points.max(axis=0))
        return Boxes(boxes)

    def nonempty(self) -> torch.Tensor:
        """(N,) bool: which objects have a polygon."""
        return torch.tensor([len(polygons) > 0 for polygons in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor) -> "PolygonMasks":
        """Selects objects by an index (giving N = 1), a slice, a list, an integer or a boolean vector."""
        if isinstance(item, Integral):
            return self._from_checked([self.polygons[item]])
        if isinstance(item, slice):
            return self._from_checked(self.polygons[item])
        index = torch.as_tensor(item)
        if index.numel() == 0 and index.dtype != torch.bool:
            index = index.long()
        if index.dim() != 1 or index.is_floating_point() or index.is_complex():
            raise TypeError(
                f"PolygonMasks cannot be indexed with {index.dtype} of shape {tuple(index.shape)}"
            )
        positions = torch.arange(len(self))[index.cpu()]
        return self._from_checked([self.polygons[i] for i in positions.tolist()])

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Yields the list of polygons of each object."""
        return iter(self.polygons)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.polygons)})"

    def __len__(self) -> int:
        return len(self.polygons)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Crops each object's mask to a box and rasterises it at one size.

        Args:
            boxes: (N, 4) absolute xyxy pixels, one per object.
            mask_size: side M of the result.

        Returns:
            (N, M, M) bool tensor on the device of `boxes`.
        """
        if len(boxes) != len(self):
            raise ValueError(
                f"crop_and_resize needs a box per object: {len(boxes)} boxes, {len(self)} objects"
            )
        if len(self) == 0:
            return torch.empty(0, mask_size, mask_size, dtype=torch.bool, device=boxes.device)
        crops = [
            rasterize_polygons_within_box(polygons, box, mask_size)
            for polygons, box in zip(self.polygons, boxes.detach().cpu().numpy())
        ]
        return torch.stack(crops).to(boxes.device)

    def area(self):
        """(N,) float64: sum of the areas of each object's polygons, overlaps counted twice."""
        areas = [sum(polygon_area(p[0::2], p[1::2]) for p in polygons) for polygons in self.polygons]
        return torch.tensor(areas, dtype=torch.float64)

    @staticmethod
    def cat(polymasks_list: list["PolygonMasks"]) -> "PolygonMasks":
        """Joins the objects of several PolygonMasks; an empty list gives none."""
        for masks in polymasks_list:
            if not isinstance(masks, PolygonMasks):
                raise TypeError(f"PolygonMasks.cat takes a list of PolygonMasks, got {type(masks).__name__}")
        return PolygonMasks._from_checked(
            list(itertools.chain(*(masks.polygons for masks in polymasks_list)))
        )


def _to_polygons(polygons: Any, index: int) -> list[np.ndarray]:
    """Checks the polygons of object `index` and makes them float64 arrays."""
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(
            f"Object {index}: polygons must be a list of coordinate vectors, got {type(polygons).__name__}. "
            "An object with one polygon needs a list of one."
        )
    converted = []
    for k, polygon in enumerate(polygons):
        if isinstance(polygon, torch.Tensor):
            polygon = polygon.detach().cpu()
        array = np.asarray(polygon, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(
                f"Object {index}, polygon {k}: expected a vector x0, y0, x1, y1, ..., got shape {array.shape}"
            )
        if len(array) % 2 != 0 or len(array) < 6:
            raise ValueError(
                f"Object {index}, polygon {k}: a polygon has an even number of coordinates, 6 or more, "
                f"got {len(array)}"
            )
        converted.append(array)
    return converted
