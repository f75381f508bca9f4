"""Training data from dicts in the panoptic format, as instances and a label map."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from detlib.config import configurable
from detlib.data import detection_utils as utils
from detlib.data import transforms as T  # noqa: N812 (the name that mappers use)
from detlib.data.dataset_mapper import DatasetMapper
from detlib.data.multi_image_augmentation import IGNORED, Sample, box_of
from detlib.structures import BoxMode

__all__ = ["PanopticDatasetMapper"]


class PanopticDatasetMapper(DatasetMapper):
    """`DatasetMapper` for dicts with "pan_seg_file_name" and "segments_info", as of `register_coco_panoptic`.

    Things become instances with bit masks and tight boxes, crowds left out; all segments together become the
    label map. So data in COCO's panoptic format train a Panoptic FPN as they are, without maps of stuff.
    What "annotations" and "sem_seg_file_name" such dicts have besides is not looked at.
    """

    @configurable
    def __init__(self, is_train: bool, *, things_label: int | None = 0, **kwargs: Any):
        """
        Args:
            is_train: see `DatasetMapper`.
            things_label: the label of all things in the label map, for `PanopticFPN`; None gives each its own
                class.
            **kwargs: of `DatasetMapper`. Masks are bit masks; there is no mixing.
        """
        kwargs.setdefault("instance_mask_format", "bitmask")
        if kwargs["instance_mask_format"] != "bitmask":
            raise ValueError(
                "PanopticDatasetMapper: instance_mask_format (INPUT.MASK_FORMAT) must be 'bitmask', got "
                f"{kwargs['instance_mask_format']!r}"
            )
        if is_train and list(kwargs.get("mixing", ())):
            raise ValueError(
                "PanopticDatasetMapper: INPUT.MOSAIC and INPUT.COPY_PASTE are not for panoptic data"
            )
        super().__init__(is_train, **kwargs)
        self.things_label = things_label

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict:
        return {**super().from_config(cfg, is_train), "instance_mask_format": "bitmask"}

    def _read(self, dataset_dict: dict) -> Sample:
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format, decoder=self.decoder)
        utils.check_image_size(dataset_dict, image)
        missing = [key for key in ("pan_seg_file_name", "segments_info") if key not in dataset_dict]
        if missing:
            raise ValueError(
                f"PanopticDatasetMapper: the dict of {dataset_dict['file_name']} lacks {missing}"
            )
        for key in ("annotations", "sem_seg_file_name"):
            dataset_dict.pop(key, None)
        file_name = dataset_dict.pop("pan_seg_file_name")
        ids = utils.read_image(file_name, "RGB").astype(np.int64) @ [1, 256, 256 * 256]
        if ids.shape != image.shape[:2]:
            raise ValueError(f"{file_name} has the size {ids.shape}, its image {image.shape[:2]}")
        dataset_dict["annotations"] = []  # there are some, if only none of things
        return Sample(image, [], _places(ids, dataset_dict["segments_info"], file_name))

    def _augment(self, sample: Sample, dataset_dict: dict) -> T.TransformList:
        transforms = super()._augment(sample, dataset_dict)
        segments = dataset_dict.pop("segments_info")
        table = np.full(max(_code(len(segments)), IGNORED) + 1, IGNORED, dtype=np.int64)
        for place, segment in enumerate(segments):
            is_thing = segment["isthing"]
            own = not is_thing or self.things_label is None
            table[_code(place)] = segment["category_id"] if own else cast(int, self.things_label)
            mask: Any = sample.sem_seg == _code(place) if is_thing and not segment.get("iscrowd", 0) else None
            if self.is_train and mask is not None and mask.any():
                annotation = {"bbox": box_of(mask), "bbox_mode": BoxMode.XYXY_ABS}
                annotation |= {"category_id": segment["category_id"], "segmentation": mask.astype(np.uint8)}
                dataset_dict["annotations"].append(annotation)
        sample.sem_seg = table[sample.sem_seg]
        return transforms

    def _transform_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape) -> None:
        annos = dataset_dict.pop("annotations")  # of the transformed map, see `_augment`
        dataset_dict["instances"] = self._to_instances(annos, image_shape, dataset_dict.get("file_name"))


def _code(place: int) -> int:
    """The number that stands for the ``place``-th segment: neither 0 nor 255, which transforms pad with."""
    return place + 1 if place + 1 < IGNORED else place + 2


def _places(ids: np.ndarray, segments: list[dict], file_name: str) -> np.ndarray:
    """(H, W) array of the segments' numbers, 255 where there is none."""
    codes = {segment["id"]: _code(place) for place, segment in enumerate(segments)} | {0: IGNORED}
    found, where = np.unique(ids, return_inverse=True)
    unknown = [int(segment) for segment in found if int(segment) not in codes]
    if unknown:
        raise ValueError(f"{file_name} has segments {unknown[:10]}, which segments_info does not name")
    dtype = np.uint8 if _code(len(segments)) <= IGNORED else np.int32
    return np.array([codes[int(segment)] for segment in found], dtype=dtype)[where].reshape(ids.shape)
