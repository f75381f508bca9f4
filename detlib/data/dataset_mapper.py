"""From a dataset dict to a model's input."""

import copy
import logging

import numpy as np
import torch

from detlib.config import configurable
from detlib.structures import BoxMode

from . import detection_utils as utils
from . import transforms as T  # noqa: N812 (the name that mappers use)

__all__ = ["DatasetMapper"]

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Turns a dataset dict in the standard format into the input dict of the builtin models.

    It reads the picture, applies augmentations to it and to what is annotated on it, and makes tensors.
    Projects with other data write their own mapper, any callable, from the parts in `detection_utils`.
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
    ):
        """
        Args:
            is_train: whether the output is for training; for testing, annotations are left out.
            augmentations: Augmentations or Transforms to apply, in order.
            image_format: see `detection_utils.read_image`.
            use_instance_mask: whether to keep instance masks.
            use_keypoint: whether to keep keypoints.
            instance_mask_format: "polygon" or "bitmask".
            keypoint_hflip_indices: see `detection_utils.create_keypoint_hflip_indices`.
            precomputed_proposal_topk: keep this many precomputed proposals of each picture; None for no use
                of proposals.
            recompute_boxes: replace each box by the tight one around its mask after augmentation.
            rotated_boxes: whether models get RotatedBoxes; by default, those pictures with a rotated
                annotation (BoxMode.XYWHA_ABS). If False, rotated annotations become the upright boxes around
                them.
        """
        if recompute_boxes and not use_instance_mask:
            raise ValueError("DatasetMapper: recompute_boxes=True needs use_instance_mask=True")
        self.is_train = is_train
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
            # A picture without objects shows no type: there the model's counts.
            "rotated_boxes": True if cfg.MODEL.ANCHOR_GENERATOR.NAME == "RotatedAnchorGenerator" else None,
        }
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
        """Replace "annotations" by "instances". Crowd regions are left out."""
        unused = set()
        if not self.use_instance_mask:
            unused.add("segmentation")
        if not self.use_keypoint:
            unused.add("keypoints")
        annos = []
        for index, annotation in enumerate(dataset_dict.pop("annotations")):
            if annotation.get("iscrowd", 0) != 0:
                continue
            used = {key: value for key, value in annotation.items() if key not in unused}
            try:
                if self.rotated_boxes is False:
                    box = BoxMode.convert(used["bbox"], used["bbox_mode"], BoxMode.XYXY_ABS)
                    used.update(bbox=box, bbox_mode=BoxMode.XYXY_ABS)
                annos.append(
                    utils.transform_instance_annotations(
                        used, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"annotation {index} of image file {dataset_dict.get('file_name')}: {reason}"
                ) from error
        try:
            if self._are_rotated(annos):
                instances = utils.annotations_to_instances_rotated(annos, image_shape)
            else:
                instances = utils.annotations_to_instances(
                    annos, image_shape, mask_format=self.instance_mask_format
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"annotations of image file {dataset_dict.get('file_name')}: {error}") from error
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)

    def _are_rotated(self, annos: list[dict]) -> bool:
        if self.rotated_boxes is not None:
            return self.rotated_boxes
        return any(anno["bbox_mode"] == BoxMode.XYWHA_ABS for anno in annos)

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one picture.

        Args:
            dataset_dict: dict of one picture in the standard format; it stays as it is.

        Returns:
            A dict with all entries of ``dataset_dict`` ("file_name", "image_id", "height", "width", ...) but
            "annotations" and "sem_seg_file_name", and with

            - "image": (C, H, W) tensor in ``image_format``, uint8 for most formats;
            - "instances" (training): see `detection_utils.annotations_to_instances`, or of rotated boxes
              `detection_utils.annotations_to_instances_rotated`, in pixels of "image";
            - "sem_seg": (H, W) int64 tensor, where the dataset has one;
            - "proposals": where precomputed ones are used.

        Raises:
            FileNotFoundError, ImageReadError, SizeMismatchError, ValueError: with the file's name.
        """
        dataset_dict = copy.copy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)

        sem_seg_file = dataset_dict.pop("sem_seg_file_name", None)
        sem_seg = None if sem_seg_file is None else utils.read_image(sem_seg_file, "L").squeeze(2)
        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        image, sem_seg = aug_input.image, aug_input.sem_seg
        image_shape = image.shape[:2]

        dataset_dict["image"] = utils.image_to_tensor(image)
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict
