"""Keypoints and heatmaps against slow formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from detlib.structures import Keypoints, heatmaps_to_keypoints


def test_indexing_cat_and_len():
    keypoints = Keypoints([[[1, 2, 2], [3, 4, 0]], [[5, 6, 1], [7, 8, 2]]])
    assert keypoints.tensor.shape == (2, 2, 3) and keypoints.tensor.dtype == torch.float32
    assert keypoints[0].tensor.tolist() == [[[1, 2, 2], [3, 4, 0]]]
    assert keypoints[torch.tensor([False, True])].tensor[0, 0].tolist() == [5, 6, 1]
    assert len(Keypoints.cat([keypoints, keypoints[1]])) == 3
    assert len(list(keypoints)) == 2 and len(keypoints.to("cpu")) == 2
    with pytest.raises(ValueError, match=r"\(N, K, 3\), got \(2, 2\)"):
        Keypoints(torch.zeros(2, 2))


def test_to_heatmap_matches_slow_formula():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(6, 5, 3, generator=generator) * torch.tensor([60.0, 60.0, 3.0])
    points[..., 2].floor_()
    boxes = torch.tensor([[5.0, 10.0, 50.0, 40.0]]).repeat(6, 1) + torch.arange(6.0)[:, None]
    points[0, 0] = torch.tensor([50.0, 40.0, 2.0])  # the far corner belongs to the last cell
    points[1, 0] = torch.tensor([51.5, 20.0, 2.0])  # just outside
    cells, valid = Keypoints(points).to_heatmap(boxes, 14)
    for n in range(6):
        x0, y0, x1, y1 = boxes[n].tolist()
        for k in range(5):
            x, y, visibility = points[n, k].tolist()
            column = 13 if x == x1 else math.floor((x - x0) * 14 / (x1 - x0))
            row = 13 if y == y1 else math.floor((y - y0) * 14 / (y1 - y0))
            inside = 0 <= column < 14 and 0 <= row < 14 and visibility > 0
            assert valid[n, k] == int(inside)
            assert cells[n, k] == (row * 14 + column if inside else 0)
    assert valid[0, 0] == 1 and cells[0, 0] == 14 * 14 - 1 and valid[1, 0] == 0
    with pytest.raises(ValueError, match="1 boxes and 6 objects"):
        Keypoints(points).to_heatmap(boxes[:1], 14)


def test_heatmaps_to_keypoints_matches_slow_formula():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, 4, 7, 7, generator=generator) * 3
    rois = torch.tensor([[2.0, 3.0, 30.4, 20.7], [0.0, 0.0, 5.0, 9.0], [10.0, 10.0, 10.2, 10.1]])
    result = heatmaps_to_keypoints(maps, rois)
    assert result.shape == (3, 4, 4)
    for r in range(3):
        x0, y0, x1, y1 = rois[r].tolist()
        width, height = max(x1 - x0, 1), max(y1 - y0, 1)
        columns, rows = math.ceil(width - 1e-6), math.ceil(height - 1e-6)
        enlarged = F.interpolate(maps[r][None], size=(rows, columns), mode="bicubic", align_corners=False)[0]
        for k in range(4):
            best = enlarged[k].argmax().item()
            row, column = divmod(best, columns)
            logit = enlarged[k, row, column].item()
            probability = math.exp(logit) / maps[r, k].double().exp().sum().item()
            expected = [
                x0 + (column + 0.5) * width / columns,
                y0 + (row + 0.5) * height / rows,
                logit,
                probability,
            ]
            assert result[r, k].tolist() == pytest.approx(expected, rel=1e-4)


def test_heatmaps_to_keypoints_finds_the_peak_and_accepts_no_objects():
    maps = torch.full((1, 1, 8, 8), -5.0)
    maps[0, 0, 2, 6] = 10.0
    x, y, _, probability = heatmaps_to_keypoints(maps, torch.tensor([[100.0, 200.0, 180.0, 280.0]]))[
        0, 0
    ].tolist()
    assert abs(x - 165) <= 1 and abs(y - 225) <= 1 and probability > 0.8
    assert heatmaps_to_keypoints(torch.zeros(0, 3, 8, 8), torch.zeros(0, 4)).shape == (0, 3, 4)


def enlarged_one_by_one(maps, rois):
    """Compute `heatmaps_to_keypoints` with torch's bicubic interpolation, one object at a time."""
    out = torch.zeros(*maps.shape[:2], 4)
    for r, (x0, y0, x1, y1) in enumerate(rois.tolist()):
        size = torch.tensor([max(x1 - x0, 1), max(y1 - y0, 1)])
        width, height = (math.ceil(v) for v in size.tolist())
        for k in range(maps.shape[1]):
            large = F.interpolate(maps[r, k][None, None], size=(height, width), mode="bicubic")[0, 0]
            row, column = divmod(large.argmax().item(), width)
            place = (torch.tensor([column, row]) + 0.5) * size / torch.tensor([width, height])
            out[r, k, :2] = place + rois[r, :2]
            out[r, k, 2] = large.max()
            out[r, k, 3] = 1 / (maps[r, k] - large.max()).exp().sum()
    return out


@pytest.mark.parametrize("max_pixels", [1, 20_000, 10**9])
def test_heatmaps_to_keypoints_does_not_depend_on_group_size(monkeypatch, max_pixels):
    monkeypatch.setattr("detlib.structures.keypoints._MAX_PIXELS_CPU", max_pixels)
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(30, 3, 9, 9, generator=generator) * 2
    corner = torch.rand(30, 2, generator=generator) * 50
    rois = torch.cat([corner, corner + 70 * torch.rand(30, 2, generator=generator) ** 2], dim=1)
    want = enlarged_one_by_one(maps, rois)
    torch.testing.assert_close(heatmaps_to_keypoints(maps, rois), want, rtol=1e-4, atol=1e-4)


def test_heatmaps_to_keypoints_is_exact_under_autocast():
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(5, 3, 14, 14, generator=generator).to(torch.bfloat16)
    rois = torch.tensor([[10.0, 20, 310, 420]]).repeat(5, 1)
    want = enlarged_one_by_one(maps.float(), rois)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = heatmaps_to_keypoints(maps, rois)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)
    result = heatmaps_to_keypoints(maps.double(), rois)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result.float(), want, rtol=1e-4, atol=1e-4)
