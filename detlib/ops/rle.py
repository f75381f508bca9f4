"""Run-length encoding of masks in COCO's compressed form.

Shape legend: R masks, H and W of the image, B bytes of all strings.
"""

import torch

from detlib.ops._library import check_tensor, define


def encode_rle(masks: torch.Tensor) -> list[dict]:
    """Encode masks as COCO's compressed run lengths, byte for byte like `pycocotools.mask.encode`.

    The pixels are read column by column. The lengths of alternating runs of zeros and ones, starting with
    zeros, are written with five bits per character; from the fourth on, each is written as the difference to
    the length two before (https://github.com/cocodataset/cocoapi, `maskApi`). Not differentiable.

    Args:
        masks: (R, H, W) bool, on any device.

    Returns:
        One `{"size": [H, W], "counts": bytes}` for each mask.

    Raises:
        TypeError: `masks` is not a tensor.
        ValueError: the shape or dtype of `masks` does not fit.
    """
    check_tensor("masks", masks, "(R, H, W)", floating=False)
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {masks.dtype}")
    return split_rles(*_encode_rle(masks), *masks.shape[1:])


def split_rles(text: torch.Tensor, lengths: torch.Tensor, height: int, width: int) -> list[dict]:
    """Split the strings of all masks, (B,) uint8, by their lengths, (R,) int64, into COCO's dicts."""
    text = text.numpy().tobytes()
    rles, begin = [], 0
    for length in lengths.tolist():
        rles.append({"size": [int(height), int(width)], "counts": text[begin : begin + length]})
        begin += length
    return rles


def reference_encode_rle(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the strings of all masks, (B,) uint8, and their lengths, (R,) int64, in plain PyTorch."""
    texts = [_compress(_run_lengths(mask)) for mask in masks]
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return torch.cat([torch.empty(0, dtype=torch.uint8), *texts]), lengths


def _run_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Return the lengths of alternating runs of zeros and ones of an (H, W) bool mask, (runs,) int64, CPU."""
    pixels = torch.nn.functional.pad(mask.T.reshape(-1).byte(), (1, 0))
    changes = pixels.diff().nonzero()[:, 0].cpu()
    ends = torch.cat([changes, torch.tensor([mask.numel()])])
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64))


def _compress(lengths: torch.Tensor) -> torch.Tensor:
    """Convert run lengths, (runs,) int64, to characters, (bytes,) uint8."""
    rest = lengths.clone()
    rest[3:] -= lengths[1:-2]
    groups, used = [], []
    more = torch.ones_like(rest, dtype=torch.bool)
    while more.any():
        used.append(more)
        group = rest & 31
        rest = rest >> 5
        more = more & (rest != torch.where(group >= 16, -1, 0))
        groups.append(group + 48 + 32 * more)
    return torch.stack(groups, 1)[torch.stack(used, 1)].byte()


def _fallback_encode_rle(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if masks.dtype != torch.bool:
        raise RuntimeError(f"masks must be bool, got {masks.dtype}")
    return reference_encode_rle(masks)


def fake_rles(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty results of an encoding operator."""
    size = torch.library.get_ctx().new_dynamic_size()
    text = torch.empty(size, dtype=torch.uint8, device="cpu")
    return text, torch.empty(masks.shape[0], dtype=torch.int64, device="cpu")


_encode_rle = define(
    "encode_rle", "(Tensor masks) -> (Tensor, Tensor)", fallback=_fallback_encode_rle, fake=fake_rles
)
