"""Augmentations: flips, resizes, rotations and crops; those of color are re-exported.

Each draws its random numbers in ``get_transform`` and returns one of the transforms of `transform`.
"""

import sys

import numpy as np
from fvcore.transforms.transform import (
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from detlib.data.transforms.augment_color import (
    RandomBrightness,
    RandomColorJitter,
    RandomContrast,
    RandomLighting,
    RandomSaturation,
)
from detlib.data.transforms.augmentation import Augmentation, to_augmentation
from detlib.data.transforms.transform import (
    CropTransform,
    ExtentTransform,
    PadTransform,
    ResizeTransform,
    RotationTransform,
)

__all__ = [
    "FixedSizeCrop",
    "MinIoURandomCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomColorJitter",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomExtent",
    "RandomFlip",
    "RandomLighting",
    "RandomResize",
    "RandomRotation",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]

_CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


def _check_style(owner: str, sample_style: str) -> None:
    if sample_style not in ("range", "choice"):
        raise ValueError(f"{owner}: sample_style must be 'range' or 'choice', got {sample_style!r}")


class RandomApply(Augmentation):
    """Apply an augmentation with a given probability."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        """
        Args:
            tfm_or_aug: the augmentation or transform to apply.
            prob: probability, in [0, 1].
        """
        if not 0.0 <= prob <= 1.0:
            raise ValueError(f"RandomApply: prob must be in [0, 1], got {prob}")
        self.prob = prob
        self.aug = to_augmentation(tfm_or_aug)

    def get_transform(self, *args) -> Transform:
        return self.aug.get_transform(*args) if self._rand_range() < self.prob else NoOpTransform()

    def __call__(self, aug_input) -> Transform:
        return self.aug(aug_input) if self._rand_range() < self.prob else NoOpTransform()

    def __repr__(self) -> str:
        return f"RandomApply({self.aug!r}, prob={self.prob})"

    __str__ = __repr__


class RandomFlip(Augmentation):
    """Flip the image horizontally or vertically with a given probability."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        """
        Args:
            prob: probability of a flip.
            horizontal: swap left and right.
            vertical: swap top and bottom. Exactly one of the two must be True; for both, use two RandomFlips.
        """
        super().__init__()
        if bool(horizontal) == bool(vertical):
            raise ValueError(
                "RandomFlip: exactly one of horizontal and vertical must be True, got "
                f"horizontal={horizontal}, vertical={vertical}; for both directions use two RandomFlips"
            )
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed size."""

    def __init__(self, shape, interp: int = Image.Resampling.BILINEAR):
        """
        Args:
            shape: (height, width), or one int for both.
            interp: a `PIL.Image.Resampling` method.
        """
        if isinstance(shape, int):
            shape = (shape, shape)
        shape = tuple(shape)
        self._init(locals())

    def get_transform(self, image) -> Transform:
        return ResizeTransform(image.shape[0], image.shape[1], self.shape[0], self.shape[1], self.interp)


class RandomResize(Augmentation):
    """Resize to a random size from a list."""

    def __init__(self, shape_list, interp: int = Image.Resampling.BILINEAR):
        """
        Args:
            shape_list: list of (height, width).
            interp: a `PIL.Image.Resampling` method.
        """
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = self.shape_list[np.random.choice(len(self.shape_list))]
        return ResizeTransform(image.shape[0], image.shape[1], height, width, self.interp)


class ResizeShortestEdge(Augmentation):
    """Scale the image so that its shorter side has a random length, keeping the aspect ratio.

    If the longer side would exceed ``max_size``, the scale is reduced so that it has that length.
    """

    def __init__(
        self,
        short_edge_length,
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.Resampling.BILINEAR,
    ):
        """
        Args:
            short_edge_length: list of lengths to choose from, or (min, max), both inclusive, if
                ``sample_style`` is "range"; an int is a fixed length. The length 0 does not resize the image.
            max_size: largest allowed length of the longer side.
            sample_style: "range" or "choice".
            interp: a `PIL.Image.Resampling` method.
        """
        super().__init__()
        _check_style("ResizeShortestEdge", sample_style)
        self.is_range = sample_style == "range"
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if self.is_range and len(short_edge_length) != 2:
            raise ValueError(
                "ResizeShortestEdge: short_edge_length must be (min, max) when sample_style is 'range', "
                f"got {short_edge_length}; for a list of lengths use sample_style='choice'"
            )
        if len(short_edge_length) == 0:
            raise ValueError("ResizeShortestEdge: short_edge_length must not be empty")
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = image.shape[:2]
        if self.is_range:
            size = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, size, self.max_size)
        return ResizeTransform(height, width, new_height, new_width, self.interp)

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Return the new (height, width) of an image of size (``oldh``, ``oldw``).

        Halves are rounded up, and each side has at least one pixel.
        """
        short = short_edge_length * 1.0
        scale = short / min(oldh, oldw)
        new_height, new_width = (short, scale * oldw) if oldh < oldw else (scale * oldh, short)
        longest = max(new_height, new_width)
        if longest > max_size:
            scale = max_size * 1.0 / longest
            new_height, new_width = new_height * scale, new_width * scale
        return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


class ResizeScale(Augmentation):
    """Scale the image, keeping the aspect ratio, to fit a target size times a random factor (scale
    jitter)."""

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = Image.Resampling.BILINEAR,
    ):
        """
        Args:
            min_scale, max_scale: range of the random factor.
            target_height, target_width: target size for the factor 1.
            interp: a `PIL.Image.Resampling` method.
        """
        super().__init__()
        self._init(locals())

    def _get_resize(self, image: np.ndarray, scale: float) -> Transform:
        input_size = image.shape[:2]
        target_size = np.multiply((self.target_height, self.target_width), scale)
        factor = np.minimum(target_size[0] / input_size[0], target_size[1] / input_size[1])
        new_height, new_width = np.maximum(np.round(np.multiply(input_size, factor)), 1).astype(int)
        return ResizeTransform(input_size[0], input_size[1], int(new_height), int(new_width), self.interp)

    def get_transform(self, image: np.ndarray) -> Transform:
        return self._get_resize(image, np.random.uniform(self.min_scale, self.max_scale))


class RandomRotation(Augmentation):
    """Rotate the image by a random angle, counter-clockwise in degrees."""

    def __init__(self, angle, expand: bool = True, center=None, sample_style: str = "range", interp=None):
        """
        Args:
            angle: [min, max] degrees, or a list to choose from; a number is a fixed angle.
            expand: enlarge the result so that it contains the full rotated image.
            center: two (x, y) corners of the region that the fixed point is drawn from, or a list of points
                to choose from; in fractions of width and height. By default the center of the image.
            sample_style: "range" or "choice".
            interp: an OpenCV interpolation flag, by default linear.
        """
        super().__init__()
        _check_style("RandomRotation", sample_style)
        self.is_range = sample_style == "range"
        if isinstance(angle, (float, int)):
            angle = (angle, angle)
        if center is not None and isinstance(center[0], (float, int)):
            center = (center, center)
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = image.shape[:2]
        center = None
        if self.is_range:
            angle = np.random.uniform(self.angle[0], self.angle[1])
            if self.center is not None:
                (x0, y0), (x1, y1) = self.center
                center = (np.random.uniform(x0, x1), np.random.uniform(y0, y1))
        else:
            angle = np.random.choice(self.angle)
            if self.center is not None:
                center = self.center[np.random.choice(len(self.center))]
        if center is not None:
            center = (width * center[0], height * center[1])
        if angle % 360 == 0:
            return NoOpTransform()
        return RotationTransform(height, width, angle, expand=self.expand, center=center, interp=self.interp)


class RandomExtent(Augmentation):
    """Crop a random rectangle with the image's aspect ratio, which may extend beyond the image."""

    def __init__(self, scale_range, shift_range):
        """
        Args:
            scale_range: (min, max) of the rectangle's size relative to the image.
            shift_range: (x, y); its center moves by up to half of these fractions of width and height.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image) -> Transform:
        height, width = image.shape[:2]
        rect = np.array([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height])
        rect *= np.random.uniform(self.scale_range[0], self.scale_range[1])
        rect[0::2] += self.shift_range[0] * width * (np.random.rand() - 0.5) + 0.5 * width
        rect[1::2] += self.shift_range[1] * height * (np.random.rand() - 0.5) + 0.5 * height
        size = (int(rect[3] - rect[1]), int(rect[2] - rect[0]))
        return ExtentTransform(src_rect=tuple(rect), output_size=size)


class RandomCrop(Augmentation):
    """Crop a rectangle at a random position.

    ``crop_type`` specifies how its size follows from ``crop_size``:

    - "relative": ``crop_size`` = (h, w) are fractions of the image, in (0, 1].
    - "relative_range": each fraction is drawn from [h, 1] and [w, 1].
    - "absolute": ``crop_size`` = (h, w) in pixels, at most the image.
    - "absolute_range": height and width are drawn from [min, max] = ``crop_size`` in pixels, at most the
      image.
    """

    def __init__(self, crop_type: str, crop_size):
        """
        Args:
            crop_type: one of the four types above.
            crop_size: two numbers.
        """
        super().__init__()
        if crop_type not in _CROP_TYPES:
            raise ValueError(
                f"RandomCrop: crop_type must be one of {', '.join(_CROP_TYPES)}, got {crop_type!r}"
            )
        if len(crop_size) != 2:
            raise ValueError(f"RandomCrop: crop_size must be two numbers, got {crop_size}")
        if crop_type.startswith("relative") and not all(0 < size <= 1 for size in crop_size):
            raise ValueError(
                f"RandomCrop: crop_size of type {crop_type!r} must be in (0, 1], got {crop_size}"
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
        """Draw the (height, width) of the crop of an image of size (height, width)."""
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
    """A `RandomCrop` for semantic segmentation that avoids crops that one category dominates.

    The last of ten random crops is used if none satisfies the constraint.
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
            crop_type, crop_size: see `RandomCrop`.
            single_category_max_area: largest fraction of the crop that one category may cover; 1.0 sets no
                limit.
            ignored_category: label that is not counted.
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
    """Crop a random rectangle of a fixed size; pad smaller images at the right and bottom."""

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
            pad: whether to pad smaller images up to ``crop_size``.
            pad_value: value of padded image pixels.
            seg_pad_value: value of padded segmentation pixels.
        """
        super().__init__()
        self._init(locals())

    def _get_crop(self, image: np.ndarray) -> Transform:
        input_size, output_size = image.shape[:2], self.crop_size
        room = np.maximum(np.subtract(input_size, output_size), 0)
        # One random number determines both offsets.
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
    """Return the IoU of one rectangle (4,) with boxes (N, 4), all xyxy; 0 where both are empty."""
    top_left = np.maximum(patch[:2], boxes[:, :2])
    bottom_right = np.minimum(patch[2:], boxes[:, 2:])
    overlap = np.prod(np.clip(bottom_right - top_left, 0, None), axis=1)
    union = np.prod(patch[2:] - patch[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - overlap
    return np.where(overlap > 0, overlap / np.maximum(union, 1e-12), 0.0)


class MinIoURandomCrop(Augmentation):
    """Random crop of SSD: it has a minimum IoU with every box and contains the center of at least one.

    Paper: "SSD: Single Shot MultiBox Detector" (https://arxiv.org/abs/1512.02325), section 2.2.
    """

    def __init__(
        self, min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3, mode_trials=1000, crop_trials=50
    ):
        """
        Args:
            min_ious: thresholds to draw from, in addition to "no crop" and "any crop".
            min_crop_size: smallest side of the crop, as a fraction of the image's side.
            mode_trials: maximum number of thresholds to draw.
            crop_trials: maximum number of crops to draw for each threshold.
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
