"""Masks of objects: bit masks, polygons, and the small soft masks that mask heads predict.

Shapes: N objects, image of H x W pixels, M side of a cropped mask. A polygon is a flat vector x0, y0, x1, y1,
... of absolute pixels. pycocotools rasterizes polygons.
"""

import itertools
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch

from detlib.layers.roi_align import roi_align
from detlib.ops.paste_masks import paste_masks_in_image
from detlib.structures.boxes import Boxes
from detlib.utils.memory import retry_if_cuda_oom

__all__ = [
    "BitMasks",
    "PolygonMasks",
    "ROIMasks",
    "bounded_polygons",
    "clip_polygon",
    "polygon_area",
    "polygons_to_bitmask",
    "rasterize_polygons_within_box",
]

# Size of the buffer in which `BitMasks.crop_and_resize` converts masks to floating point: 256 MiB.
_MAX_FLOATS = 2**26
# `bounded_polygons`: number of steps along its edges with which a polygon is rasterized without clipping, and
# the largest coordinates with which clipping is exact enough.
_FREE_STEPS = 2**21
_FARTHEST = 1e12


def polygon_area(x, y):
    """Return the area of a polygon with the corners `x` and `y`, (V,) each, by the shoelace formula."""
    return 0.5 * np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterize the union of polygons as COCO does.

    Args:
        polygons: flat coordinate vectors of at least 6 numbers; an empty list gives an empty mask.
        height: height of the mask in pixels.
        width: width of the mask in pixels.

    Returns:
        (height, width) bool array.

    Raises:
        ValueError: if a coordinate is NaN or infinite.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    polygons = bounded_polygons(polygons, height, width)
    if len(polygons) == 0 or height * width == 0:
        return np.zeros((height, width), dtype=bool)
    import pycocotools.mask as mask_util

    rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return mask_util.decode(rle).astype(bool)


def bounded_polygons(polygons: list[np.ndarray], height: int, width: int) -> list[np.ndarray]:
    """Clip polygons that reach far beyond an image, so that rasterizing them is safe and fast.

    pycocotools walks along the edges in steps of a fifth of a pixel, and crashes on long ones. Polygons that
    are inside the image, or not too far outside, are returned unchanged and keep their exact pixels.

    Args:
        polygons: flat coordinate vectors of at least 6 numbers.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        The polygons, without those that do not touch the image.

    Raises:
        ValueError: if a coordinate is NaN or infinite.
    """
    bounded = []
    margin = height + width + 1
    for k, polygon in enumerate(polygons):
        polygon = np.asarray(polygon, dtype=np.float64)
        near = _FREE_STEPS + 5 * len(polygon) * margin
        # The first comparison is fast and true for nearly all polygons.
        if not np.abs(polygon).max() <= near / (5 * len(polygon)):
            if not np.isfinite(polygon).all():
                raise ValueError(f"Polygon {k} has coordinates that are NaN or infinite")
            points = polygon.clip(-_FARTHEST, _FARTHEST).reshape(-1, 2)
            edges = np.abs(np.diff(points, axis=0, append=points[:1]))
            if 5 * edges.max(axis=1).sum() <= near:
                bounded.append(polygon)
                continue
            polygon = clip_polygon(points, -margin, -margin, width + margin, height + margin).ravel()
            if len(polygon) < 6:
                continue
        bounded.append(polygon)
    return bounded


def _clip_half_plane(points: np.ndarray, axis: int, limit: float, sign: int) -> np.ndarray:
    """Do one step of Sutherland-Hodgman: clip a polygon to ``sign * (coordinate - limit) >= 0``."""
    if len(points) == 0:
        return points
    distance = (points[:, axis] - limit) * sign
    following, next_distance = np.roll(points, -1, axis=0), np.roll(distance, -1)
    inside = distance >= 0
    crosses = inside != (next_distance >= 0)
    span = np.where(crosses, distance - next_distance, 1.0)
    cuts = points + (distance / span)[:, None] * (following - points)
    cuts[:, axis] = limit
    candidates = np.stack([points, cuts], axis=1).reshape(-1, 2)
    return candidates[np.stack([inside, crosses], axis=1).reshape(-1)]


