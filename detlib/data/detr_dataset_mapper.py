"""The dataset mapper of DETR-like models."""

from collections.abc import Sequence

import numpy as np

from . import transforms as T  # noqa: N812 (the name that mappers use)
from .dataset_mapper import DatasetMapper

__all__ = ["DetrDatasetMapper"]


class _Either(T.Augmentation):
    """One of two lists of augmentations, with equal chances."""

    def __init__(self, first: T.AugmentationList, second: T.AugmentationList):
        super().__init__()
        self.first, self.second = first, second

    def __call__(self, aug_input) -> T.Transform:
        return (self.first if np.random.rand() > 0.5 else self.second)(aug_input)

    def __repr__(self) -> str:
        return f"Either({self.first}, {self.second})"


class DetrDatasetMapper(DatasetMapper):
    """A `DatasetMapper` that crops every second training picture, as DETR (arXiv:2005.12872) was trained.

    Half of the pictures, drawn at random, go through `augmentation`, the others through
    `augmentation_with_crop`: a resize to a smaller side, a crop, and a resize to the side of training.
    """

    def __init__(
        self,
        augmentation: Sequence[T.Augmentation | T.Transform],
        augmentation_with_crop: Sequence[T.Augmentation | T.Transform] | None,
        is_train: bool = True,
        mask_on: bool = False,
        img_format: str = "RGB",
    ):
        """
        Args:
            augmentation: Augmentations or Transforms to apply, in order.
            augmentation_with_crop: the same for every second training picture; None for `augmentation`
                there too.
            is_train: whether the output is for training; for testing `augmentation` alone is applied and
                annotations are left out.
            mask_on: whether to keep instance masks.
            img_format: see `detection_utils.read_image`.
        """
        self.augmentation = T.AugmentationList(list(augmentation))
        self.augmentation_with_crop = None
        both = [self.augmentation]
        if augmentation_with_crop is not None:
            self.augmentation_with_crop = T.AugmentationList(list(augmentation_with_crop))
            if is_train:
                both = [_Either(self.augmentation, self.augmentation_with_crop)]
        super().__init__(
            is_train=is_train, augmentations=both, image_format=img_format, use_instance_mask=mask_on
        )
        self.mask_on, self.img_format = mask_on, img_format
