"""From a batch of picture dicts to one padded tensor, and back: shared by every meta architecture."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detlib.layers import move_device_like
from detlib.modeling.layout import CHANNELS_LAST_ON, for_convolutions
from detlib.modeling.postprocessing import detector_postprocess
from detlib.structures import ImageList, Instances

__all__ = [
    "check_gt_classes",
    "describe_item",
    "postprocess_detections",
    "preprocess_images",
    "register_pixel_stats",
    "take_instances",
]


def describe_item(batched_inputs: Sequence[Mapping], index: int) -> str:
    """Name one item of a batch for messages: its position and, where known, the file it came from."""
    name = batched_inputs[index].get("file_name")
    return f"item {index} of the batch" + (f" ({name})" if name else "")


def _check_batch(batched_inputs: Sequence[Mapping], num_channels: int) -> None:
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
                f"'image' of {describe_item(batched_inputs, i)} must hold pixel values (uint8 or floating "
                f"point, in [0, 255] for the built-in models), got {image.dtype}."
            )
        if image.numel() == 0:
            raise ValueError(f"'image' of {describe_item(batched_inputs, i)} is empty: {tuple(image.shape)}.")


def register_pixel_stats(model: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
    """Give the model (C, 1, 1) float32 buffers `pixel_mean` and `pixel_std`; kept out of the state dict.

    Raises:
        ValueError: the two differ in length, or a deviation is not above 0.
    """
    if len(pixel_mean) != len(pixel_std) or not all(value > 0 for value in pixel_std):
        raise ValueError(
            "pixel_mean (MODEL.PIXEL_MEAN) and pixel_std (MODEL.PIXEL_STD, above 0) must be of one length, "
            f"got {list(pixel_mean)} and {list(pixel_std)}."
        )
    for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        model.register_buffer(
            name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )


def preprocess_images(
    batched_inputs: Sequence[Mapping],
    pixel_mean: torch.Tensor,
    pixel_std: torch.Tensor,
    *,
    size_divisibility: int = 0,
    padding_constraints: Mapping[str, int] | None = None,
    channels_last_on: Sequence[str] = CHANNELS_LAST_ON,
) -> ImageList:
    """Normalise the pictures of a batch on the model's device and pad them to one size.

    Args:
        batched_inputs: N dicts with "image": (C, H_i, W_i), uint8 or floating point, any device.
        pixel_mean: (C, 1, 1) float, on the model's device.
        pixel_std: (C, 1, 1) float.
        size_divisibility: padded height and width become multiples of it.
        padding_constraints: the backbone's further wishes, see `ImageList.from_tensors`.
        channels_last_on: types of devices on which the pictures, and so the maps that convolutions make of
            them, are in channels-last layout.

    Returns:
        `ImageList` of (N, C, H, W) in `pixel_mean`'s dtype; the padding is 0, that is the mean colour.

    Raises:
        TypeError, ValueError: the batch is no list of dicts, or an image is no (C, H, W) tensor of numbers.
    """
    _check_batch(batched_inputs, pixel_mean.shape[0])
    images = [
        (move_device_like(item["image"], pixel_mean) - pixel_mean) / pixel_std for item in batched_inputs
    ]
    batch = ImageList.from_tensors(
        images, size_divisibility, padding_constraints=dict(padding_constraints or {})
    )
    batch.tensor = for_convolutions(batch.tensor, channels_last_on)
    return batch


def take_instances(
    batched_inputs: Sequence[Mapping], key: str, device: torch.device, why: str
) -> list[Instances]:
    """Take the `Instances` under `key` ("instances", "proposals") out of every dict, on `device`.

    Raises:
        ValueError: a dict lacks the key; `why` says what needs it.
    """
    for i, item in enumerate(batched_inputs):
        if not isinstance(item.get(key), Instances):
            found = type(item[key]).__name__ if key in item else "nothing"
            raise ValueError(
                f"{why} needs {key!r}, an Instances, in every dict; {describe_item(batched_inputs, i)} "
                f"has {found} there."
            )
    return [item[key].to(device) for item in batched_inputs]


def check_gt_classes(batched_inputs: Sequence[Mapping], num_classes: int | None, key: str) -> None:
    """Refuse labels beyond the classes: the first trains as background, others stop a GPU without a word.

    Labels that already lie on a GPU are left alone: to look at them is to wait for it.

    Args:
        batched_inputs: N dicts, of which "instances" are looked at where they have `gt_classes`.
        num_classes: K; labels must lie in [0, K). None where nothing is known.
        key: the config key of the number of classes, for the message.

    Raises:
        ValueError: a label outside, with the item it belongs to.
    """
    for i, item in enumerate(batched_inputs):
        instances = item.get("instances")
        if num_classes is None or not isinstance(instances, Instances) or not instances.has("gt_classes"):
            continue
        labels = instances.gt_classes
        if (
            labels.device.type == "cpu"
            and len(labels)
            and not 0 <= labels.min() <= labels.max() < num_classes
        ):
            raise ValueError(
                f"'gt_classes' of {describe_item(batched_inputs, i)} must lie in [0, {num_classes}) "
                f"({key}), got {sorted(set(labels.tolist()))}."
            )


def postprocess_detections(
    results: list[Instances], batched_inputs: Sequence[Mapping], image_sizes: list[tuple[int, int]]
) -> list[Instances]:
    """Bring each image's results to the size its dict asks for, or to the input's own.

    Args:
        results: N detections in pixels of the network input, see `detector_postprocess`.
        batched_inputs: N dicts; "height" and "width" say which size is wanted.
        image_sizes: N pairs (height, width) of the pictures before padding.

    Returns:
        list[Instances]: N, in the wanted pixels.
    """
    return [
        detector_postprocess(r, item.get("height", height), item.get("width", width))
        for r, item, (height, width) in zip(results, batched_inputs, image_sizes)
    ]
