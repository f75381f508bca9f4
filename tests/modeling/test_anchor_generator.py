"""Anchors, compared with a loop over every pixel."""

import numpy as np
import pytest
import torch

from detlib.config import get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling.anchor_generator import (
    BufferList,
    DefaultAnchorGenerator,
    build_anchor_generator,
)
from detlib.structures import Boxes


def slow_anchors(size, stride, sizes, ratios, offset):
    rows = []
    for y in range(size[0]):
        for x in range(size[1]):
            for s in sizes:
                for r in ratios:
                    w, h = s / np.sqrt(r), s * np.sqrt(r)
                    cx, cy = (x + offset) * stride, (y + offset) * stride
                    rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return np.array(rows)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_equal_a_loop_over_pixels(offset):
    sizes, ratios, strides = [[32, 50], [64, 100]], [[0.5, 1.0, 2.0], [1.0, 3.0, 0.3]], [8, 16]
    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset)
    maps = [torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 2, 1)]
    anchors = generator(maps)
    assert generator.num_anchors == generator.num_cell_anchors == [6, 6]
    for i, level in enumerate(anchors):
        assert isinstance(level, Boxes) and level.tensor.dtype == torch.float32
        want = slow_anchors(maps[i].shape[-2:], strides[i], sizes[i], ratios[i], offset)
        np.testing.assert_allclose(level.tensor.numpy(), want, atol=1e-4)


def test_cell_anchors_have_published_values():
    cells = DefaultAnchorGenerator(sizes=[32], aspect_ratios=[1.0], strides=[4]).generate_cell_anchors(
        (64,), (0.25, 1, 4)
    )
    assert cells.tolist() == [[-64, -16, 64, 16], [-32, -32, 32, 32], [-16, -64, 16, 64]]


@pytest.mark.parametrize("sizes", [[32, 64], [[32, 64]], [[32, 64]] * 3, ((32, 64),)])
def test_sizes_for_all_levels_are_repeated(sizes):
    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[1.0, 2.0], strides=[4, 8, 16])
    assert generator.num_anchors == [4, 4, 4]
    assert all(torch.equal(cell, generator.cell_anchors[0]) for cell in generator.cell_anchors)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ([[32], [64]], "SIZES has 2 lists for 3 feature levels"),
        ([], "SIZES must be a non-empty list"),
        ([[32], 64, 128], "either numbers or non-empty lists"),
        ([[32], [], [64]], "either numbers or non-empty lists"),
    ],
)
def test_sizes_that_do_not_fit_the_levels_raise(sizes, words):
    with pytest.raises(ValueError, match=words):
        DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[1.0], strides=[4, 8, 16])


def test_wrong_offset_or_number_of_feature_maps_raises():
    with pytest.raises(ValueError, match="OFFSET"):
        DefaultAnchorGenerator(sizes=[32], aspect_ratios=[1.0], strides=[4], offset=1.0)
    with pytest.raises(ValueError, match="ASPECT_RATIOS has 2 lists"):
        DefaultAnchorGenerator(sizes=[32], aspect_ratios=[[1.0], [2.0]], strides=[4, 8, 16])
    generator = DefaultAnchorGenerator(sizes=[32], aspect_ratios=[1.0], strides=[4, 8])
    with pytest.raises(ValueError, match="expected 2 feature levels, got 1"):
        generator([torch.zeros(1, 1, 2, 2)])


def test_cell_anchors_are_not_saved_and_move_with_the_module():
    generator = DefaultAnchorGenerator(sizes=[32], aspect_ratios=[1.0], strides=[4])
    assert not generator.state_dict() and not list(generator.parameters())
    assert generator.to("meta").cell_anchors[0].device.type == "meta"
    assert len(BufferList([torch.ones(1), torch.zeros(2)])) == 2


def test_config_values_reach_the_generator():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=4), ShapeSpec(stride=8)])
    first, second = generator([torch.zeros(1, 1, 1, 1)] * 2)
    assert first.tensor.tolist() == [[-14, -14, 18, 18]]
    assert second.tensor.tolist() == [[-28, -28, 36, 36]]
