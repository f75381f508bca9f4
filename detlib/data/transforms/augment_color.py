"""Augmentations of colour. Intensities are factors: below 1 lowers, 1 keeps, above 1 raises."""

import numpy as np
from fvcore.transforms.transform import BlendTransform, Transform

from .augmentation import Augmentation

__all__ = ["RandomBrightness", "RandomContrast", "RandomLighting", "RandomSaturation"]

# ITU-R BT.601 luma of R, G, B.
_LUMA = (0.299, 0.587, 0.114)

# Principal components of the RGB values of ImageNet (AlexNet's colour augmentation), one column each.
_EIGEN_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
)
_EIGEN_VALUES = np.array([0.2175, 0.0188, 0.0045])


def _check_three_channels(owner: str, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"{owner} needs an RGB image of shape (H, W, 3), got shape {image.shape}")


class _RandomIntensity(Augmentation):
    def __init__(self, intensity_min: float, intensity_max: float):
        """
        Args:
            intensity_min, intensity_max: range of the factor.
        """
        super().__init__()
        self._init(locals())

    def _blend_with(self, source) -> Transform:
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=source, src_weight=1 - weight, dst_weight=weight)


class RandomContrast(_RandomIntensity):
    """Blend the picture with its mean value."""

    def get_transform(self, image) -> Transform:
        return self._blend_with(image.mean())


class RandomBrightness(_RandomIntensity):
    """Blend the picture with black."""

    def get_transform(self, image) -> Transform:
        return self._blend_with(0)


class RandomSaturation(_RandomIntensity):
    """Blend the picture, which must be RGB, with its grey version."""

    def get_transform(self, image) -> Transform:
        _check_three_channels("RandomSaturation", image)
        return self._blend_with(image.dot(_LUMA)[:, :, np.newaxis])


class RandomLighting(Augmentation):
    """Add a random mixture of ImageNet's principal colours to a picture, which must be RGB.

    Paper: "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.
    """

    def __init__(self, scale: float):
        """
        Args:
            scale: standard deviation of the mixture's weights.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image) -> Transform:
        _check_three_channels("RandomLighting", image)
        weights = np.random.normal(scale=self.scale, size=3)
        return BlendTransform(
            src_image=_EIGEN_VECTORS.dot(weights * _EIGEN_VALUES), src_weight=1.0, dst_weight=1.0
        )
