"""The base class of all meta architectures: preprocessing, ground-truth checks, and facts about the model.

Shape legend: N images, C channels, H and W the size of the padded batch, H_i and W_i the size of one image
before padding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.layers import move_device_like
from detlib.layers.wrappers import CHANNELS_LAST_ON
from detlib.modeling.postprocessing import detector_postprocess
from detlib.structures import ImageList, Instances

__all__ = ["MetaArchitecture", "describe_item"]


def describe_item(batched_inputs: Sequence[Mapping], index: int) -> str:
    """Name one item of a batch for messages: its position and, where known, its file."""
    name = batched_inputs[index].get("file_name")
    return f"item {index} of the batch" + (f" ({name})" if name else "")


def _check_batch(batched_inputs: Sequence[Mapping], num_channels: int) -> None:
    """Raise TypeError or ValueError unless the batch is a list of dicts with images of `num_channels`."""
    if isinstance(batched_inputs, (Mapping, torch.Tensor, str)) or not all(
        isinstance(item, Mapping) for item in batched_inputs
    ):
        raise TypeError(
            "A model takes a list of dicts, one for each image, such as [{'image': tensor}]; "
            f"got {type(batched_inputs).__name__}."
        )
    if len(batched_inputs) == 0:
        raise ValueError("A model takes a list of at least one image dict; got an empty list.")
    for i, item in enumerate(batched_inputs):
        if "image" not in item:
            raise ValueError(f"{describe_item(batched_inputs, i)} has no 'image'; it has {sorted(item)}.")
        image = item["image"]
        if not isinstance(image, torch.Tensor):
            raise TypeError(
                f"'image' of {describe_item(batched_inputs, i)} must be a torch.Tensor of shape (C, H, W), "
                f"got {type(image).__name__}."
            )
        if image.dim() != 3 or image.shape[0] != num_channels:
            hint = ""
            if image.dim() == 3 and image.shape[2] == num_channels:
                hint = " It looks like (H, W, C): use image.permute(2, 0, 1)."
            raise ValueError(
                f"'image' of {describe_item(batched_inputs, i)} must have shape ({num_channels}, H, W), "
                f"got {tuple(image.shape)}.{hint}"
            )
        if image.dtype == torch.bool or image.is_complex():
            raise ValueError(
                f"'image' of {describe_item(batched_inputs, i)} must contain pixel values (uint8 or floating "
                f"point, in [0, 255] for the built-in models), got {image.dtype}."
            )
        if image.numel() == 0:
            raise ValueError(f"'image' of {describe_item(batched_inputs, i)} is empty: {tuple(image.shape)}.")


class MetaArchitecture(nn.Module):
    """Base class of models that take a list of dicts, one for each image.

    A subclass has a `backbone` and a `forward` that returns a dict of losses in training and a list of dicts
    otherwise. The class adds buffers for the pixel statistics and nothing else to the model.

    The class attributes and class methods below are the model's facts: what the engine, the data loaders and
    test-time augmentation must know about a model. A new architecture overrides those that differ, and needs
    no change elsewhere. `facts_of` reads them; models that do not derive from this class have these defaults.

    Example:
        >>> @META_ARCH_REGISTRY.register()
        ... class MyDetector(MetaArchitecture):
        ...     reference_lr_per_image = 0.01 / 16
        ...
        ...     @classmethod
        ...     def num_classes_keys(cls, cfg):
        ...         return {"thing_classes": "MODEL.MY_HEAD.NUM_CLASSES"}
    """

    reference_lr_per_image: float = 0.02 / 16
    """Base learning rate over batch size of the published schedule, for advice when a run diverges."""

    compile_modules: tuple[str, ...] = ("backbone",)
    """Submodules that are compiled with torch.compile by default; missing ones are skipped.

    They must run the same operations for every batch, and take and return no lists of boxes.
    """

    default_score_threshold: float = 0.5
    """Default score threshold for drawing detections."""

    channels_last_on: tuple[str, ...] = CHANNELS_LAST_ON
    """Device types on which batches, and so the feature maps of convolutions, are in channels-last layout."""

    supports_tta: bool = False
    """Whether test-time augmentation can merge the model's predictions; see the `tta_` methods."""

    @classmethod
    def num_classes_keys(cls, cfg: CfgNode) -> dict[str, str]:
        """Return the config keys that hold the model's numbers of classes.

        Args:
            cfg: the model's config.

        Returns:
            Name in the dataset's metadata ("thing_classes", "stuff_classes", "keypoint_names") to config key,
            such as {"thing_classes": "MODEL.ROI_HEADS.NUM_CLASSES"}. The default is none.
        """
        return {}

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """Return the types of the model's outputs, which determine its evaluators.

        Args:
            cfg: the model's config.

        Returns:
            A subset of "instances", "masks" (instances with `pred_masks`), "proposals", "sem_seg" and
            "panoptic_seg". The default is all of them, so a model without this method gets every evaluator of
            the dataset.
        """
        return frozenset({"instances", "masks", "proposals", "sem_seg", "panoptic_seg"})

    @property
    def device(self) -> torch.device:
        """The model's device; inputs are moved there."""
        return self.pixel_mean.device

    def register_pixel_stats(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """Register the (C, 1, 1) float32 buffers `pixel_mean` and `pixel_std`, kept out of the state dict.

        Args:
            pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.

        Raises:
            ValueError: the two differ in length, or a deviation is not above 0.
        """
        if len(pixel_mean) != len(pixel_std) or not all(value > 0 for value in pixel_std):
            raise ValueError(
                "pixel_mean (MODEL.PIXEL_MEAN) and pixel_std (MODEL.PIXEL_STD, above 0) must have the same "
                f"length, got {list(pixel_mean)} and {list(pixel_std)}."
            )
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False
            )

    def preprocess_image(self, batched_inputs: Sequence[Mapping]) -> ImageList:
        """Normalize the images of a batch on the model's device and pad them to one size.

        Height and width become multiples of the backbone's `size_divisibility`; its `padding_constraints`
        are passed to `ImageList.from_tensors`.

        Args:
            batched_inputs: N dicts with "image": (C, H_i, W_i), uint8 or floating point, any device.

        Returns:
            `ImageList` of (N, C, H, W) in `pixel_mean`'s dtype. The padding is 0, which is the mean color.

        Raises:
            TypeError, ValueError: the batch is not a list of dicts, or an image is not a (C, H_i, W_i) tensor
                of numbers.
        """
        mean, std = self.pixel_mean, self.pixel_std
        _check_batch(batched_inputs, mean.shape[0])
        # A float32 image makes float32 results in a model of half precision, so the result is cast.
        images = [
            ((move_device_like(item["image"], mean) - mean) / std).to(mean.dtype) for item in batched_inputs
        ]
        batch = ImageList.from_tensors(
            images,
            getattr(self.backbone, "size_divisibility", 0),
            padding_constraints=dict(getattr(self.backbone, "padding_constraints", None) or {}),
        )
        if batch.device.type in self.channels_last_on:
            batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def take_ground_truth(
        self, batched_inputs: Sequence[Mapping], num_classes: int | None = None, key: str = ""
    ) -> list[Instances]:
        """Return the checked "instances" of every dict, on the model's device.

        Labels out of range are rejected here: label K would be trained as background, others would crash a
        GPU without a message. Labels on a GPU are not checked, as that would synchronize it.

        Args:
            batched_inputs: N dicts with "instances".
            num_classes: K; labels must be in [0, K). None skips the check.
            key: the config key of the number of classes, for the message.

        Raises:
            ValueError: a dict has no "instances", or a label is out of range; the message names the item.
        """
        for i, item in enumerate(batched_inputs):
            instances = item.get("instances")
            if num_classes is None or not isinstance(instances, Instances):
                continue
            labels = instances.get_fields().get("gt_classes")
            if labels is None or labels.device.type != "cpu" or len(labels) == 0:
                continue
            if not 0 <= labels.min() <= labels.max() < num_classes:
                raise ValueError(
                    f"'gt_classes' of {describe_item(batched_inputs, i)} must be in [0, {num_classes}) "
                    f"({key}), got {sorted(set(labels.tolist()))}."
                )
        return self.take_instances(batched_inputs, "instances", "Training")

    def take_instances(self, batched_inputs: Sequence[Mapping], key: str, why: str) -> list[Instances]:
        """Return the `Instances` under `key` of every dict, on the model's device.

        Args:
            batched_inputs: N dicts.
            key: "instances" or "proposals".
            why: what needs them, for the message.

        Raises:
            ValueError: a dict has no `Instances` under `key`.
        """
        for i, item in enumerate(batched_inputs):
            if not isinstance(item.get(key), Instances):
                found = f"a {type(item[key]).__name__}" if key in item else "none"
                raise ValueError(
                    f"{why} needs {key!r}, an Instances, in every dict; {describe_item(batched_inputs, i)} "
                    f"has {found}."
                )
        device = self.device
        return [item[key].to(device) for item in batched_inputs]

    @staticmethod
    def scale_to_output_size(
        results: list[Instances], batched_inputs: Sequence[Mapping], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Scale the results of each image to the output size in its dict.

        Args:
            results: N detections in pixels of the network input, see `detector_postprocess`.
            batched_inputs: N dicts; "height" and "width" are the output size, by default the image's own.
            image_sizes: N pairs (height, width) of the images before padding.
        """
        return [
            detector_postprocess(r, item.get("height", height), item.get("width", width))
            for r, item, (height, width) in zip(results, batched_inputs, image_sizes)
        ]

    def tta_predict(self, batched_inputs: list[dict]) -> list[dict]:
        """Predict the boxes and semantic logits that test-time augmentation merges over the views.

        Args:
            batched_inputs: N views as `forward` takes them, without "height" and "width".

        Returns:
            N dicts with "instances" (`pred_boxes`, `scores`, `pred_classes`), "sem_seg" (logits
            (K, H_i, W_i)) or both, in the view's own frame.
        """
        return self(batched_inputs)

    def tta_merge_limits(self, cfg: CfgNode) -> tuple[float, int]:
        """Return the IoU threshold of the NMS over all views, and the maximum number of detections.

        Args:
            cfg: the config of test-time augmentation.
        """
        return cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE

    def tta_fields(self) -> tuple[str, ...]:
        """Return the fields that `tta_predict_for_boxes` adds, which are averaged over all views.

        These are "pred_masks" and "pred_keypoint_heatmaps". Without any, only boxes are predicted.
        """
        return ()

    def tta_predict_for_boxes(
        self, batched_inputs: list[dict], instances: list[Instances]
    ) -> list[Instances]:
        """Predict the fields of `tta_fields` for the merged boxes.

        Args:
            batched_inputs: N views.
            instances: N `Instances` with `pred_boxes` and `pred_classes` in the view's frame.

        Returns:
            N `Instances` with the fields added: `pred_masks` (R, 1, M, M), `pred_keypoint_heatmaps`
            (R, K, S, S).
        """
        return instances

    def combine_outputs(self, output: dict) -> dict:
        """Add the entries that are computed from others, such as "panoptic_seg", to one image's output.

        Args:
            output: the dict of one image, as returned by `forward`, in its final size.

        Returns:
            The dict with the added entries.
        """
        return output
