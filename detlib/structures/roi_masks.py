"""Masks as they are predicted: small soft pictures within boxes."""

from numbers import Integral

import torch

from detlib.layers.mask_ops import paste_masks_in_image
from detlib.utils.memory import retry_if_cuda_oom

from .bit_masks import BitMasks
from .boxes import Boxes

__all__ = ["ROIMasks"]


class ROIMasks:
    """The masks of N objects, each M x M pixels stretched over the object's box.

    Args:
        tensor: (N, M, M) mask values in [0, 1].

    Attributes:
        tensor: as given.
    """

    def __init__(self, tensor: torch.Tensor):
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks takes a tensor of shape (N, M, M), got {tuple(tensor.shape)}")
        self.tensor = tensor

    def to(self, device: torch.device) -> "ROIMasks":
        """The same masks on another device."""
        return ROIMasks(self.tensor.to(device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: slice | torch.Tensor) -> "ROIMasks":
        """Selects objects by an index (giving N = 1), a slice, an integer or a boolean vector."""
        if isinstance(item, Integral):
            return ROIMasks(self.tensor[item][None])
        selected = self.tensor[item]
        if selected.dim() != 3:
            raise IndexError(f"Indexing ROIMasks with {item} gives shape {tuple(selected.shape)}")
        return ROIMasks(selected)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self.tensor)})"

    def to_bitmasks(self, boxes: torch.Tensor | Boxes, height, width, threshold=0.5) -> BitMasks:
        """Pastes the masks into pictures.

        Args:
            boxes: (N, 4) absolute xyxy pixels, tensor or Boxes.
            height: of the picture.
            width: of the picture.
            threshold: mask value from which a pixel belongs to the object.
        """
        boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
        paste = retry_if_cuda_oom(paste_masks_in_image)
        return BitMasks(paste(self.tensor, boxes, (height, width), threshold))
