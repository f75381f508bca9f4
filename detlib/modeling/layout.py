"""Which memory layout convolutions get their input in."""

from collections.abc import Sequence

import torch

__all__ = ["CHANNELS_LAST_ON", "for_convolutions"]

CHANNELS_LAST_ON = ("cpu", "cuda")
"""Types of devices whose convolutions and RoIAlign are faster in channels-last layout."""


def for_convolutions(x: torch.Tensor, channels_last_on: Sequence[str] = CHANNELS_LAST_ON) -> torch.Tensor:
    """The same (N, C, H, W) values in the layout in which convolutions are fastest on their device.

    That is channels-last on devices of the types `channels_last_on`; `x` itself is returned elsewhere, and
    where it has that layout.
    """
    if x.device.type not in channels_last_on:
        return x
    return x.contiguous(memory_format=torch.channels_last)
