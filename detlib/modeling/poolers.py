"""Pooling of region features from one feature map or a feature pyramid.

Shape legend: N images, R boxes of all images together, R_i those of one image, L pyramid levels, C channels,
B numbers per box (4, or 5 for rotated boxes), H and W height and width.
"""

import math
from typing import Any

import torch
from torch import nn

from detlib.config import CfgNode
from detlib.layers import ShapeSpec, cat
from detlib.layers.roi_align import ROIAlign, ROIPool
from detlib.layers.roi_align_rotated import ROIAlignRotated
from detlib.modeling.config_checks import check_features, config_keys
from detlib.structures import Boxes

__all__ = [
    "ROIPooler",
    "assign_boxes_to_levels",
    "convert_boxes_to_pooler_format",
    "feature_shapes",
    "pooler_from_config",
]


def assign_boxes_to_levels(
    box_lists: list[Boxes],
    min_level: int,
    max_level: int,
    canonical_box_size: int,
    canonical_level: int,
) -> torch.Tensor:
    """Assign each box to a pyramid level by its size: equation 1 of the FPN paper (arXiv:1612.03144).

    A box whose square root of area is `canonical_box_size` is assigned to `canonical_level`; each doubling of
    the side moves it up by one level.

    Args:
        box_lists: N box objects, absolute pixels of the network input.
        min_level: the finest level, as log2 of its stride.
        max_level: the coarsest level.
        canonical_box_size: side in pixels.
        canonical_level: the level of boxes with that side.

    Returns:
        (R,) int64 indices of levels, 0 for `min_level`.
    """
    sizes = torch.sqrt(cat([boxes.area() for boxes in box_lists]))
    # The epsilon keeps log2 finite for a box without area. Published weights were trained with this value.
    levels = torch.floor(canonical_level + torch.log2(sizes / canonical_box_size + 1e-8))
    return levels.clamp(min=min_level, max=max_level).to(torch.int64) - min_level


def convert_boxes_to_pooler_format(box_lists: list[Boxes]) -> torch.Tensor:
    """Concatenate the boxes of N images and prepend the index of the image.

    Args:
        box_lists: N box objects, (R_i, B) each.

    Returns:
        (R, 1 + B): the index of the image, then the box (absolute xyxy pixels for `Boxes`).
    """
    boxes = cat([x.tensor for x in box_lists])
    images = cat([boxes.new_full((x.tensor.shape[0], 1), i) for i, x in enumerate(box_lists)])
    return cat([images, boxes], dim=1)


def _level_of_scale(scale: float) -> int:
    level = -math.log2(scale)
    if not math.isclose(level, round(level), abs_tol=1e-6):
        raise ValueError(f"ROIPooler: a scale must be one over a power of 2, got {scale}.")
    return round(level)


def _build_level_pooler(
    pooler_type: str, output_size: tuple[int, int], scale: float, sampling_ratio: int
) -> nn.Module:
    if pooler_type == "ROIAlign":
        return ROIAlign(output_size, spatial_scale=scale, sampling_ratio=sampling_ratio, aligned=False)
    if pooler_type == "ROIAlignV2":
        return ROIAlign(output_size, spatial_scale=scale, sampling_ratio=sampling_ratio, aligned=True)
    if pooler_type == "ROIPool":
        return ROIPool(output_size, spatial_scale=scale)
    if pooler_type == "ROIAlignRotated":
        return ROIAlignRotated(output_size, spatial_scale=scale, sampling_ratio=sampling_ratio)
    raise ValueError(
        f"ROIPooler: pooler_type {pooler_type!r} is unknown; legal are 'ROIAlign', 'ROIAlignV2', 'ROIPool', "
        "'ROIAlignRotated'."
    )


