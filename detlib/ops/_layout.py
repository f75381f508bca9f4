"""How (N, C, H, W) maps lie in memory: results lie as inputs do."""

import torch

__all__ = ["in_layout_of", "is_channels_last", "new_map"]


def is_channels_last(map: torch.Tensor) -> bool:
    """Whether a map can only be read as (N, H, W, C) in memory; the compiled kernels decide by the same
    rule."""
    return map.is_contiguous(memory_format=torch.channels_last) and not map.is_contiguous()


def new_map(like: torch.Tensor, images: int, channels: int, height: int, width: int) -> torch.Tensor:
    """An empty map (images, channels, height, width) in the layout of `like`; no view of another tensor."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(
        (images, channels, height, width), dtype=like.dtype, device=like.device, memory_format=layout
    )


def in_layout_of(like: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
    """The map in channels-last layout if `like` has it, else as it is."""
    return map.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else map
