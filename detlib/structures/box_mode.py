"""BoxMode: the ways to write a box, and conversion between them."""

from enum import IntEnum, unique

import numpy as np
import torch

__all__ = ["BoxMode"]


@unique
class BoxMode(IntEnum):
    """Names of box formats, as integers that dataset files may carry.

    Attributes:
        XYXY_ABS: x0, y0, x1, y1 in absolute pixels.
        XYWH_ABS: x0, y0, width, height in absolute pixels (COCO).
        XYXY_REL: x0, y0, x1, y1 as fractions of the picture's size; cannot be converted.
        XYWH_REL: x0, y0, width, height as fractions of the picture's size; cannot be converted.
        XYWHA_ABS: centre x, centre y, width, height in absolute pixels, counter-clockwise angle in degrees.
    """

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(
        box: list[float] | tuple[float, ...] | torch.Tensor | np.ndarray,
        from_mode: "BoxMode",
        to_mode: "BoxMode",
    ) -> list[float] | tuple[float, ...] | torch.Tensor | np.ndarray:
        """Rewrites boxes in another format.

        A rotated box becomes the smallest upright box around it.

        Args:
            box: one box as a list or tuple, or an array or tensor (..., 4), (..., 5) for XYWHA_ABS.
            from_mode: the format of `box`.
            to_mode: the format wanted.

        Returns:
            The same type as `box`, with the same dtype; `box` itself when the formats agree.

        Raises:
            ValueError: for a relative format, or a box of the wrong length.
        """
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        if from_mode == to_mode:
            return box
        for mode in (from_mode, to_mode):
            if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
                raise ValueError(
                    f"BoxMode.{mode.name} cannot be converted, since the picture's size is unknown here; "
                    "multiply by it and use an absolute mode"
                )
        array = box if isinstance(box, torch.Tensor) else torch.as_tensor(np.asarray(box))
        length = 5 if from_mode == BoxMode.XYWHA_ABS else 4
        if array.dim() == 0 or array.shape[-1] != length:
            raise ValueError(
                f"A box in BoxMode.{from_mode.name} has {length} numbers, got shape {tuple(array.shape)}"
            )
        converted = _CONVERSIONS[from_mode, to_mode](array)
        if isinstance(box, torch.Tensor):
            return converted
        if isinstance(box, np.ndarray):
            return converted.numpy()
        return type(box)(converted.tolist())


def _xyxy_to_xywh(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def _xywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def _xywh_to_xywha(boxes: torch.Tensor) -> torch.Tensor:
    x0, y0, width, height = boxes.double().unbind(dim=-1)
    rotated = [x0 + width / 2, y0 + height / 2, width, height, torch.zeros_like(x0)]
    return torch.stack(rotated, dim=-1).to(boxes.dtype)


def _xyxy_to_xywha(boxes: torch.Tensor) -> torch.Tensor:
    return _xywh_to_xywha(_xyxy_to_xywh(boxes))


def _xywha_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    center_x, center_y, width, height, angle = boxes.double().unbind(dim=-1)
    cos, sin = torch.deg2rad(angle).cos().abs(), torch.deg2rad(angle).sin().abs()
    half_w = (cos * width + sin * height) / 2
    half_h = (cos * height + sin * width) / 2
    upright = [center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h]
    return torch.stack(upright, dim=-1).to(boxes.dtype)


def _xywha_to_xywh(boxes: torch.Tensor) -> torch.Tensor:
    return _xyxy_to_xywh(_xywha_to_xyxy(boxes))


_CONVERSIONS = {
    (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS): _xyxy_to_xywh,
    (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS): _xywh_to_xyxy,
    (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS): _xywh_to_xywha,
    (BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS): _xyxy_to_xywha,
    (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS): _xywha_to_xyxy,
    (BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS): _xywha_to_xywh,
}