class ROIPooler(nn.Module):
    """Pools each box from the pyramid level that fits its size."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: list[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        """
        Args:
            output_size: side of the pooled square, or (height, width).
            scales: one over the stride of each level, finest first; consecutive powers of 2.
            sampling_ratio: samples per bin along each axis, for the ROIAlign types; 0 adapts the number to
                the size of the box.
            pooler_type: "ROIAlign" (shifted by half a pixel, as in Detectron), "ROIAlignV2" (aligned),
                "ROIPool", or "ROIAlignRotated" for rotated boxes.
            canonical_box_size: side in pixels of the boxes on `canonical_level`.
            canonical_level: log2 of that level's stride.

        Raises:
            ValueError: a scale is not a power of 2, levels are missing in between, or the type is unknown.
        """
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        if len(output_size) != 2 or any(int(side) != side or side < 1 for side in output_size):
            raise ValueError(
                f"ROIPooler: output_size must be one or two positive integers, got {output_size}."
            )
        if canonical_box_size <= 0:
            raise ValueError(f"ROIPooler: canonical_box_size must be positive, got {canonical_box_size}.")
        levels = [_level_of_scale(scale) for scale in scales]
        if not levels or levels != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(
                f"ROIPooler: scales must decrease by factors of 2 from level to level, got {list(scales)}."
            )
        self.output_size = (output_size[0], output_size[1])
        self.level_poolers = nn.ModuleList(
            _build_level_pooler(pooler_type, self.output_size, scale, sampling_ratio) for scale in scales
        )
        self.min_level = levels[0]
        self.max_level = levels[-1]
        self.canonical_level = canonical_level
        self.canonical_box_size = canonical_box_size

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """Pool the boxes of all images.

        Args:
            x: L feature maps (N, C, H_l, W_l), one for each scale, finest first.
            box_lists: N box objects, absolute pixels of the network input.

        Returns:
            (R, C, output height, output width), in the order of `box_lists`. It is contiguous if there are
            several levels, else in the layout that RoIAlign returns. Without boxes R is 0, and the result
            still requires grad.
        """
        if len(x) != len(self.level_poolers):
            raise ValueError(f"ROIPooler has {len(self.level_poolers)} levels, got {len(x)} feature maps.")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"ROIPooler got the boxes of {len(box_lists)} images, features of {x[0].shape[0]}."
            )
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size))
        box_dim = 5 if isinstance(self.level_poolers[0], ROIAlignRotated) else 4
        if box_lists[0].box_dim != box_dim:
            raise ValueError(
                f"{type(self.level_poolers[0]).__name__} pools boxes of {box_dim} numbers, got "
                f"{type(box_lists[0]).__name__}; rotated boxes need POOLER_TYPE 'ROIAlignRotated'."
            )
        rois = convert_boxes_to_pooler_format(box_lists)
        if len(self.level_poolers) == 1:
            return self.level_poolers[0](x[0], rois)
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        return self._pool_by_level(x, rois, levels)

    def _pool_by_level(self, x: list[torch.Tensor], rois: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        # Sorting by level makes the boxes of each level a slice, which synchronizes the device once instead
        # of once per level. Levels without boxes are pooled too: their feature maps stay in the autograd
        # graph, which DistributedDataParallel needs.
        order = torch.argsort(levels)
        counts = torch.bincount(levels, minlength=len(x)).tolist()
        slices = rois[order].split(counts)
        pooled = cat([pool(f, part) for pool, f, part in zip(self.level_poolers, x, slices)])
        return torch.empty_like(pooled).index_copy(0, order, pooled)


def feature_shapes(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """Return the shapes of the feature maps in `cfg.MODEL.ROI_HEADS.IN_FEATURES`, in that order.

    Raises:
        ValueError: there is no name, or the backbone has no feature map of a name.
    """
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    check_features(names, input_shape, "MODEL.ROI_HEADS.IN_FEATURES")
    return {name: input_shape[name] for name in names}


def pooler_from_config(
    cfg: CfgNode, key: str, input_shape: dict[str, ShapeSpec]
) -> tuple[ROIPooler | None, Any]:
    """Build the pooler of a head that pools its own features.

    Args:
        cfg: the full config; features are pooled from `cfg.MODEL.ROI_HEADS.IN_FEATURES`.
        key: name of the head's node below MODEL, such as "ROI_BOX_HEAD", with POOLER_RESOLUTION,
            POOLER_SAMPLING_RATIO and POOLER_TYPE.
        input_shape: shapes of the backbone's feature maps by name.

    Returns:
        The pooler, and the shape of the pooled features. Without POOLER_TYPE the pooler is None: the head
        takes the dict of feature maps, and the shape is a dict too.

    Raises:
        ValueError: the backbone lacks a feature map, channels differ, strides are not consecutive powers of
            2, or the pooler type is unknown.
    """
    node = cfg.MODEL[key]
    shapes = feature_shapes(cfg, input_shape)
    if not node.POOLER_TYPE:
        return None, shapes
    channels = {shape.channels for shape in shapes.values()}
    if len(channels) != 1:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES {list(shapes)} must have equal channels, got {sorted(channels)}."
        )
    resolution = node.POOLER_RESOLUTION
    keys = (f"MODEL.{key}.POOLER_TYPE", f"MODEL.{key}.POOLER_RESOLUTION", "MODEL.ROI_HEADS.IN_FEATURES")
    with config_keys(*keys):
        pooler = ROIPooler(
            output_size=resolution,
            scales=[1.0 / shape.stride for shape in shapes.values()],
            sampling_ratio=node.POOLER_SAMPLING_RATIO,
            pooler_type=node.POOLER_TYPE,
        )
    return pooler, ShapeSpec(channels=channels.pop(), height=resolution, width=resolution)
