"""Dataset mappers: from a dataset dict to the input dict of a model."""

import copy
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from detlib.config import configurable
from detlib.data import detection_utils as utils
from detlib.data import transforms as T  # noqa: N812 (the name that mappers use)
from detlib.data.multi_image_augmentation import (
    MultiImageAugmentation,
    Sample,
    build_multi_image_augmentations,
)
from detlib.structures import BoxMode

__all__ = ["DatasetMapper", "DetrDatasetMapper"]

logger = logging.getLogger(__name__)


class DatasetMapper:
    """The default mapper from a dataset dict in the standard format to the input dict of the built-in models.

    It reads the image, applies augmentations to it and to its annotations, and converts both to tensors.
    Projects with other data write their own mapper, any callable, from the functions of `detection_utils`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
        rotated_boxes: bool | None = None,
        mixing: list[MultiImageAugmentation] | tuple = (),
        decoder: str = "pil",
    ):
        """
        Args:
            is_train: whether the output is for training; for testing, annotations are dropped.
            augmentations: Augmentations or Transforms to apply, in order.
            image_format: see `detection_utils.read_image`.
            use_instance_mask: whether to keep instance masks.
            use_keypoint: whether to keep keypoints.
            instance_mask_format: "polygon" or "bitmask".
            keypoint_hflip_indices: see `detection_utils.create_keypoint_hflip_indices`.
            precomputed_proposal_topk: keep this many precomputed proposals of each image; None ignores
                proposals.
            recompute_boxes: replace each box by the tight box around its mask after augmentation.
            rotated_boxes: whether to return RotatedBoxes; by default for images with a rotated annotation
                (BoxMode.XYWHA_ABS). If False, rotated annotations are replaced by the axis-aligned boxes
                around them.
            mixing: the multi-image augmentations, in order; see `detlib.data.multi_image_augmentation`. The
                mapper then needs a `MapDataset` around it, which the loaders add.
            decoder: see `detection_utils.read_image`.
        """
        if recompute_boxes and not use_instance_mask:
            raise ValueError("DatasetMapper: recompute_boxes=True needs use_instance_mask=True")
        mixing = list(mixing) if is_train else []
        if mixing and precomputed_proposal_topk is not None:
            raise ValueError(
                "DatasetMapper: precomputed proposals cannot be combined with multi-image augmentation"
            )
        if any(m.makes_bitmasks for m in mixing) and use_instance_mask and instance_mask_format != "bitmask":
            raise ValueError(
                f"DatasetMapper: mixing={mixing} creates masks that polygons cannot represent; set "
                "instance_mask_format (INPUT.MASK_FORMAT) to 'bitmask'"
            )
        self.is_train = is_train
        self.mixing = mixing
        self.decoder = decoder
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.use_keypoint = use_keypoint
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.recompute_boxes = recompute_boxes
        self.rotated_boxes = rotated_boxes
        mode = "training" if is_train else "inference"
        logger.info("Augmentations used in %s: %s", mode, self.augmentations)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict:
        augmentations = utils.build_augmentation(cfg, is_train)
        recompute_boxes = False
        if cfg.INPUT.CROP.ENABLED and is_train:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
            recompute_boxes = cfg.MODEL.MASK_ON
        ret = {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "recompute_boxes": recompute_boxes,
            "decoder": cfg.INPUT.DECODER,
            # An image without objects has no box type of its own; it gets the model's.
            "rotated_boxes": True if cfg.MODEL.ANCHOR_GENERATOR.NAME == "RotatedAnchorGenerator" else None,
        }
        if is_train:
            ret["mixing"] = build_multi_image_augmentations(cfg)
        if cfg.MODEL.KEYPOINT_ON:
            ret["keypoint_hflip_indices"] = utils.create_keypoint_hflip_indices(cfg.DATASETS.TRAIN)
        if cfg.MODEL.LOAD_PROPOSALS:
            ret["precomputed_proposal_topk"] = (
                cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
                if is_train
                else cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
            )
        return ret

    def _transform_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape) -> None:
        """Replace the "annotations" of a training image by "instances".

        Subclasses override this for annotations of their own. It is not called for multi-image augmentations.

        Args:
            dataset_dict: the dict that `__call__` returns; its "annotations" may be changed in place.
            transforms: the transforms of the image.
            image_shape: (height, width) of the transformed image.
        """
        moved = self._move_annotations(dataset_dict, transforms, image_shape)
        del dataset_dict["annotations"]
        dataset_dict["instances"] = self._to_instances(moved, image_shape, dataset_dict.get("file_name"))

    def _move_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape) -> list:
        """Return the transformed annotations, without crowd regions and unused fields."""
        unused = set()
        # Copy-paste needs the masks to find out which objects are covered.
        if not self.use_instance_mask and not self.mixing:
            unused.add("segmentation")
        if not self.use_keypoint:
            unused.add("keypoints")
        annos, indices = [], []
        for index, annotation in enumerate(dataset_dict.get("annotations", ())):
            if annotation.get("iscrowd", 0) == 0:
                annos.append({key: value for key, value in annotation.items() if key not in unused})
                indices.append(index)
        flip = self.keypoint_hflip_indices
        moved = utils.transform_annotations_batched(
            annos, transforms, image_shape, keypoint_hflip_indices=flip
        )
        if moved is not None:
            return moved
        for index, used in zip(indices, annos):
            try:
                if self.rotated_boxes is False:
                    box = BoxMode.convert(used["bbox"], used["bbox_mode"], BoxMode.XYXY_ABS)
                    used.update(bbox=box, bbox_mode=BoxMode.XYXY_ABS)
                utils.transform_instance_annotations(
                    used, transforms, image_shape, keypoint_hflip_indices=flip
                )
            except (KeyError, TypeError, ValueError) as error:
                reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"annotation {index} of image file {dataset_dict.get('file_name')}: {reason}"
                ) from error
        return annos

    def _to_instances(self, annos: list[dict], image_shape, file_name: str | None):
        if not self.use_instance_mask:
            annos = [{key: value for key, value in anno.items() if key != "segmentation"} for anno in annos]
        try:
            if self._are_rotated(annos):
                instances = utils.annotations_to_instances_rotated(annos, image_shape)
            else:
                instances = utils.annotations_to_instances(
                    annos, image_shape, mask_format=self.instance_mask_format
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"annotations of image file {file_name}: {error}") from error
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return utils.filter_empty_instances(instances)

    def _are_rotated(self, annos: list[dict]) -> bool:
        if self.rotated_boxes is not None:
            return self.rotated_boxes
        return any(anno["bbox_mode"] == BoxMode.XYWHA_ABS for anno in annos)

    @property
    def takes_others(self) -> bool:
        """Return whether `MapDataset` has to pass a function that draws further records."""
        return bool(self.mixing)

    def _read(self, dataset_dict: dict) -> Sample:
        """Read the image and its label map; the annotations stay in the dict."""
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format, decoder=self.decoder)
        utils.check_image_size(dataset_dict, image)
        sem_seg_file = dataset_dict.pop("sem_seg_file_name", None)
        sem_seg = None if sem_seg_file is None else utils.read_label_map(sem_seg_file)
        if sem_seg is not None and sem_seg.shape != image.shape[:2]:
            raise ValueError(
                f"label map {sem_seg_file} has (height, width) = {sem_seg.shape}, but its image "
                f"{dataset_dict['file_name']} has {image.shape[:2]}"
            )
        return Sample(image, dataset_dict.get("annotations", []), sem_seg)

    def _augment(self, sample: Sample, dataset_dict: dict) -> T.TransformList:
        """Augment the image and the label map of a sample in place; return the transforms."""
        aug_input = T.AugInput(sample.image, sem_seg=sample.sem_seg)
        transforms = self.augmentations(aug_input)
        sample.image, sample.sem_seg = aug_input.image, aug_input.sem_seg
        return transforms

    def _load_mixed(self, dataset_dict: dict, others: Callable[[], dict]) -> tuple[Sample, T.TransformList]:
        before = [m for m in self.mixing if m.before_augmentation]
        after = [m for m in self.mixing if not m.before_augmentation]

        def read(record: dict) -> Sample:
            sample = self._read(record)
            sample.annotations = [a for a in sample.annotations if a.get("iscrowd", 0) == 0]
            return sample

        def load(record: dict) -> tuple[Sample, T.TransformList]:
            sample = read(record)
            for mix in before:
                sample = mix(sample, lambda: read(copy.copy(others())))
            transforms = self._augment(sample, record)
            named = {"annotations": sample.annotations, "file_name": record.get("file_name")}
            sample.annotations = self._move_annotations(named, transforms, sample.image.shape[:2])
            return sample, transforms

        sample, transforms = load(dataset_dict)
        for mix in after:
            sample = mix(sample, lambda: load(copy.copy(others()))[0])
        return sample, transforms

    def __call__(self, dataset_dict: dict, others: Callable[[], dict] | None = None) -> dict:
        """Map one image.

        Args:
            dataset_dict: dict of one image in the standard format; it is not changed.
            others: function that draws another dict at random; `MapDataset` passes it, ``mixing`` needs it.

        Returns:
            A dict with all entries of ``dataset_dict`` ("file_name", "image_id", "height", "width", ...)
            except "annotations" and "sem_seg_file_name", and with

            - "image": (C, H, W) tensor in ``image_format``, uint8 for most formats;
            - "instances" (training): see `detection_utils.annotations_to_instances`, or for rotated boxes
              `detection_utils.annotations_to_instances_rotated`, in pixels of "image";
            - "sem_seg": (H, W) int64 tensor, if the dataset has label maps;
            - "proposals": if precomputed proposals are used.

        Raises:
            FileNotFoundError, ImageReadError, SizeMismatchError, ValueError: naming the file.
        """
        dataset_dict = copy.copy(dataset_dict)
        if self.mixing:
            if others is None:
                raise ValueError(
                    "DatasetMapper: multi-image augmentation needs further images; wrap the mapper in a "
                    "MapDataset, as the train loader does"
                )
            sample, transforms = self._load_mixed(dataset_dict, others)
        else:
            sample = self._read(dataset_dict)
            transforms = self._augment(sample, dataset_dict)
        image_shape = sample.image.shape[:2]

        dataset_dict["image"] = utils.image_to_tensor(sample.image)
        if sample.sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(sample.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk)
        if self.mixing:
            if dataset_dict.get("annotations") is not None or sample.annotations:
                dataset_dict["instances"] = self._to_instances(
                    sample.annotations, image_shape, dataset_dict.get("file_name")
                )
        elif self.is_train and dataset_dict.get("annotations") is not None:
            # An override may change annotations, which must not change the dataset.
            dataset_dict["annotations"] = [copy.copy(x) for x in dataset_dict["annotations"]]
            self._transform_annotations(dataset_dict, transforms, image_shape)
        dataset_dict.pop("annotations", None)
        return dataset_dict


class _Either(T.Augmentation):
    """One of two lists of augmentations, with equal probability."""

    def __init__(self, first: T.AugmentationList, second: T.AugmentationList):
        super().__init__()
        self.first, self.second = first, second

    def __call__(self, aug_input) -> T.Transform:
        return (self.first if np.random.rand() > 0.5 else self.second)(aug_input)

    def __repr__(self) -> str:
        return f"Either({self.first}, {self.second})"


class DetrDatasetMapper(DatasetMapper):
    """A `DatasetMapper` that crops half of the training images, as for DETR
    (https://arxiv.org/abs/2005.12872).

    Each training image gets, at random, `augmentation` or `augmentation_with_crop`: a resize to a smaller
    size, a crop, and a resize to the training size.
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
            augmentation_with_crop: the same with a crop; None always applies `augmentation`.
            is_train: whether the output is for training; for testing, only `augmentation` is applied and
                annotations are dropped.
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