def clip_polygon(points: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Clip a polygon to a rectangle (Sutherland and Hodgman, 1974).

    A concave polygon that is cut into several parts remains one polygon, whose parts are joined by edges
    along the border of the rectangle; area and rasterized mask equal those of the parts.

    Args:
        points: (P, 2) float, xy.
        x0, y0, x1, y1: the rectangle.

    Returns:
        (Q, 2) float64 array; Q = 0 if the clipped polygon has no area.
    """
    points = np.array(points, dtype=np.float64).reshape(-1, 2)
    for axis, limit, sign in ((0, x0, 1), (0, x1, -1), (1, y0, 1), (1, y1, -1)):
        points = _clip_half_plane(points, axis, limit, sign)
    if len(points) < 3:
        return np.zeros((0, 2))
    x, y = (points - points[0]).T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return points if area > 1e-9 else np.zeros((0, 2))


def rasterize_polygons_within_box(
    polygons: list[np.ndarray], box: np.ndarray, mask_size: int
) -> torch.Tensor:
    """Rasterize the part of polygons that is inside a box, as a square mask.

    The polygons are moved and scaled first and rasterized at the mask's resolution. This keeps detail that
    a mask of the entire image would lose.

    Args:
        polygons: flat coordinate vectors of one object.
        box: (4,) xyxy in the same coordinates.
        mask_size: side M of the mask.

    Returns:
        (M, M) bool tensor.

    Raises:
        ValueError: if the box or a polygon has coordinates that are NaN or infinite.
    """
    x0, y0, x1, y1 = np.asarray(box, dtype=np.float64)
    if not np.isfinite([x0, y0, x1, y1]).all():
        raise ValueError(f"The box of a mask must be finite, got {[x0, y0, x1, y1]}")
    x0, y0, x1, y1 = np.clip([x0, y0, x1, y1], -_FARTHEST, _FARTHEST)
    # Boxes of zero width or height would make the scale infinite.
    scale = mask_size / np.maximum([x1 - x0, y1 - y0], 0.1)
    moved = [
        ((polygon.clip(-_FARTHEST, _FARTHEST).reshape(-1, 2) - (x0, y0)) * scale).ravel()
        for polygon in polygons
    ]
    return torch.from_numpy(polygons_to_bitmask(moved, mask_size, mask_size))


class BitMasks:
    """The masks of N objects in one (N, H, W) bool tensor.

    Attributes:
        tensor: (N, H, W) bool.
        image_size: (H, W).
    """

    def __init__(self, tensor: torch.Tensor | np.ndarray):
        """Create the masks.

        Args:
            tensor: (N, H, W) tensor or array; nonzero pixels belong to the object.
        """
        tensor = torch.as_tensor(tensor).to(torch.bool)
        if tensor.dim() != 3:
            raise ValueError(f"BitMasks takes a tensor of shape (N, H, W), got {tuple(tensor.shape)}")
        self.image_size = tensor.shape[1:]
        self.tensor = tensor

    def to(self, *args: Any, **kwargs: Any) -> "BitMasks":
        """Return the masks on another device."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __getitem__(self, item: int | slice | torch.Tensor) -> "BitMasks":
        """Select objects by an index (giving N = 1), a slice, an integer vector or a boolean vector.

        Slices share memory with the original.
        """
        if isinstance(item, Integral):
            return BitMasks(self.tensor[item][None])
        selected = self.tensor[item]
        if selected.dim() != 3:
            raise IndexError(f"Indexing BitMasks with {item} gives shape {tuple(selected.shape)}")
        return BitMasks(selected)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield each mask as a (H, W) tensor."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.tensor)})"

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def nonempty(self) -> torch.Tensor:
        """Return which masks have at least one pixel set, (N,) bool."""
        return _any(self.tensor, (1, 2))

    @staticmethod
    def from_polygon_masks(
        polygon_masks: "PolygonMasks | list[list[torch.Tensor | np.ndarray]]", height: int, width: int
    ) -> "BitMasks":
        """Rasterize polygons.

        Args:
            polygon_masks: polygons in absolute pixels.
            height: height of the image.
            width: width of the image.
        """
        if not isinstance(polygon_masks, PolygonMasks):
            polygon_masks = PolygonMasks(polygon_masks)
        masks = np.zeros((len(polygon_masks), height, width), dtype=bool)
        for mask, polygons in zip(masks, polygon_masks):
            mask[:] = polygons_to_bitmask(polygons, height, width)
        return BitMasks(masks)

    @staticmethod
    def from_roi_masks(roi_masks: "ROIMasks", height: int, width: int) -> "BitMasks":
        """Resize masks that cover the entire image to its size.

        Args:
            roi_masks: masks whose box is the image.
            height: height of the image.
            width: width of the image.
        """
        frames = torch.tensor([[0.0, 0.0, width, height]], device=roi_masks.device).expand(len(roi_masks), 4)
        return roi_masks.to_bitmasks(frames, height, width)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Crop each mask to a box and resize it, by RoIAlign and a threshold of 0.5.

        Args:
            boxes: (N, 4) absolute xyxy pixels, one per object.
            mask_size: side M of the result.

        Returns:
            (N, M, M) bool tensor on the device of the masks.
        """
        if len(boxes) != len(self):
            raise ValueError(
                f"crop_and_resize needs one box per object, got {len(boxes)} boxes and {len(self)} objects"
            )
        boxes = boxes.to(self.tensor.device, torch.float32)
        crops = torch.empty(len(self), mask_size, mask_size, dtype=torch.bool, device=self.tensor.device)
        # RoIAlign needs floating point, four times the memory of bool: convert a few masks at a time.
        chunk_size = min(max(1, _MAX_FLOATS // max(1, self.image_size.numel())), len(self))
        buffer = torch.empty(chunk_size, 1, *self.image_size, device=self.tensor.device)
        indices = torch.arange(chunk_size, device=boxes.device, dtype=boxes.dtype)
        for start in range(0, len(self), chunk_size or 1):
            chunk = slice(start, start + chunk_size)
            num_masks = len(boxes[chunk])
            soft_masks = buffer[:num_masks].copy_(self.tensor[chunk, None])
            rois = torch.cat([indices[:num_masks, None], boxes[chunk]], dim=1)
            soft_crops = roi_align(soft_masks, rois, mask_size, 1.0, sampling_ratio=0, aligned=True)
            torch.ge(soft_crops[:, 0], 0.5, out=crops[chunk])
        return crops

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest box around each mask; zeros for an empty mask."""
        x0, x1 = _extent(_any(self.tensor, 1))
        y0, y1 = _extent(_any(self.tensor, 2))
        return Boxes(torch.stack([x0, y0, x1, y1], dim=1))

    def area(self) -> torch.Tensor:
        """Return the number of pixels set, (N,) int64."""
        return self.tensor.flatten(1).sum(dim=1)

    @staticmethod
    def cat(bitmasks_list: list["BitMasks"]) -> "BitMasks":
        """Concatenate multiple BitMasks of the same image size."""
        if len(bitmasks_list) == 0:
            raise ValueError("BitMasks.cat needs at least one BitMasks")
        for masks in bitmasks_list:
            if not isinstance(masks, BitMasks):
                raise TypeError(f"BitMasks.cat takes a list of BitMasks, got {type(masks).__name__}")
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list], dim=0))


