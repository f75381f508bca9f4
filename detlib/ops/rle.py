"""Run-length encoding of masks as the COCO API compresses it.

Shape legend: R masks, H and W of the picture, B bytes of all strings.
"""

import torch

from detlib.ops._library import check_tensor, define


def encode_rle(masks: torch.Tensor) -> list[dict]:
    """Encode masks as COCO's compressed run lengths, byte for byte what `pycocotools.mask.encode` gives.

    A mask's pixels are taken column by column; the lengths of the runs of zeros and ones in turn, beginning
    with zeros, are written five bits a character, from the fourth on as the difference to the last but one
    (https://github.com/cocodataset/cocoapi, `maskApi`). Not differentiable.

    Args:
        masks: (R, H, W) bool, on any device.

    Returns:
        One `{"size": [H, W], "counts": bytes}` for each mask.

    Raises:
        TypeError: masks is no tensor.
        ValueError: its shape or dtype does not fit.
    """
    check_tensor("masks", masks, "(R, H, W)", floating=False)
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {masks.dtype}")
    return split_rles(*_encode_rle(masks), *masks.shape[1:])


def split_rles(text: torch.Tensor, lengths: torch.Tensor, height: int, width: int) -> list[dict]:
    """Cut what the encoding operators return, (B,) uint8 and (R,) int64 on the CPU, into COCO's dicts."""
    text = text.numpy().tobytes()
    rles, begin = [], 0
    for length in lengths.tolist():
        rles.append({"size": [int(height), int(width)], "counts": text[begin : begin + length]})
        begin += length
    return rles


def reference_encode_rle(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The strings of all masks, (B,) uint8, and their lengths, (R,) int64, on the CPU, in plain PyTorch."""
    texts = [_compress(_run_lengths(mask)) for mask in masks]
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return torch.cat([torch.empty(0, dtype=torch.uint8), *texts]), lengths


def _run_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Lengths of the runs of zeros and ones in turn, (runs,) int64 on the CPU, of a (H, W) bool mask."""
    pixels = torch.nn.functional.pad(mask.T.reshape(-1).byte(), (1, 0))
    changes = pixels.diff().nonzero()[:, 0].cpu()
    ends = torch.cat([changes, torch.tensor([mask.numel()])])
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64))


def _compress(lengths: torch.Tensor) -> torch.Tensor:
    """Run lengths, (runs,) int64, as characters, (bytes,) uint8."""
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
    """The shapes that encoding operators return."""
    size = torch.library.get_ctx().new_dynamic_size()
    text = torch.empty(size, dtype=torch.uint8, device="cpu")
    return text, torch.empty(masks.shape[0], dtype=torch.int64, device="cpu")


_encode_rle = define(
    "encode_rle", "(Tensor masks) -> (Tensor, Tensor)", fallback=_fallback_encode_rle, fake=fake_rles
)
