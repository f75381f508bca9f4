"""Augmentations that flip, resize, rotate or extend a whole picture."""

import sys

import numpy as np
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, VFlipTransform
from PIL import Image

from .augmentation import Augmentation, to_augmentation
from .transform import ExtentTransform, ResizeTransform, RotationTransform

__all__ = [
    "RandomApply",
    "RandomExtent",
    "RandomFlip",
    "RandomResize",
    "RandomRotation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]


def _check_style(owner: str, sample_style: str) -> None:
    if sample_style not in ("range", "choice"):
        raise ValueError(f"{owner}: sample_style must be 'range' or 'choice', got {sample_style!r}")


class RandomApply(Augmentation):
    """Apply an augmentation with a given probability, else nothing."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        """
        Args:
            tfm_or_aug: what to apply.
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
    """Mirror the picture, left-right or upside-down, with a given probability."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        """
        Args:
            prob: probability of a flip.
            horizontal: swap left and right.
            vertical: swap top and bottom. Exactly one of the two must be set; for both, use two RandomFlips.
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
    """Resize to a size drawn from a list."""

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
    """Scale the picture so that its shorter side gets a drawn length, keeping the aspect ratio.

    Where the longer side would exceed ``max_size``, the scale is lowered until it has that length.
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
            short_edge_length: list of lengths to choose from, or (min, max), both included, when
                ``sample_style`` is "range"; an int is a fixed length. A drawn length of 0 leaves the picture
                as it is.
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
        """The (height, width) that a picture of size (``oldh``, ``oldw``) gets; halves are rounded up, and a
        very long picture keeps one pixel."""
        short = short_edge_length * 1.0
        scale = short / min(oldh, oldw)
        new_height, new_width = (short, scale * oldw) if oldh < oldw else (scale * oldh, short)
        longest = max(new_height, new_width)
        if longest > max_size:
            scale = max_size * 1.0 / longest
            new_height, new_width = new_height * scale, new_width * scale
        return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


class ResizeScale(Augmentation):
    """Fit the picture, aspect ratio kept, into a target size times a random factor (scale jittering)."""

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
            target_height, target_width: size that factor 1 stands for.
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
    """Rotate the picture by a random angle, counter-clockwise in degrees."""

    def __init__(self, angle, expand: bool = True, center=None, sample_style: str = "range", interp=None):
        """
        Args:
            angle: [min, max] degrees, or a list to choose from; a number is a fixed angle.
            expand: enlarge the result so that it holds the whole rotated picture.
            center: two (x, y) corners of the region that the fixed point is drawn from, or a list of points
                to choose from; in fractions of width and height. The middle of the picture when left out.
            sample_style: "range" or "choice".
            interp: an OpenCV interpolation flag, linear when left out.
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
    """Cut out a random rectangle of the picture's own aspect ratio, which may reach beyond the picture."""

    def __init__(self, scale_range, shift_range):
        """
        Args:
            scale_range: (min, max) of the rectangle's size relative to the picture.
            shift_range: (x, y): its middle moves by up to half of these fractions of width and height.
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
