"""The augmentations under the module path that projects import them from."""

from .augment_color import (
    RandomBrightness,
    RandomColorJitter,
    RandomContrast,
    RandomLighting,
    RandomSaturation,
)
from .augment_crop import FixedSizeCrop, MinIoURandomCrop, RandomCrop, RandomCrop_CategoryAreaConstraint
from .augment_geometry import (
    RandomApply,
    RandomExtent,
    RandomFlip,
    RandomResize,
    RandomRotation,
    Resize,
    ResizeScale,
    ResizeShortestEdge,
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
