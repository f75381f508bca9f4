"""A dataset mapper for dicts in the panoptic format."""

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

    Things become instances with bit masks and tight boxes, without crowds; all segments together become the
    label map. Data in COCO's panoptic format can thus train a Panoptic FPN without separate stuff maps.
    "annotations" and "sem_seg_file_name" of such dicts are ignored.
    """

    @configurable
    def __init__(self, is_train: bool, *, things_label: int | None = 0, **kwargs: Any):
        """
        Args:
            is_train: see `DatasetMapper`.
            things_label: label of all things in the label map, as `PanopticFPN` needs it; None keeps the
                class of each.
            **kwargs: arguments of `DatasetMapper`. Masks are bit masks; `mixing` is not supported.
        """
        kwargs.setdefault("instance_mask_format", "bitmask")
        if kwargs["instance_mask_format"] != "bitmask":
            raise ValueError(
                "PanopticDatasetMapper: instance_mask_format (INPUT.MASK_FORMAT) must be 'bitmask', got "
                f"{kwargs['instance_mask_format']!r}"
            )
        if is_train and list(kwargs.get("mixing", ())):
            raise ValueError(
                "PanopticDatasetMapper: INPUT.MOSAIC and INPUT.COPY_PASTE do not support panoptic data"
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
            raise ValueError(f"{file_name} has the size {ids.shape}, but its image has {image.shape[:2]}")
        dataset_dict["annotations"] = []  # the image is annotated, perhaps without things
        return Sample(image, [], _segment_codes(ids, dataset_dict["segments_info"], file_name))

    def _augment(self, sample: Sample, dataset_dict: dict) -> T.TransformList:
        transforms = super()._augment(sample, dataset_dict)
        segments = dataset_dict.pop("segments_info")
        table = np.full(max(_code(len(segments)), IGNORED) + 1, IGNORED, dtype=np.int64)
        for index, segment in enumerate(segments):
            is_thing = segment["isthing"]
            own = not is_thing or self.things_label is None
            table[_code(index)] = segment["category_id"] if own else cast(int, self.things_label)
            mask: Any = sample.sem_seg == _code(index) if is_thing and not segment.get("iscrowd", 0) else None
            if self.is_train and mask is not None and mask.any():
                annotation = {"bbox": box_of(mask), "bbox_mode": BoxMode.XYXY_ABS}
                annotation |= {"category_id": segment["category_id"], "segmentation": mask.astype(np.uint8)}
                dataset_dict["annotations"].append(annotation)
        sample.sem_seg = table[sample.sem_seg]
        return transforms

    def _transform_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape) -> None:
        annos = dataset_dict.pop("annotations")  # already transformed, see `_augment`
        dataset_dict["instances"] = self._to_instances(annos, image_shape, dataset_dict.get("file_name"))


def _code(index: int) -> int:
    """Return the code of the ``index``-th segment: neither 0 nor 255, which transforms pad with."""
    return index + 1 if index + 1 < IGNORED else index + 2


def _segment_codes(ids: np.ndarray, segments: list[dict], file_name: str) -> np.ndarray:
    """Return an (H, W) array of segment codes, 255 where there is no segment."""
    codes = {segment["id"]: _code(index) for index, segment in enumerate(segments)} | {0: IGNORED}
    found, where = np.unique(ids, return_inverse=True)
    unknown = [int(segment) for segment in found if int(segment) not in codes]
    if unknown:
        raise ValueError(f"{file_name} has segments {unknown[:10]}, which segments_info does not list")
    dtype = np.uint8 if _code(len(segments)) <= IGNORED else np.int32
    return np.array([codes[int(segment)] for segment in found], dtype=dtype)[where].reshape(ids.shape)