def _any(masks: torch.Tensor, dim: int | tuple[int, int]) -> torch.Tensor:
    """Return `masks.any(dim)` of a bool tensor; ten times as fast on the CPU."""
    return masks.view(torch.uint8).amax(dim=dim).bool()


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and one-past-last True position in each row of (N, L); 0 and 0 if there are none."""
    length = occupied.shape[1]
    positions = torch.arange(length, device=occupied.device)
    first = torch.where(occupied, positions, length).amin(dim=1)
    end = torch.where(occupied, positions + 1, 0).amax(dim=1)
    return torch.minimum(first, end), end


class PolygonMasks:
    """The masks of N objects, each the union of polygons.

    Attributes:
        polygons: list of N lists of float64 arrays. They stay on the CPU.
    """

    def __init__(self, polygons: list[list[torch.Tensor | np.ndarray]]):
        """Check the polygons and convert them to arrays.

        Args:
            polygons: for each object a list of its polygons; each is a flat vector x0, y0, x1, y1, ... of
                absolute pixels (tensor, array or list).

        Raises:
            ValueError: the nesting is wrong, a polygon has fewer than 6 or an odd number of coordinates, or
                one is NaN or infinite; the message names object and polygon.
        """
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
        """Return the object itself: polygons stay on the CPU."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest box around the polygons of each object; zeros for one without polygons."""
        boxes = torch.zeros(len(self), 4)
        for box, polygons in zip(boxes, self.polygons):
            if polygons:
                points = np.concatenate(polygons).reshape(-1, 2)
                box[:2] = torch.from_numpy(points.min(axis=0))
                box[2:] = torch.from_numpy(points.max(axis=0))
        return Boxes(boxes)

    def nonempty(self) -> torch.Tensor:
        """Return which objects have a polygon, (N,) bool."""
        return torch.tensor([len(polygons) > 0 for polygons in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor) -> "PolygonMasks":
        """Select objects by an index (giving N = 1), a slice, a list, or an integer or boolean vector."""
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
        """Yield the list of polygons of each object."""
        return iter(self.polygons)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.polygons)})"

    def __len__(self) -> int:
        return len(self.polygons)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Crop each mask to a box and rasterize it at a fixed size.

        Args:
            boxes: (N, 4) absolute xyxy pixels, one per object.
            mask_size: side M of the result.

        Returns:
            (N, M, M) bool tensor on the device of `boxes`.
        """
        if len(boxes) != len(self):
            raise ValueError(
                f"crop_and_resize needs one box per object, got {len(boxes)} boxes and {len(self)} objects"
            )
        if len(self) == 0:
            return torch.empty(0, mask_size, mask_size, dtype=torch.bool, device=boxes.device)
        crops = [
            rasterize_polygons_within_box(polygons, box, mask_size)
            for polygons, box in zip(self.polygons, boxes.detach().cpu().numpy())
        ]
        return torch.stack(crops).to(boxes.device)

    def area(self):
        """Return the sum of the areas of each object's polygons, (N,) float64; overlaps count twice."""
        areas = [sum(polygon_area(p[0::2], p[1::2]) for p in polygons) for polygons in self.polygons]
        return torch.tensor(areas, dtype=torch.float64)

    @staticmethod
    def cat(polymasks_list: list["PolygonMasks"]) -> "PolygonMasks":
        """Concatenate multiple PolygonMasks; an empty list gives zero objects."""
        for masks in polymasks_list:
            if not isinstance(masks, PolygonMasks):
                raise TypeError(f"PolygonMasks.cat takes a list of PolygonMasks, got {type(masks).__name__}")
        return PolygonMasks._from_checked(
            list(itertools.chain(*(masks.polygons for masks in polymasks_list)))
        )


