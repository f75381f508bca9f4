"""Color augmentations. Intensities are factors: below 1 decreases, 1 keeps, above 1 increases."""

import numpy as np
from fvcore.transforms.transform import BlendTransform, Transform, TransformList

from detlib.data.transforms.augmentation import Augmentation
from detlib.data.transforms.transform import ColorTransform

__all__ = ["RandomBrightness", "RandomColorJitter", "RandomContrast", "RandomLighting", "RandomSaturation"]

# ITU-R BT.601 luma of R, G, B.
_LUMA = (0.299, 0.587, 0.114)

# Principal components of the RGB values of ImageNet (AlexNet's color augmentation), one column each.
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
            intensity_min, intensity_max: range of the random factor.
        """
        super().__init__()
        self._init(locals())

    def _blend_with(self, source) -> Transform:
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=source, src_weight=1 - weight, dst_weight=weight)


class RandomContrast(_RandomIntensity):
    """Change the contrast: blend the image with its mean value."""

    def get_transform(self, image) -> Transform:
        return self._blend_with(image.mean())


class RandomBrightness(_RandomIntensity):
    """Change the brightness: blend the image with black."""

    def get_transform(self, image) -> Transform:
        return self._blend_with(0)


class RandomSaturation(_RandomIntensity):
    """Change the saturation: blend the image, which must be RGB, with its grayscale version."""

    def get_transform(self, image) -> Transform:
        _check_three_channels("RandomSaturation", image)
        return self._blend_with(image.dot(_LUMA)[:, :, np.newaxis])


class RandomLighting(Augmentation):
    """Add a random mixture of ImageNet's principal colors to an image, which must be RGB.

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


def _luma(image: np.ndarray, is_bgr: bool) -> np.ndarray:
    return image @ np.array(_LUMA[::-1] if is_bgr else _LUMA, dtype=np.float32)


def turn_hue(image: np.ndarray, turn: float, is_bgr: bool) -> np.ndarray:
    """Rotate the hue of a uint8 RGB or BGR image by a fraction of the circle (HSV with 180 hue steps)."""
    import cv2

    to_hsv, back = (
        (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR) if is_bgr else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    )
    hsv = cv2.cvtColor(np.ascontiguousarray(image), to_hsv)
    hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int32) + round(turn * 180)) % 180
    return cv2.cvtColor(hsv, back)


class RandomColorJitter(Augmentation):
    """Change brightness, contrast, saturation and hue at random, in random order.

    Paper: "Some Improvements on Deep Convolutional Neural Network Based Image Classification"
    (https://arxiv.org/abs/1312.5402).
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        prob: float = 1.0,
        image_format: str = "BGR",
    ):
        """
        Args:
            brightness, contrast, saturation: the factor is drawn from [max(0, 1 - x), 1 + x].
            hue: the rotation is drawn from [-x, x], as a fraction of the circle; at most 0.5.
            prob: probability of a change.
            image_format: "BGR" or "RGB".
        """
        super().__init__()
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise ValueError(
                "RandomColorJitter: brightness, contrast and saturation must not be negative and hue must be "
                f"in [0, 0.5], got {brightness}, {contrast}, {saturation}, {hue}"
            )
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"RandomColorJitter: image_format must be 'BGR' or 'RGB', got {image_format!r}")
        self._init(locals())

    def get_transform(self, image) -> Transform:
        _check_three_channels("RandomColorJitter", image)
        if np.random.uniform() >= self.prob:
            return TransformList([])
        is_bgr = self.image_format == "BGR"
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [np.random.uniform(max(0.0, 1 - x), 1 + x) for x in strengths]
        turn = np.random.uniform(-self.hue, self.hue)

        def blend(image: np.ndarray, source, factor: float) -> np.ndarray:
            out = image.astype(np.float32) * np.float32(factor) + np.float32(1 - factor) * source
            return np.clip(np.rint(out), 0, 255).astype(np.uint8)

        steps = [
            lambda x: blend(x, np.float32(0), factors[0]),
            lambda x: blend(x, np.float32(_luma(x, is_bgr).mean()), factors[1]),
            lambda x: blend(x, _luma(x, is_bgr)[:, :, None], factors[2]),
            lambda x: turn_hue(x, turn, is_bgr),
        ]
        active = [step for step, x in zip(steps, (*strengths, self.hue)) if x > 0]
        order = np.random.permutation(len(active))
        return TransformList([ColorTransform(active[i]) for i in order])
