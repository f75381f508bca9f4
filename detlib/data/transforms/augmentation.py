"""Base classes of data augmentation: random policies that return deterministic transforms.

An `Augmentation` inspects its inputs (an image, perhaps boxes), draws its random numbers and returns a
`fvcore.transforms.transform.Transform`, which can be applied to all data of the same image (image, boxes,
polygons, keypoints, segmentation) and, if it is geometric, inverted.

All random numbers come from numpy's global generator, so that seeding it makes a run reproducible.
"""

import inspect
import pprint
from collections.abc import Sequence

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "StandardAugInput",
    "TransformGen",
    "apply_augmentations",
    "apply_transform_gens",
]


def _input_names(aug: "Augmentation") -> tuple[str, ...]:
    """Return the names of the AugInput attributes that ``aug.get_transform`` takes, in order."""
    parameters = list(inspect.signature(aug.get_transform).parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind in variadic for p in parameters):
        raise TypeError(
            f"{type(aug).__name__}.get_transform takes *args or **kwargs, so its inputs are not known from "
            "its signature; name the parameters, set `input_args`, or override `__call__`"
        )
    if len(parameters) == 1:  # a single parameter is the image, whatever its name
        return ("image",)
    return tuple(p.name for p in parameters)


class Augmentation:
    """A random policy. Subclasses implement `get_transform`.

    The parameter names of ``get_transform`` specify which attributes of the `AugInput` it needs (``image``,
    ``boxes``, ``sem_seg`` or those of a custom input class); a single parameter is always the image.

    Attributes:
        input_args: these names, read from the signature on first use; a subclass may set them.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict | None = None) -> None:
        """Store constructor arguments as attributes; called as ``self._init(locals())``."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args) -> Transform:
        """Draw the random numbers and return the transform to apply.

        Args:
            *args: the attributes of the AugInput that the subclass names. An image is (H, W, C) or (H, W),
                uint8 in [0, 255] or floating point; ``boxes`` is (N, 4) float, absolute xyxy pixels;
                ``sem_seg`` is (H, W) integer class ids.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement get_transform")

    def __call__(self, aug_input) -> Transform:
        """Draw a transform for ``aug_input``, apply it to ``aug_input`` in place and return it."""
        if self.input_args is None:
            self.input_args = _input_names(self)
        args = []
        for name in self.input_args:
            if not hasattr(aug_input, name):
                raise AttributeError(
                    f"{self!r} needs the input {name!r}, which {type(aug_input).__name__} does not have"
                )
            args.append(getattr(aug_input, name))
        tfm = self.get_transform(*args)
        if not isinstance(tfm, Transform):
            raise TypeError(
                f"{type(self).__name__}.get_transform must return a Transform, got {type(tfm).__name__}"
            )
        aug_input.transform(tfm)
        return tfm

    def _rand_range(self, low: float = 1.0, high: float | None = None, size=None):
        """Draw a uniform random number in [low, high), or in [0, low) if ``high`` is None."""
        if high is None:
            low, high = 0, low
        return np.random.uniform(low, high, [] if size is None else size)

    def __repr__(self) -> str:
        shown = []
        for name, param in inspect.signature(type(self).__init__).parameters.items():
            variadic = param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD)
            if name == "self" or variadic or not hasattr(self, name):
                continue
            value = getattr(self, name)
            if value is param.default:
                continue
            text = pprint.pformat(value)
            shown.append(f"{name}={'...' if chr(10) in text else text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__


class _FixedTransform(Augmentation):
    """An Augmentation that always returns the same transform."""

    def __init__(self, tfm: Transform):
        self.tfm = tfm

    def get_transform(self, image) -> Transform:
        return self.tfm

    def __repr__(self) -> str:
        return repr(self.tfm)

    __str__ = __repr__


def to_augmentation(tfm_or_aug: "Augmentation | Transform") -> Augmentation:
    """Return an Augmentation for ``tfm_or_aug``; one that always returns it if it is a Transform.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(tfm_or_aug, Augmentation):
        return tfm_or_aug
    if isinstance(tfm_or_aug, Transform):
        return _FixedTransform(tfm_or_aug)
    raise TypeError(
        f"expected an Augmentation or a Transform, got {type(tfm_or_aug).__name__}: {tfm_or_aug!r}"
    )


class AugmentationList(Augmentation):
    """Augmentations applied in order, each to the result of the previous one."""

    def __init__(self, augs: Sequence[Augmentation | Transform]):
        """
        Args:
            augs: Augmentations or Transforms, in the order of application.
        """
        self.augs = [to_augmentation(aug) for aug in augs]

    def __call__(self, aug_input) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(map(str, self.augs))}]"

    __str__ = __repr__


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        raise TypeError(f"AugInput: image must be a numpy array, got {type(image).__name__}")
    if image.ndim not in (2, 3):
        raise ValueError(f"AugInput: image must have shape (H, W) or (H, W, C), got {image.shape}")


class AugInput:
    """The data of one image that augmentations may inspect, and that is transformed with it.

    Projects with other data write a class with its own `transform`; it needs only the attributes that the
    augmentations name.

    Attributes:
        image: (H, W) or (H, W, C) array, uint8 in [0, 255] or floating point.
        boxes: (N, 4) float array, absolute xyxy pixels, or None.
        sem_seg: (H, W) integer array of class ids, or None.
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ):
        _check_image(image)
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to every attribute, in place."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(self, augmentations: Sequence[Augmentation | Transform]) -> TransformList:
        """Apply ``augmentations`` in order, in place, and return the transforms that were drawn."""
        return AugmentationList(augmentations)(self)


def apply_augmentations(augmentations: Sequence[Augmentation | Transform], inputs):
    """Apply augmentations to an image or to the data of an AugInput.

    Args:
        augmentations: Augmentations or Transforms, in the order of application.
        inputs: an image array, or an AugInput (changed in place).

    Returns:
        ``(result, transforms)``: the new image, or ``inputs`` itself if it is an AugInput; and the applied
        TransformList, which can be applied to other data of the same image.
    """
    if isinstance(inputs, np.ndarray):
        aug_input = AugInput(inputs)
        transforms = aug_input.apply_augmentations(augmentations)
        return aug_input.image, transforms
    transforms = inputs.apply_augmentations(augmentations)
    return inputs, transforms


# detectron2's earlier names.
apply_transform_gens = apply_augmentations
StandardAugInput = AugInput
TransformGen = Augmentation