def _to_polygons(polygons: Any, index: int) -> list[np.ndarray]:
    """Check the polygons of object `index` and convert them to float64 arrays."""
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(
            f"Object {index}: polygons must be a list of coordinate vectors, got {type(polygons).__name__}. "
            "An object with one polygon needs a list with one element."
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
                f"Object {index}, polygon {k}: a polygon needs an even number of coordinates, at least 6, "
                f"got {len(array)}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"Object {index}, polygon {k}: the coordinates must not be NaN or infinite")
        converted.append(array)
    return converted


class ROIMasks:
    """The masks of N objects, each M x M pixels stretched over the object's box.

    Attributes:
        tensor: (N, M, M) mask values in [0, 1].
    """

    def __init__(self, tensor: torch.Tensor):
        """Create the masks.

        Args:
            tensor: (N, M, M) mask values in [0, 1].
        """
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks takes a tensor of shape (N, M, M), got {tuple(tensor.shape)}")
        self.tensor = tensor

    def to(self, device: torch.device) -> "ROIMasks":
        """Return the masks on another device."""
        return ROIMasks(self.tensor.to(device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: slice | torch.Tensor) -> "ROIMasks":
        """Select objects by an index (giving N = 1), a slice, an integer vector or a boolean vector."""
        if isinstance(item, Integral):
            return ROIMasks(self.tensor[item][None])
        selected = self.tensor[item]
        if selected.dim() != 3:
            raise IndexError(f"Indexing ROIMasks with {item} gives shape {tuple(selected.shape)}")
        return ROIMasks(selected)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.tensor)})"

    def to_bitmasks(self, boxes: torch.Tensor | Boxes, height, width, threshold=0.5) -> BitMasks:
        """Paste the masks into images.

        Args:
            boxes: (N, 4) absolute xyxy pixels, tensor or Boxes.
            height: height of the images.
            width: width of the images.
            threshold: a pixel belongs to the object if its mask value is at least this.
        """
        boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
        paste = retry_if_cuda_oom(paste_masks_in_image)
        return BitMasks(paste(self.tensor, boxes, (height, width), threshold))
