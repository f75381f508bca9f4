"""Checks of operator arguments, with messages that name the argument, what came and what is legal."""

import torch


def check_tensor(name: str, value: object, shape: str, *, floating: bool = True) -> None:
    """Raise unless `value` is a tensor that fits `shape`, e.g. "(N, 4)", and is floating point if asked."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    sizes = [size.strip() for size in shape.strip("()").split(",") if size.strip()]
    fits = value.dim() == len(sizes) and all(
        not wanted.isdigit() or got == int(wanted) for got, wanted in zip(value.shape, sizes)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def check_same_length(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless both tensors have the same first dimension and device.

    Lengths are not compared while a graph is being captured: they may be unknown there.
    """
    if not torch.compiler.is_compiling() and value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have one entry per entry of {other_name}, got {value.shape[0]} and {other.shape[0]}"
        )
    check_same_device(name, value, other_name, other)


def check_same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless both tensors lie on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")


def check_positive(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_nms_arguments(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    *,
    box_dim: int,
    idxs: torch.Tensor | None = None,
) -> None:
    """Raise unless boxes of `box_dim` numbers, scores, categories (if any) and threshold fit."""
    check_tensor("boxes", boxes, f"(N, {box_dim})")
    check_tensor("scores", scores, "(N,)")
    check_same_length("scores", scores, "boxes", boxes)
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if idxs is not None:
        check_tensor("idxs", idxs, "(N,)", floating=False)
        check_same_length("idxs", idxs, "boxes", boxes)
