"""Segment ids as RGB colors, as in COCO's panoptic format (https://cocodataset.org/#format-data)."""

import numpy as np

__all__ = ["id_to_rgb", "rgb_to_id"]


def rgb_to_id(image: np.ndarray) -> np.ndarray:
    """Convert (H, W, 3) uint8 RGB to (H, W) int64 segment ids: R + 256 G + 256^2 B."""
    red, green, blue = (image[..., channel].astype(np.int64) for channel in range(3))
    return red + (green << 8) + (blue << 16)


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Convert (H, W) integer segment ids in [0, 2^24) to (H, W, 3) uint8 RGB.

    Raises:
        ValueError: an id does not fit into three bytes.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 24:
        raise ValueError(f"Segment ids must be in [0, 2^24), got {ids.min()} to {ids.max()}.")
    return np.stack([(ids >> shift) & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
