"""Resizing of 8-bit images, bit-exact with Pillow (`PIL.Image.Image.resize`).

The filter is separable, and widened by the scale when it shrinks the image. Its weights are rounded to 22
fractional bits. The image is filtered along one axis, rounded to bytes, and then filtered along the other.
"""

import torch

from detlib.ops._library import define

BITS = 22
BILINEAR, BICUBIC = 2, 3  # as in PIL.Image.Resampling


def resize_image(
    image: torch.Tensor, size: tuple[int, int], filter: int = BILINEAR, vertical_first: bool = False
) -> torch.Tensor:
    """Resize an image.

    Args:
        image: (H, W, C) uint8, not empty, of any memory layout; channels are resized independently.
        size: (height, width) of the result, positive.
        filter: 2 (bilinear) or 3 (bicubic, with a = -1/2), as in `PIL.Image.Resampling`.
        vertical_first: filter along y before x.

    Returns:
        (C, height, width) uint8, contiguous.

    Raises:
        TypeError: image is not a tensor.
        ValueError: a shape, dtype, size or the filter does not fit; the message names the argument.
    """
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(
            f"image must be uint8 of shape (H, W, C) and not empty, got {image.dtype} {tuple(image.shape)}"
        )
    if len(size) != 2 or min(size) <= 0:
        raise ValueError(f"size must be (height, width), both positive, got {tuple(size)}")
    if filter not in (BILINEAR, BICUBIC):
        raise ValueError(f"filter must be 2 (bilinear) or 3 (bicubic), got {filter}")
    return _resize_image(image, size[0], size[1], int(filter), vertical_first)


def _kernel(x: torch.Tensor, filter: int) -> torch.Tensor:
    x = x.abs()
    if filter == BILINEAR:
        return (1 - x).clamp(min=0)
    a = -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def _weights(source: int, target: int, filter: int) -> torch.Tensor:
    """Return the weights times 2 ** 22 as integral float64, (target, source)."""
    scale = source / target
    widening = max(scale, 1.0)
    reach = (1.0 if filter == BILINEAR else 2.0) * widening
    center = ((torch.arange(target, dtype=torch.float64) + 0.5) * scale)[:, None]
    pixel = torch.arange(source)
    begin = (center - reach + 0.5).trunc().clamp(min=0)
    end = (center + reach + 0.5).trunc().clamp(max=source)
    values = _kernel((pixel - center + 0.5) * (1.0 / widening), filter)
    values = torch.where((pixel >= begin) & (pixel < end), values, 0.0)
    total = values.cumsum(dim=1)[:, -1:]  # from left to right, since rounding depends on the order
    values = torch.where(total != 0, values / total, values) * 2**BITS
    return torch.where(values < 0, values - 0.5, values + 0.5).trunc()


def _filter(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `weights` (T, S) times `values` (C, S, L), rounded to [0, 255]; sums are exact in float64."""
    sums = weights @ values + 2 ** (BITS - 1)
    return (sums / 2**BITS).floor().clamp(0, 255)


def reference_resize_image(
    image: torch.Tensor, height: int, width: int, filter: int, vertical_first: bool
) -> torch.Tensor:
    """Compute `resize_image` in plain PyTorch, on any device."""
    values = image.permute(2, 0, 1).to(torch.float64)
    axes = ((1, height), (2, width))
    for axis, size in axes if vertical_first else axes[::-1]:
        if size != values.shape[axis]:
            weights = _weights(values.shape[axis], size, filter).to(values.device)
            values = _filter(weights, values.transpose(axis, 1)).transpose(axis, 1)
    return values.to(torch.uint8).contiguous()


def _fake(image: torch.Tensor, height: int, width: int, filter: int, vertical_first: bool) -> torch.Tensor:
    return image.new_empty((image.shape[2], height, width))


_resize_image = define(
    "resize_image",
    "(Tensor image, SymInt height, SymInt width, int filter, bool vertical_first) -> Tensor",
    fallback=reference_resize_image,
    fake=_fake,
)
