"""`ImageList`: images of different sizes in one padded tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["ImageList"]


class ImageList:
    """A batch of images, padded at the right and at the bottom to a common size.

    Attributes:
        tensor: (N, H, W) or (N, C_1, ..., C_K, H, W) padded images.
        image_sizes: list of N (height, width) tuples, the sizes without padding.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]):
        """Create the batch from padded images. Use `from_tensors` to pad images.

        Args:
            tensor: (N, H, W) or (N, C_1, ..., C_K, H, W) padded images.
            image_sizes: (height, width) of each image without padding.
        """
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int | slice) -> torch.Tensor:
        """Return image `idx` without padding, (H, W) or (C_1, ..., C_K, H, W), as a view of the batch."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        """Return the batch with the tensor moved or cast."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pad images to the size of the largest and stack them.

        Args:
            tensors: N images (H_i, W_i) or (C_1, ..., C_K, H_i, W_i) that only differ in height and width.
            size_divisibility: if above 1, the common height and width are rounded up to a multiple of it.
            pad_value: value of the padding.
            padding_constraints: requirements of the backbone. "square_size": common height and width, if
                above 0; "size_divisibility": replaces the argument of that name.

        Raises:
            TypeError: an element is not a tensor.
            ValueError: the list is empty, images differ in more than height and width, or an image is larger
                than "square_size".
        """
        if len(tensors) == 0:
            raise ValueError("ImageList.from_tensors needs at least one image")
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"ImageList.from_tensors takes a list of tensors, got {type(tensor).__name__}"
                )
            if tensor.shape[:-2] != tensors[0].shape[:-2] or tensor.dim() < 2:
                raise ValueError(
                    "Images must have the same shape except for the last two dimensions, "
                    f"got {tuple(tensors[0].shape)} and {tuple(tensor.shape)}"
                )
        image_sizes = [(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors]
        height, width = _common_size(image_sizes, size_divisibility, padding_constraints or {})

        if len(tensors) == 1:
            padding = (0, width - image_sizes[0][1], 0, height - image_sizes[0][0])
            batch = F.pad(tensors[0], padding, value=pad_value)[None]
        else:
            shape = (len(tensors), *tensors[0].shape[:-2], height, width)
            batch = tensors[0].new_full(shape, pad_value)
            for padded, tensor in zip(batch, tensors):
                padded[..., : tensor.shape[-2], : tensor.shape[-1]].copy_(tensor)
        return ImageList(batch.contiguous(), image_sizes)


def _common_size(
    image_sizes: Sequence[tuple[int, int]], divisor: int, constraints: dict[str, int]
) -> tuple[int, int]:
    largest = (max(h for h, _ in image_sizes), max(w for _, w in image_sizes))
    divisor = constraints.get("size_divisibility", divisor)
    square_size = constraints.get("square_size", 0)
    size = largest
    if square_size > 0:
        if max(largest) > square_size:
            raise ValueError(
                f"An image of {largest} (height, width) does not fit into square_size {square_size}"
            )
        size = (square_size, square_size)
    if divisor > 1:
        height, width = ((length + divisor - 1) // divisor * divisor for length in size)
        size = (height, width)
    return size
