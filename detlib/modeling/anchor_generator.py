"""Anchors: the reference boxes that dense detectors classify and refine.

Shape legend: L feature levels, H and W the size of one level's feature map, A anchors per pixel of the
feature map, B numbers per box, R = H*W*A anchors of one level.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import configurable
from detlib.layers.shape_spec import ShapeSpec
from detlib.structures import Boxes, RotatedBoxes
from detlib.utils.registry import Registry

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BufferList",
    "DefaultAnchorGenerator",
    "RotatedAnchorGenerator",
    "build_anchor_generator",
    "check_rows",
    "permute_to_N_HWA_K",
    "same_on_all_levels",
]

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
ANCHOR_GENERATOR_REGISTRY.__doc__ = """
Classes of anchor generators, called as `cls(cfg, input_shape: list[ShapeSpec])`, found by
`cfg.MODEL.ANCHOR_GENERATOR.NAME`.
"""


class BufferList(nn.Module):
    """A list of tensors that move with the module and are not in its state dict."""

    def __init__(self, buffers):
        super().__init__()
        for i, buffer in enumerate(buffers):
            self.register_buffer(str(i), buffer, persistent=False)

    def __len__(self):
        return len(self._buffers)

    def __iter__(self):
        return iter(self._buffers.values())

    def __getitem__(self, index):
        return list(self._buffers.values())[index]


def broadcast_params(params, num_features: int, name: str) -> list[list[float]]:
    """Return one list of numbers for each feature level.

    Args:
        params: a list of numbers for all levels, or a list of such lists, either one for all levels or one
            for each.
        num_features: the number of levels, L.
        name: the name of the parameter in error messages.

    Raises:
        ValueError: `params` is empty, mixes numbers and lists, or does not fit `num_features`.
    """
    if not isinstance(params, Sequence) or isinstance(params, str) or not len(params):
        raise ValueError(f"{name} must be a non-empty list, got {params!r}")
    nested = [isinstance(p, Sequence) and not isinstance(p, str) for p in params]
    if not any(nested):
        return [list(params)] * num_features
    if not all(nested) or not all(len(p) for p in params):
        raise ValueError(f"{name} must contain either numbers or non-empty lists of numbers, got {params!r}")
    if len(params) == 1:
        return [list(params[0])] * num_features
    if len(params) != num_features:
        raise ValueError(
            f"{name} has {len(params)} lists for {num_features} feature levels; give one for all levels or "
            f"one for each, got {params!r}"
        )
    return [list(p) for p in params]


def _params_per_level(num_features: int, **params) -> list[tuple[list[float], ...]]:
    """Return a tuple for each level, with one list for each of `params`, keys of MODEL.ANCHOR_GENERATOR."""
    columns = [
        broadcast_params(value, num_features, f"MODEL.ANCHOR_GENERATOR.{name}")
        for name, value in params.items()
    ]
    return list(zip(*columns))


def _widths_and_heights(sizes, aspect_ratios) -> list[tuple[float, float]]:
    """Return the width and height of each size with each ratio; the ratios change fastest."""
    widths = [(math.sqrt(size**2.0 / ratio), ratio) for size in sizes for ratio in aspect_ratios]
    return [(width, ratio * width) for width, ratio in widths]


def grid_points(size: tuple[int, int], stride: int, offset: float, device: torch.device) -> torch.Tensor:
    """Return the centers of the anchors of one feature level.

    Args:
        size: (H, W) of the level's feature map.
        stride: image pixels per pixel of the feature map.
        offset: position of the center in its cell, as a fraction of the stride; 0 is the top left corner.
        device: device of the result.

    Returns:
        (H*W, 2) float32 tensor of x, y in absolute pixels, row by row.
    """
    height, width = size
    x = (torch.arange(width, dtype=torch.float32, device=device) + offset) * stride
    y = (torch.arange(height, dtype=torch.float32, device=device) + offset) * stride
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).view(-1, 2)


class _GridAnchorGenerator(nn.Module):
    """Base class of generators that place the same anchors, of type `box_type`, on every pixel of a level."""

    box_type: type[Boxes] = Boxes
    """The class of the anchors."""
    box_dim: int = 4
    """Numbers per anchor, B."""

    def __init__(self, cell_anchors: list[torch.Tensor], strides: list[int], offset: float):
        """
        Args:
            cell_anchors: for each level the (A, B) anchors of one pixel, around the origin.
            strides: stride of each level, in pixels.
            offset: position of an anchor's center in its cell, as a fraction of the stride, in [0, 1).

        Raises:
            ValueError: `offset` is not in [0, 1).
        """
        super().__init__()
        if not 0.0 <= offset < 1.0:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET must be in [0, 1), got {offset!r}")
        self.strides = strides
        self.num_features = len(strides)
        self.cell_anchors = BufferList(cell_anchors)
        self.offset = offset

    @property
    def num_anchors(self) -> list[int]:
        """Anchors per pixel, A, of each level."""
        return [len(cell) for cell in self.cell_anchors]

    @property
    def num_cell_anchors(self) -> list[int]:
        """An alias of `num_anchors`."""
        return self.num_anchors

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """Generate the anchors of a batch, which depend on the sizes of the feature maps only.

        Args:
            features: L feature maps (N, C, H, W).

        Returns:
            A `box_type` of R boxes for each level, in absolute pixels of the padded images. They are in the
            order of a contiguous (H, W, A) tensor.

        Raises:
            ValueError: the number of feature maps is not the number of levels.
        """
        if len(features) != self.num_features:
            raise ValueError(f"expected {self.num_features} feature levels, got {len(features)} feature maps")
        levels = []
        for feature, stride, cell in zip(features, self.strides, self.cell_anchors):
            points = grid_points((feature.shape[-2], feature.shape[-1]), stride, self.offset, cell.device)
            levels.append((self._shifts(points)[:, None, :] + cell).view(-1, self.box_dim))
        return [self.box_type(anchors) for anchors in levels]

    @staticmethod
    def _shifts(points: torch.Tensor) -> torch.Tensor:
        """Return the (P, B) shifts from the origin to each of (P, 2) points."""
        return torch.cat((points, points), dim=1)


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(_GridAnchorGenerator):
    """Axis-aligned anchors of several sizes and aspect ratios on every pixel of every level.

    As published for Faster R-CNN (arXiv:1506.01497). An anchor of size s and ratio r has the area s*s and the
    height r times the width.
    """

    @configurable
    def __init__(self, *, sizes, aspect_ratios, strides, offset=0.5):
        """
        Args:
            sizes: list of anchor sizes (square roots of areas, in pixels) for all levels, or a list of such
                lists, one for each level.
            aspect_ratios: height / width, for all levels or one list for each, as `sizes`.
            strides: stride of each level, in pixels.
            offset: position of an anchor's center in its cell, as a fraction of the stride, in [0, 1).

        Raises:
            ValueError: `offset` is not in [0, 1), or sizes or ratios do not fit the levels.
        """
        strides = list(strides)
        per_level = _params_per_level(len(strides), SIZES=sizes, ASPECT_RATIOS=aspect_ratios)
        super().__init__([self.generate_cell_anchors(*params) for params in per_level], strides, offset)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        """Translate `cfg.MODEL.ANCHOR_GENERATOR`; the strides come from `input_shape`."""
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    def generate_cell_anchors(self, sizes=(32, 64, 128, 256, 512), aspect_ratios=(0.5, 1, 2)) -> torch.Tensor:
        """Generate the anchors of one pixel, around the origin.

        Args:
            sizes: square roots of the anchors' areas, in pixels.
            aspect_ratios: heights / widths.

        Returns:
            (len(sizes) * len(aspect_ratios), 4) float32 XYXY boxes; the ratios change fastest.
        """
        anchors = [
            [-width / 2.0, -height / 2.0, width / 2.0, height / 2.0]
            for width, height in _widths_and_heights(sizes, aspect_ratios)
        ]
        return torch.tensor(anchors, dtype=torch.float32)


@ANCHOR_GENERATOR_REGISTRY.register()
class RotatedAnchorGenerator(_GridAnchorGenerator):
    """Rotated anchors of several sizes, aspect ratios and angles on every pixel of every level.

    As in "Arbitrary-Oriented Scene Text Detection via Rotation Proposals" (arXiv:1703.01086). Sizes and
    ratios are those of `DefaultAnchorGenerator`, before the rotation.
    """

    box_type = RotatedBoxes
    box_dim = 5

    @configurable
    def __init__(self, *, sizes, aspect_ratios, strides, angles, offset=0.5):
        """
        Args:
            sizes: list of anchor sizes (square roots of areas, in pixels) for all levels, or a list of such
                lists, one for each level.
            aspect_ratios: height / width, for all levels or one list for each, as `sizes`.
            strides: stride of each level, in pixels.
            angles: degrees, counter-clockwise, for all levels or one list for each, as `sizes`.
            offset: position of an anchor's center in its cell, as a fraction of the stride, in [0, 1).

        Raises:
            ValueError: `offset` is not in [0, 1), or sizes, ratios or angles do not fit the levels.
        """
        strides = list(strides)
        per_level = _params_per_level(len(strides), SIZES=sizes, ASPECT_RATIOS=aspect_ratios, ANGLES=angles)
        super().__init__([self.generate_cell_anchors(*params) for params in per_level], strides, offset)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        """Translate `cfg.MODEL.ANCHOR_GENERATOR`; the strides come from `input_shape`."""
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
            "angles": cfg.MODEL.ANCHOR_GENERATOR.ANGLES,
        }

    def generate_cell_anchors(
        self,
        sizes=(32, 64, 128, 256, 512),
        aspect_ratios=(0.5, 1, 2),
        angles=(-90, -60, -30, 0, 30, 60, 90),
    ) -> torch.Tensor:
        """Generate the anchors of one pixel, around the origin.

        Args:
            sizes: square roots of the anchors' areas, in pixels.
            aspect_ratios: heights / widths.
            angles: degrees, counter-clockwise.

        Returns:
            (len(sizes) * len(aspect_ratios) * len(angles), 5) float32 boxes (0, 0, width, height, angle); the
            angles change fastest, then the ratios.
        """
        anchors = [
            [0, 0, width, height, angle]
            for width, height in _widths_and_heights(sizes, aspect_ratios)
            for angle in angles
        ]
        return torch.tensor(anchors, dtype=torch.float32)

    @staticmethod
    def _shifts(points: torch.Tensor) -> torch.Tensor:
        return F.pad(points, (0, 3))  # sizes and angles are unchanged


def build_anchor_generator(cfg, input_shape):
    """Build the anchor generator `cfg.MODEL.ANCHOR_GENERATOR.NAME`.

    Args:
        cfg: the full config.
        input_shape: a `ShapeSpec` with the stride of each feature level.
    """
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    return ANCHOR_GENERATOR_REGISTRY.get(name, key="MODEL.ANCHOR_GENERATOR.NAME")(cfg, input_shape)


def same_on_all_levels(values: list, what: str):
    """Return the common value of a list, for a head that is shared by all levels.

    Args:
        values: the value on each level.
        what: the name of the value in error messages.

    Raises:
        ValueError: the values differ.
    """
    if len(set(values)) != 1:
        raise ValueError(
            f"the head is shared by all levels, so {what} must be the same on each; got {list(values)}"
        )
    return values[0]


def permute_to_N_HWA_K(tensor: torch.Tensor, K: int) -> torch.Tensor:
    """Rearrange a convolution's output to one row per anchor.

    Args:
        tensor: (N, A*K, H, W), K numbers for each of A anchors.
        K: numbers per anchor.

    Returns:
        (N, H*W*A, K) tensor. Rows are in the order of a contiguous (H, W, A) tensor, as the anchors are.

    Raises:
        ValueError: `tensor` is not four-dimensional, or its channels are not a multiple of K.
    """
    if tensor.dim() != 4 or tensor.shape[1] % K:
        raise ValueError(f"expected (N, A*{K}, H, W), got the shape {tuple(tensor.shape)}")
    n, channels, height, width = tensor.shape
    tensor = tensor.view(n, channels // K, K, height, width).permute(0, 3, 4, 1, 2)
    return tensor.reshape(n, height * width * (channels // K), K)


def check_rows(anchors, predictions: list[torch.Tensor], remedy: str) -> None:
    """Check that predictions and anchors agree in number.

    Args:
        anchors: L sets of anchors.
        predictions: L tensors (N, R, K).
        remedy: what the user should change, for the error message.

    Raises:
        ValueError: the number of levels, or of rows on a level, differs.
    """
    have, want = [p.shape[1] for p in predictions], [len(a) for a in anchors]
    if have != want:
        raise ValueError(f"the head predicts {have} anchors per level, but there are {want}: {remedy}")
