"""Resizing arrays as Pillow does, by the compiled operator where that gives the same values.

Pillow filters along x first; from version 13 on, along y first where that saves work. Which of the two the
installed one does is asked of it once, with small pictures. Should neither fit, Pillow itself resizes.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image

from detlib.ops import resize_image
from detlib.ops._library import has_native_kernel

__all__ = ["from_pil", "resize_as_pillow", "to_pil"]

_FAST = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

OrderRule = Callable[[int, int, int, int], bool]


def to_pil(img: np.ndarray) -> Image.Image:
    """A uint8 array of shape (H, W), (H, W, 1) or (H, W, C) as a PIL image."""
    if img.ndim == 3 and img.shape[2] == 1:
        img = img[:, :, 0]
    return Image.fromarray(img)


def from_pil(image: Image.Image, like: np.ndarray) -> np.ndarray:
    """``image`` as an array with as many dimensions as ``like``."""
    array = np.asarray(image)
    return array[:, :, None] if like.ndim == 3 and array.ndim == 2 else array


def _rows_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow 13 filters along y first."""
    return new_height < height and height - new_height > 2 * (width - new_width)


def _never(height: int, width: int, new_height: int, new_width: int) -> bool:
    return False


# (height, width, new height, new width) of all kinds: larger, smaller, both; on either side of the rule.
_PROBES = (
    (12, 15, 19, 26),
    (12, 15, 7, 26),
    (12, 15, 19, 6),
    (24, 24, 12, 16),
    (24, 24, 12, 17),
    (24, 24, 12, 18),
    (24, 24, 12, 19),
    (24, 24, 20, 23),
    (24, 40, 9, 12),
    (40, 24, 9, 20),
)


def _fits(rule: OrderRule) -> bool:
    """Whether the operator, in the order of ``rule``, gives what Pillow gives."""
    rng = np.random.default_rng(0)
    for height, width, new_height, new_width in _PROBES:
        img = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for method in _FAST:
            expected = np.asarray(Image.fromarray(img).resize((new_width, new_height), method))
            if not np.array_equal(_resize(img, new_height, new_width, method, rule), expected):
                return False
    return True


@cache
def _order_rule() -> OrderRule | None:
    """The rule that the installed Pillow follows; None where it is not known or there is no fast operator."""
    if not has_native_kernel("resize_image", "cpu"):
        return None
    return next((rule for rule in (_rows_first, _never) if _fits(rule)), None)


def _resize(img: np.ndarray, new_height: int, new_width: int, method: int, rule: OrderRule) -> np.ndarray:
    reverse = img.strides[2] < 0  # the channels of a BGR view of RGB; tensors have no negative strides
    source = img[:, :, ::-1] if reverse else img
    if min(source.strides) < 0 or not source.flags.writeable:
        source = source.copy()
    first = rule(*img.shape[:2], new_height, new_width)
    planes = resize_image(torch.from_numpy(source), (new_height, new_width), int(method), first)
    out = planes.numpy().transpose(1, 2, 0)
    return out[:, :, ::-1] if reverse else out


def resize_as_pillow(img: np.ndarray, new_height: int, new_width: int, method: int) -> np.ndarray:
    """Resize a picture as `PIL.Image.Image.resize` does, to the last bit.

    Args:
        img: (H, W) or (H, W, C) uint8, of any memory layout.
        new_height, new_width: positive.
        method: a `PIL.Image.Resampling`.

    Returns:
        uint8 array of as many dimensions; its memory may be laid out as planes.
    """
    channels = 1 if img.ndim == 2 else img.shape[2]
    # Pillow weighs colours by alpha, if there are two or four channels.
    rule = _order_rule() if method in _FAST and channels in (1, 3) and img.size > 0 else None
    if rule is None or img.shape[:2] == (new_height, new_width):
        return from_pil(to_pil(img).resize((new_width, new_height), method), img)
    if img.ndim == 2:
        return _resize(img[:, :, None], new_height, new_width, method, rule)[:, :, 0]
    return _resize(img, new_height, new_width, method, rule)
