"""Multi-image augmentation: training images composed of several images.

An augmentation takes a `Sample` and a function that draws further samples. `DatasetMapper(mixing=[...])`
applies
it: before the other augmentations if ``before_augmentation`` is true, else after them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from fvcore.transforms.transform import TransformList

from detlib.data.detection_utils import decode_rle, transform_instance_annotations
from detlib.data.transforms import CropTransform, PadTransform, ResizeTransform
from detlib.structures import BoxMode, polygons_to_bitmask

__all__ = ["CopyPaste", "Mosaic", "MultiImageAugmentation", "Sample", "build_multi_image_augmentations"]

IGNORED = 255  # label of pixels of unknown class in label maps


@dataclass
class Sample:
    """An image with its annotations.

    Attributes:
        image: (H, W, C) array.
        annotations: dicts in the standard format, coordinates in pixels of ``image``; "segmentation" may also
            be an (H, W) array. There are no crowd regions.
        sem_seg: (H, W) integer array, or None.
    """

    image: np.ndarray
    annotations: list[dict] = field(default_factory=list)
    sem_seg: np.ndarray | None = None


class MultiImageAugmentation:
    """Base class of augmentations that compose one sample from several.

    Attributes:
        before_augmentation: whether it takes images as they are read, not augmented ones.
        makes_bitmasks: whether the resulting masks are arrays.
    """

    before_augmentation = False
    makes_bitmasks = False

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        """Compose ``sample`` with as many samples from ``draw()`` as needed; both may be changed."""
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__")


def _check_prob(owner: str, prob: float) -> None:
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"{owner}: prob must be in [0, 1], got {prob}")


def _corners_of(annotation: dict) -> np.ndarray:
    """Return the box of an annotation as a polygon, (8,)."""
    if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
        x, y, width, height, angle = annotation["bbox"]
        radians = np.deg2rad(angle)
        along_width = np.array([np.cos(radians), -np.sin(radians)]) * width / 2
        along_height = np.array([np.sin(radians), np.cos(radians)]) * height / 2
        corners = [a * along_width + b * along_height for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        return (np.array(corners) + [x, y]).reshape(-1)
    x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)


def mask_of(annotation: dict, height: int, width: int) -> np.ndarray:
    """Return the mask of an annotation, or its box if it has no mask, as a (height, width) bool array."""
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        segmentation = [_corners_of(annotation)]
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, height, width).astype(bool)
    mask = decode_rle(segmentation) if isinstance(segmentation, dict) else np.asarray(segmentation)
    if mask.shape != (height, width):
        raise ValueError(f"the mask has shape {mask.shape}, but the image has {(height, width)}")
    return mask.astype(bool)


def box_of(mask: np.ndarray) -> np.ndarray:
    """Return the tight box around a nonempty mask, (4,) float64 xyxy."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def _fit(array: np.ndarray, height: int, width: int, fill: int) -> np.ndarray:
    """Crop or pad an array at the right and bottom to a size."""
    cropped = array[:height, :width]
    room = [(0, height - cropped.shape[0]), (0, width - cropped.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(cropped, room, constant_values=fill)


class CopyPaste(MultiImageAugmentation):
    """Copy-paste: adds a random subset of another image's objects.

    Paper: "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation"
    (https://arxiv.org/abs/2012.07177), without blending, which the paper found to have no effect. The other
    image is augmented like the first, which should be by large scale jitter. Covered parts are removed from
    the masks of the objects below, and boxes are recomputed from them; covered keypoints become labeled but
    not visible.
    """

    makes_bitmasks = True

    def __init__(self, prob: float = 1.0, *, min_visible: float = 0.1, min_pixels: int = 16):
        """
        Args:
            prob: probability of pasting.
            min_visible: drop covered objects with a smaller visible fraction.
            min_pixels: drop covered or pasted objects with fewer visible pixels.
        """
        _check_prob("CopyPaste", prob)
        self.prob = prob
        self.min_visible = min_visible
        self.min_pixels = min_pixels

    def __repr__(self) -> str:
        return f"CopyPaste(prob={self.prob}, min_visible={self.min_visible}, min_pixels={self.min_pixels})"

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        height, width = sample.image.shape[:2]
        if np.random.uniform() >= self.prob:
            self._to_masks(sample.annotations, height, width)
            return sample
        other = draw()
        pasted = self._choose(other, height, width)
        cover = np.zeros((height, width), dtype=bool)
        for annotation in pasted:
            cover |= annotation["segmentation"].astype(bool)
        self._to_masks(sample.annotations, height, width)
        kept = [annotation for annotation in sample.annotations if self._hide(annotation, cover)]
        image = np.where(cover[:, :, None], _fit(other.image, height, width, 0), sample.image)
        sem_seg = sample.sem_seg
        if sem_seg is not None:
            above = np.full_like(sem_seg, IGNORED) if other.sem_seg is None else other.sem_seg
            sem_seg = np.where(cover, _fit(above, height, width, IGNORED), sem_seg)
        return Sample(image, kept + pasted, sem_seg)

    @staticmethod
    def _to_masks(annotations: list[dict], height: int, width: int) -> None:
        for annotation in annotations:
            annotation["segmentation"] = mask_of(annotation, height, width).astype(np.uint8)

    def _choose(self, other: Sample, height: int, width: int) -> list[dict]:
        """Choose a random subset of the objects, cropped to the size of the target image."""
        count = len(other.annotations)
        indices = np.random.permutation(count)[: np.random.randint(count + 1)]
        chosen = []
        for index in sorted(indices.tolist()):
            annotation = dict(other.annotations[index])
            full = mask_of(annotation, *other.image.shape[:2])
            mask = _fit(full, height, width, 0)
            if mask.sum() < max(self.min_pixels, 1):
                continue
            annotation["segmentation"] = mask.astype(np.uint8)
            if mask.sum() < full.sum():
                self._set_box(annotation, mask)
            if "keypoints" in annotation:
                points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
                points[(points[:, 0] > width) | (points[:, 1] > height)] = 0
                annotation["keypoints"] = points
            chosen.append(annotation)
        return chosen

    @staticmethod
    def _set_box(annotation: dict, mask: np.ndarray) -> None:
        if annotation["bbox_mode"] != BoxMode.XYWHA_ABS:  # a mask does not determine the angle
            annotation.update(bbox=box_of(mask), bbox_mode=BoxMode.XYXY_ABS)

    def _hide(self, annotation: dict, cover: np.ndarray) -> bool:
        """Remove the covered part of an object; return whether enough of it is left."""
        mask = annotation["segmentation"].astype(bool)
        visible = mask & ~cover
        before, after = int(mask.sum()), int(visible.sum())
        if after == before:
            return True
        if after < max(self.min_pixels, 1) or after < self.min_visible * before:
            return False
        annotation["segmentation"] = visible.astype(np.uint8)
        self._set_box(annotation, visible)
        if "keypoints" in annotation:
            points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
            columns = np.clip(points[:, 0].astype(int), 0, cover.shape[1] - 1)
            rows = np.clip(points[:, 1].astype(int), 0, cover.shape[0] - 1)
            points[cover[rows, columns] & (points[:, 2] == 2), 2] = 1
            annotation["keypoints"] = points
        return True


class Mosaic(MultiImageAugmentation):
    """Mosaic: composes four images around a random point (YOLOv4, https://arxiv.org/abs/2004.10934).

    Each image is scaled to fit the full canvas, keeping the aspect ratio, and cropped to one of the four
    areas around the point, with one of its corners at the point. Pixels that no image covers keep the fill
    value.
    """

    before_augmentation = True

    def __init__(
        self,
        prob: float = 1.0,
        *,
        size: tuple[int, int] = (640, 640),
        center_range: tuple[float, float] = (0.25, 0.75),
        fill: int = 114,
        min_visible: float = 0.1,
    ):
        """
        Args:
            prob: probability of a mosaic; otherwise the image is not changed.
            size: (height, width) of the canvas.
            center_range: range of the point, as fractions of the canvas size.
            fill: value of pixels that no image covers.
            min_visible: drop objects whose box keeps a smaller fraction of its area.
        """
        _check_prob("Mosaic", prob)
        low, high = center_range
        if not 0.0 < low <= high < 1.0:
            raise ValueError(f"Mosaic: center_range must be 0 < low <= high < 1, got {center_range}")
        if len(size) != 2 or min(size) < 2:
            raise ValueError(f"Mosaic: size must be (height, width), got {size}")
        self.prob = prob
        self.size = (size[0], size[1])
        self.center_range = low, high
        self.fill = fill
        self.min_visible = min_visible

    def __repr__(self) -> str:
        return f"Mosaic(prob={self.prob}, size={self.size}, center_range={self.center_range})"

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        if np.random.uniform() >= self.prob:
            return sample
        samples = [sample, draw(), draw(), draw()]
        height, width = self.size
        low, high = self.center_range
        y = int(np.clip(round(np.random.uniform(low, high) * height), 1, height - 1))
        x = int(np.clip(round(np.random.uniform(low, high) * width), 1, width - 1))
        areas = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
        with_sem_seg = any(part.sem_seg is not None for part in samples)
        channels = sample.image.shape[2:]
        canvas = Sample(
            np.full((height, width, *channels), self.fill, dtype=sample.image.dtype),
            [],
            np.full((height, width), IGNORED, dtype=np.int64) if with_sem_seg else None,
        )
        for part, area in zip(samples, areas):
            self._place(canvas, part, area, (x, y))
        return canvas

    def _place(self, canvas: Sample, part: Sample, area: tuple, center: tuple[int, int]) -> None:
        """Put one image into its area of the canvas, with its inner corner at the center."""
        height, width = part.image.shape[:2]
        scale = min(self.size[0] / height, self.size[1] / width)
        new_h, new_w = max(round(height * scale), 1), max(round(width * scale), 1)
        x0, y0, x1, y1 = area
        w, h = min(new_w, x1 - x0), min(new_h, y1 - y0)
        left, top = x1 == center[0], y1 == center[1]
        # The visible part of the image, and its position on the canvas.
        crop = CropTransform(new_w - w if left else 0, new_h - h if top else 0, w, h)
        cut = TransformList([ResizeTransform(height, width, new_h, new_w), crop])
        to_x, to_y = (x1 - w if left else x0), (y1 - h if top else y0)
        place = PadTransform(to_x, to_y, self.size[1] - to_x - w, self.size[0] - to_y - h)

        canvas.image[to_y : to_y + h, to_x : to_x + w] = cut.apply_image(part.image)
        if part.sem_seg is not None and canvas.sem_seg is not None:
            canvas.sem_seg[to_y : to_y + h, to_x : to_x + w] = cut.apply_segmentation(part.sem_seg)
        for annotation in part.annotations:
            before = self._area(cut, annotation)
            annotation = transform_instance_annotations(dict(annotation), cut, (h, w))
            if self._is_left(annotation, before, h, w):
                canvas.annotations.append(transform_instance_annotations(annotation, place, self.size))

    @staticmethod
    def _area(cut: TransformList, annotation: dict) -> float:
        """Return the area of the scaled box before it is clipped."""
        if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
            return 0.0
        box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = cut.apply_box(np.array([box], dtype=np.float64))[0]
        return (x1 - x0) * (y1 - y0)

    def _is_left(self, annotation: dict, before: float, height: int, width: int) -> bool:
        if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
            x, y = annotation["bbox"][:2]
            return 0 <= x <= width and 0 <= y <= height
        x0, y0, x1, y1 = annotation["bbox"]
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, np.ndarray) and not segmentation.any():
            return False
        if segmentation is not None and len(segmentation) == 0:
            return False
        return x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) >= self.min_visible * before


def build_multi_image_augmentations(cfg) -> list[MultiImageAugmentation]:
    """Build the multi-image augmentations of a config, in the order of application.

    Args:
        cfg: reads ``INPUT.MOSAIC`` and ``INPUT.COPY_PASTE``.
    """
    mixing: list[MultiImageAugmentation] = []
    if cfg.INPUT.MOSAIC.PROB > 0:
        mixing.append(Mosaic(cfg.INPUT.MOSAIC.PROB, size=tuple(cfg.INPUT.MOSAIC.SIZE)))
    if cfg.INPUT.COPY_PASTE.PROB > 0:
        mixing.append(CopyPaste(cfg.INPUT.COPY_PASTE.PROB))
    return mixing
