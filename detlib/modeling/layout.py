"""Which memory layout convolutions get their input in."""

import torch

__all__ = ["for_convolutions"]

# Their convolutions and RoIAlign are faster in channels-last layout; what follows keeps that of its input.
_CHANNELS_LAST_DEVICES = ("cpu", "cuda")


def for_convolutions(x: torch.Tensor) -> torch.Tensor:
    """The same (N, C, H, W) values in the layout in which convolutions are fastest on their device.

    That is channels-last on CPUs and CUDA devices. Elsewhere, and in that layout, `x` itself is returned.
    """
    if x.device.type not in _CHANNELS_LAST_DEVICES:
        return x
    return x.contiguous(memory_format=torch.channels_last)
