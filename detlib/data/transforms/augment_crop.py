"""Augmentations that cut a part out of a picture."""

import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList

from .augmentation import Augmentation
from .transform import CropTransform, PadTransform

__all__ = ["FixedSizeCrop", "MinIoURandomCrop", "RandomCrop", "RandomCrop_CategoryAreaConstraint"]

_CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class RandomCrop(Augmentation):
    """Cut out a rectangle at a random place.

    ``crop_type`` says how its size is found from ``crop_size``:

    - "relative": ``crop_size`` = (h, w) are fractions of the picture, in (0, 1].
    - "relative_range": each fraction is drawn from [h, 1] and [w, 1].
    - "absolute": ``crop_size`` = (h, w) in pixels, at most the picture.
    - "absolute_range": height and width are drawn from [min, max] = ``crop_size`` in pixels, at most the
      picture.
    """

    def __init__(self, crop_type: str, crop_size):
        """
        Args:
            crop_type: one of the four above.
            crop_size: two numbers.
        """
        super().__init__()
        if crop_type not in _CROP_TYPES:
            raise ValueError(
                f"RandomCrop: crop_type must be one of {', '.join(_CROP_TYPES)}, got {crop_type!r}"
            )
        if len(crop_size) != 2:
            raise ValueError(f"RandomCrop: crop_size must hold two numbers, got {crop_size}")
        if crop_type.startswith("relative") and not all(0 < size <= 1 for size in crop_size):
            raise ValueError(
                f"RandomCrop: crop_size of type {crop_type!r} must lie in (0, 1], got {crop_size}"
            )
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(
                f"RandomCrop: crop_size must be (min, max) for 'absolute_range', got {crop_size}"
            )
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        y0 = np.random.randint(height - crop_h + 1)
        x0 = np.random.randint(width - crop_w + 1)
        return CropTransform(x0, y0, crop_w, crop_h)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the (height, width) of the rectangle for a picture of size (height, width)."""
        height, width = image_size
        if self.crop_type == "absolute":
            return min(self.crop_size[0], height), min(self.crop_size[1], width)
        if self.crop_type == "absolute_range":
            low, high = self.crop_size
            crop_h = np.random.randint(min(height, low), min(height, high) + 1)
            crop_w = np.random.randint(min(width, low), min(width, high) + 1)
            return crop_h, crop_w
        fraction_h, fraction_w = self.crop_size
        if self.crop_type == "relative_range":
            smallest = np.asarray(self.crop_size, dtype=np.float32)
            fraction_h, fraction_w = smallest + np.random.rand(2) * (1 - smallest)
        return max(int(height * fraction_h + 0.5), 1), max(int(width * fraction_w + 0.5), 1)


class RandomCrop_CategoryAreaConstraint(Augmentation):  # noqa: N801 (the public name)
    """:class:`RandomCrop` that avoids crops of which one category covers nearly all (for semantic
    segmentation).

    Ten crops are tried; the last is taken if none fits.
    """

    def __init__(
        self,
        crop_type: str,
        crop_size,
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ):
        """
        Args:
            crop_type, crop_size: as for :class:`RandomCrop`.
            single_category_max_area: largest fraction of the crop that one category may cover; 1.0 for no
                limit.
            ignored_category: label that does not count.
        """
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self._init(locals())

    def get_transform(self, image, sem_seg) -> Transform:
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        height, width = sem_seg.shape
        for _ in range(10):
            crop_h, crop_w = self.crop_aug.get_crop_size((height, width))
            y0 = np.random.randint(height - crop_h + 1)
            x0 = np.random.randint(width - crop_w + 1)
            labels, counts = np.unique(sem_seg[y0 : y0 + crop_h, x0 : x0 + crop_w], return_counts=True)
            if self.ignored_category is not None:
                counts = counts[labels != self.ignored_category]
            if len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area:
                break
        return CropTransform(x0, y0, crop_w, crop_h)


class FixedSizeCrop(Augmentation):
    """Cut a random rectangle of a fixed size; a picture that is smaller is padded at the right and bottom."""

    def __init__(
        self,
        crop_size: tuple[int, int],
        pad: bool = True,
        pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ):
        """
        Args:
            crop_size: (height, width) in pixels.
            pad: whether to pad smaller pictures up to ``crop_size``.
            pad_value: value of padded image pixels.
            seg_pad_value: value of padded segmentation pixels.
        """
        super().__init__()
        self._init(locals())

    def _get_crop(self, image: np.ndarray) -> Transform:
        input_size, output_size = image.shape[:2], self.crop_size
        room = np.maximum(np.subtract(input_size, output_size), 0)
        # One draw serves both directions.
        y0, x0 = np.round(np.multiply(room, np.random.uniform(0.0, 1.0))).astype(int)
        return CropTransform(
            int(x0), int(y0), output_size[1], output_size[0], orig_w=input_size[1], orig_h=input_size[0]
        )

    def _get_pad(self, image: np.ndarray) -> Transform:
        input_size, output_size = image.shape[:2], self.crop_size
        pad_h, pad_w = np.maximum(np.subtract(output_size, input_size), 0)
        cropped_h, cropped_w = np.minimum(input_size, output_size)
        return PadTransform(
            0, 0, int(pad_w), int(pad_h), int(cropped_w), int(cropped_h), self.pad_value, self.seg_pad_value
        )

    def get_transform(self, image: np.ndarray) -> TransformList:
        transforms = [self._get_crop(image)]
        if self.pad:
            transforms.append(self._get_pad(image))
        return TransformList(transforms)


def _iou_with_boxes(patch: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of one rectangle (4,) with boxes (N, 4), all xyxy; 0 where both are empty."""
    top_left = np.maximum(patch[:2], boxes[:, :2])
    bottom_right = np.minimum(patch[2:], boxes[:, 2:])
    overlap = np.prod(np.clip(bottom_right - top_left, 0, None), axis=1)
    union = np.prod(patch[2:] - patch[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - overlap
    return np.where(overlap > 0, overlap / np.maximum(union, 1e-12), 0.0)


class MinIoURandomCrop(Augmentation):
    """Random crop that has at least a drawn IoU with every box and holds the centre of at least one (SSD).

    Paper: "SSD: Single Shot MultiBox Detector" (https://arxiv.org/abs/1512.02325), section 2.2.
    """

    def __init__(
        self, min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3, mode_trials=1000, crop_trials=50
    ):
        """
        Args:
            min_ious: thresholds to draw from, besides "no crop" and "any crop".
            min_crop_size: smallest side of the crop, as a fraction of the picture's.
            mode_trials: how often a threshold is drawn.
            crop_trials: how many crops are tried for each.
        """
        self.sample_mode = (1, *min_ious, 0)
        self._init(locals())

    def get_transform(self, image, boxes) -> Transform:
        if boxes is None:
            return NoOpTransform()
        height, width = image.shape[:2]
        for _ in range(self.mode_trials):
            min_iou = np.random.choice(self.sample_mode)
            if min_iou == 1:
                return NoOpTransform()
            for _ in range(self.crop_trials):
                patch = self._draw_patch(height, width)
                if patch is not None and self._fits(patch, boxes, min_iou):
                    x0, y0, x1, y1 = (int(v) for v in patch)
                    return CropTransform(x0, y0, x1 - x0, y1 - y0)
        return NoOpTransform()

    def _draw_patch(self, height: int, width: int) -> np.ndarray | None:
        new_w = np.random.uniform(self.min_crop_size * width, width)
        new_h = np.random.uniform(self.min_crop_size * height, height)
        if not 0.5 <= new_h / new_w <= 2:
            return None
        left = np.random.uniform(width - new_w)
        top = np.random.uniform(height - new_h)
        patch = np.array((int(left), int(top), int(left + new_w), int(top + new_h)))
        return None if patch[2] == patch[0] or patch[3] == patch[1] else patch

    def _fits(self, patch: np.ndarray, boxes: np.ndarray, min_iou: float) -> bool:
        if len(boxes) == 0:
            return True
        if _iou_with_boxes(patch, boxes).min() < min_iou:
            return False
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        return bool(((center > patch[:2]) & (center < patch[2:])).all(axis=1).any())
