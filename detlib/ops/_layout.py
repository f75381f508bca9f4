"""How (N, C, H, W) maps lie in memory: results lie as inputs do."""

import torch

__all__ = ["in_layout_of", "is_channels_last", "memory_format_of", "new_map"]


def is_channels_last(map: torch.Tensor) -> bool:
    """Whether a map can only be read as (N, H, W, C) in memory; the compiled kernels decide by the same
    rule."""
    return map.is_contiguous(memory_format=torch.channels_last) and not map.is_contiguous()


def memory_format_of(map: torch.Tensor) -> torch.memory_format:
    """Channels-last if a map can only be read so, else contiguous."""
    return torch.channels_last if is_channels_last(map) else torch.contiguous_format


def new_map(like: torch.Tensor, images: int, channels: int, height: int, width: int) -> torch.Tensor:
    """An empty map (images, channels, height, width) in the layout of `like`; no view of another tensor."""
    size, layout = (images, channels, height, width), memory_format_of(like)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def in_layout_of(like: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
    """The map in channels-last layout if `like` has it, else as it is."""
    return map.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else map
