"""Rotated IoU and NMS against polygon clipping, detectron2 and manual cases."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detlib.ops import batched_nms, batched_nms_rotated, box_iou_rotated, nms_rotated
from detlib.ops.rotated import reference_box_iou_rotated, reference_nms_rotated
from tests.ops.cases import DTYPES, rotated_boxes_and_scores


@pytest.fixture(scope="module")
def stored():
    """Return boxes and results computed by detectron2."""
    with np.load(Path(__file__).with_name("rotated.npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def corners(box):
    x, y, width, height, angle = box
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [
        (
            x + i * width / 2 * cosine + j * height / 2 * sine,
            y - i * width / 2 * sine + j * height / 2 * cosine,
        )
        for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]


def area(polygon):
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, polygon[1:] + polygon[:1])) / 2


def clip(polygon, a, b):
    """Clip a polygon to the left of the line from a to b (Sutherland and Hodgman, 1974)."""

    def side(p):
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    kept = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1]):
        if side(p) >= 0:
            kept.append(p)
        if side(p) * side(q) < 0:
            t = side(p) / (side(p) - side(q))
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return kept


def slow_rotated_iou(first, second):
    """Compute the IoU by polygon clipping in Python floats."""
    polygon, other = corners(first), corners(second)
    for a, b in zip(other, other[1:] + other[:1]):
        polygon = clip(polygon, a, b)
    shared = area(polygon) if polygon else 0.0
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


def slow_rotated_ious(boxes1, boxes2):
    rows = [[slow_rotated_iou(a, b) for b in boxes2.double().tolist()] for a in boxes1.double().tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def slow_nms(boxes, scores, threshold, idxs=None):
    iou, scores = slow_rotated_ious(boxes, boxes).tolist(), scores.tolist()
    idxs = [0] * len(boxes) if idxs is None else idxs.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(idxs[i] != idxs[k] or iou[i][k] <= threshold for k in kept):
            kept.append(i)
    return kept


class TestIoU:
    def test_values_match_detectron2(self, stored):
        boxes = stored["boxes"]
        torch.testing.assert_close(box_iou_rotated(boxes, boxes[:20]), stored["iou"], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_polygon_clipping(self, dtype):
        boxes, _ = rotated_boxes_and_scores(61, dtype=dtype)
        got = box_iou_rotated(boxes[:40], boxes[21:])
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-7
        expected = slow_rotated_ious(boxes[:40], boxes[21:])
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=1e-6)
        assert (expected > 0).sum() > 500
        reference = reference_box_iou_rotated(boxes[:40].double(), boxes[21:].double())
        torch.testing.assert_close(reference, expected, atol=1e-12, rtol=1e-10)

    @pytest.mark.parametrize(
        "angles", [(0, 90), (90, 180), (45, 45), (45, -45), (30, 210), (0, 1e-7), (0, 1e-13)]
    )
    def test_right_angles_and_nearly_parallel_sides(self, angles):
        boxes, _ = rotated_boxes_and_scores(30, span=20, dtype=torch.float64)
        first, second = boxes[:15].clone(), boxes[15:].clone()
        first[:, 4], second[:, 4] = angles
        torch.testing.assert_close(
            box_iou_rotated(first, second), slow_rotated_ious(first, second), atol=1e-12, rtol=1e-9
        )

    def test_known_values(self):
        boxes = torch.tensor(
            [
                [0.5, 0.5, 1, 1, 0],
                [0.25, 0.5, 0.5, 1, 0],
                [0.5, 0.5, 1, 1, 45],
                [0.5, 0.5, 0.5, 0.5, 20],
                [5, 5, 4, 2, 0],
            ]
        )
        octagon = 2 * (math.sqrt(2) - 1)
        expected = [1, 0.5, octagon / (2 - octagon), 0.25, 0]
        assert box_iou_rotated(boxes[:1], boxes)[0].tolist() == pytest.approx(expected)
        turned = torch.tensor([[5.0, 5, 2, 4, 90], [5, 5, 2, 4, -90], [5, 5, 4, 2, 180], [5, 5, 4, 2, 3600]])
        assert box_iou_rotated(boxes[4:], turned)[0].tolist() == pytest.approx([1.0] * 4)

    def test_identical_boxes_have_iou_1(self):
        for scale in (1e-18, 1e-6, 1.0, 1e6, 1e15):
            boxes = rotated_boxes_and_scores(50)[0] * torch.tensor([scale, scale, scale, scale, 1])
            iou = box_iou_rotated(boxes, boxes).diagonal()
            assert torch.equal(iou, torch.ones(50))

    @pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 90.0, -123.4])
    def test_touching_boxes_have_zero_iou(self, angle):
        radians = math.radians(angle)
        x, y = 10 * math.cos(radians), -10 * math.sin(radians)
        boxes = torch.tensor(
            [[100, 100, 10, 6, angle], [100 + x, 100 + y, 10, 6, angle]], dtype=torch.float64
        )
        assert box_iou_rotated(boxes, boxes)[0, 1] < 1e-12
        half = boxes.clone()
        half[1, :2] = (boxes[0, :2] + boxes[1, :2]) / 2
        assert box_iou_rotated(half, half)[0, 1].item() == pytest.approx(1 / 3)

    def test_disjoint_boxes_of_detectron2_issue_1207_have_zero_iou(self):
        """Compare the boxes of the issue, simplified ones, and long boxes next to each other."""
        first = torch.tensor([[160.0, 153, 230, 23, -37], [3, 3, 8, 2, -45], [190, 122, 230, 21, -37]])
        second = torch.tensor([[190.0, 127, 80, 21, -46], [6, 0, 8, 2, -45], [160, 153, 230, 23, -37]])
        assert not box_iou_rotated(first, second).diagonal().any()
        assert not box_iou_rotated(second.double(), first.double()).diagonal().any()

    def test_separated_boxes_have_exactly_zero_iou(self):
        boxes, _ = rotated_boxes_and_scores(400, span=150)
        iou = box_iou_rotated(boxes, boxes)
        expected = slow_rotated_ious(boxes, boxes[:60])
        assert torch.equal(iou[:, :60] > 0, expected > 1e-12)

    def test_thin_boxes_and_large_coordinates(self):
        thin = torch.tensor(
            [[0.0, 0, 10000, 0.01, 30], [0, 0, 10000, 0.01, 30.0001], [3, 4, 0.02, 9000, 100]]
        )
        torch.testing.assert_close(
            box_iou_rotated(thin, thin).double(), slow_rotated_ious(thin, thin), atol=1e-6, rtol=1e-4
        )
        near, _ = rotated_boxes_and_scores(20, span=16)
        near[:, :4] = near[:, :4].round() * 4
        far = near + torch.tensor([2.0**22, -(2.0**23), 0, 0, 0])
        assert torch.equal(box_iou_rotated(far, far), box_iou_rotated(near, near))

    def test_boxes_that_overlap_nothing(self):
        good = torch.tensor([[10.0, 10, 8, 8, 20]])
        bad = torch.tensor([10.0, 10, 8, 8, 20]).repeat(9, 1)
        for row, (column, value) in enumerate(
            [
                (2, 0),
                (3, 0),
                (2, -8),
                (0, torch.nan),
                (1, torch.inf),
                (2, torch.inf),
                (3, torch.nan),
                (4, torch.nan),
            ]
        ):
            bad[row, column] = value
        bad[8, 2:4] = -8
        assert not box_iou_rotated(bad, good).any() and not box_iou_rotated(bad, bad).any()
        assert not reference_box_iou_rotated(bad, good).any()

    def test_empty_and_noncontiguous_inputs_and_mixed_dtypes(self):
        boxes, _ = rotated_boxes_and_scores(10)
        empty = boxes[:0]
        assert box_iou_rotated(empty, boxes).shape == (0, 10)
        assert box_iou_rotated(boxes, empty).shape == (10, 0)
        assert box_iou_rotated(empty, empty).shape == (0, 0)
        expected = box_iou_rotated(boxes, boxes[3:])
        assert torch.equal(box_iou_rotated(boxes.T.contiguous().T, boxes.repeat(1, 2)[3:, :5]), expected)
        mixed = box_iou_rotated(boxes, boxes[3:].double())
        assert mixed.dtype == torch.float64 and torch.equal(mixed.float(), expected)
        assert not box_iou_rotated(boxes.requires_grad_(), boxes).requires_grad

    def test_parallel_runs_are_deterministic(self):
        boxes, _ = rotated_boxes_and_scores(700, span=300)
        result = box_iou_rotated(boxes, boxes)
        assert torch.equal(result, torch.cat([box_iou_rotated(part, boxes) for part in boxes.split(7)]))
        torch.testing.assert_close(result, result.T)
        torch.testing.assert_close(result[:100], reference_box_iou_rotated(boxes[:100], boxes))

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"boxes1": torch.zeros(3, 4)}, r"boxes1 must have shape \(N, 5\), got \(3, 4\)"),
            ({"boxes2": torch.zeros(5)}, r"boxes2 must have shape \(M, 5\), got \(5,\)"),
            (
                {"boxes2": torch.zeros(3, 5, dtype=torch.int64)},
                "boxes2 must be floating point, got torch.int64",
            ),
            ({"boxes2": torch.zeros(3, 5, device="meta")}, "boxes2 is on meta, but boxes1 is on cpu"),
        ],
    )
    def test_wrong_arguments_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            box_iou_rotated(**({"boxes1": torch.zeros(3, 5), "boxes2": torch.zeros(2, 5)} | change))


class TestNMS:
    def test_values_match_detectron2(self, stored):
        boxes, scores = stored["boxes"], stored["scores"]
        assert torch.equal(nms_rotated(boxes, scores, 0.3), stored["nms_0.3"])
        assert torch.equal(nms_rotated(boxes, scores, 0.6), stored["nms_0.6"])
        assert torch.equal(batched_nms_rotated(boxes, scores, stored["idxs"], 0.4), stored["batched_nms_0.4"])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
    def test_matches_the_greedy_definition(self, dtype, threshold):
        boxes, scores = rotated_boxes_and_scores(80, dtype=dtype)
        expected = slow_nms(boxes, scores, threshold)
        assert nms_rotated(boxes, scores, threshold).tolist() == expected
        assert reference_nms_rotated(boxes, scores, None, threshold).tolist() == expected
        idxs = torch.arange(80) % 4 - 2
        expected = slow_nms(boxes, scores, threshold, idxs)
        for other in (idxs, idxs * 10**15, idxs.float()):
            assert batched_nms_rotated(boxes, scores, other, threshold).tolist() == expected
        assert reference_nms_rotated(boxes, scores, idxs, threshold).tolist() == expected

    def test_zero_angle_matches_axis_aligned_nms(self):
        boxes, scores = rotated_boxes_and_scores(600, span=130, dtype=torch.float64)
        boxes[:, 4] = 0
        axis_aligned = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
        idxs = torch.arange(600) % 3
        assert torch.equal(
            batched_nms_rotated(boxes, scores, idxs, 0.5), batched_nms(axis_aligned, scores, idxs, 0.5)
        )

    def test_equal_scores_noncontiguous_and_empty_inputs(self):
        boxes = torch.tensor([[1.0, 1, 2, 2, 0], [1, 0.5, 2, 1, 0], [9, 9, 1, 1, 0], [1, 1, 2, 2, 90]])
        scores = torch.ones(4)
        assert nms_rotated(boxes, scores, 0.5).tolist() == [0, 1, 2]  # the IoU of 0 and 1 is 0.5
        assert nms_rotated(boxes, scores, 0.49).tolist() == [0, 2]
        assert nms_rotated(boxes.T.contiguous().T, scores.double(), 0.49).tolist() == [0, 2]
        kept = nms_rotated(boxes[:0], scores[:0], 0.5)
        assert kept.shape == (0,) and kept.dtype == torch.int64
        assert batched_nms_rotated(boxes[:0], scores[:0], scores[:0], 0.5).shape == (0,)

    def test_boxes_without_area_overlap_nothing(self):
        boxes = torch.tensor([[1.0, 1, 0, 4, 0], [1, 1, 0, 4, 0], [1, 1, 3, 3, 0], [1, 1, torch.nan, 3, 0]])
        assert nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.0).tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"boxes": torch.zeros(3, 4)}, r"boxes must have shape \(N, 5\), got \(3, 4\)"),
            (
                {"boxes": torch.zeros(3, 5, dtype=torch.int64)},
                "boxes must be floating point, got torch.int64",
            ),
            ({"scores": torch.zeros(2)}, "scores must have one entry per entry of boxes, got 2 and 3"),
            ({"scores": torch.zeros(3, device="meta")}, "scores is on meta, but boxes is on cpu"),
            ({"idxs": torch.zeros(4)}, "idxs must have one entry per entry of boxes, got 4 and 3"),
            ({"iou_threshold": -0.1}, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ],
    )
    def test_wrong_arguments_are_named(self, change, message):
        arguments = {
            "boxes": torch.zeros(3, 5),
            "scores": torch.zeros(3),
            "idxs": torch.zeros(3),
            "iou_threshold": 0.5,
        }
        with pytest.raises(ValueError, match=message):
            batched_nms_rotated(**(arguments | change))


def test_exported_graph_contains_the_operators():
    boxes, scores = rotated_boxes_and_scores(20)

    class Select(torch.nn.Module):
        def forward(self, boxes, scores):
            return box_iou_rotated(boxes[nms_rotated(boxes, scores, 0.4)], boxes)

    exported = torch.export.export(Select(), (boxes, scores))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"detlib.nms_rotated.default", "detlib.box_iou_rotated.default"} <= targets
    assert torch.equal(exported.module()(boxes, scores), Select()(boxes, scores))


def test_autocast_does_not_change_results():
    boxes, scores = rotated_boxes_and_scores(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        iou, kept = box_iou_rotated(boxes, boxes), nms_rotated(boxes, scores, 0.3)
    assert torch.equal(iou, box_iou_rotated(boxes, boxes)) and torch.equal(
        kept, nms_rotated(boxes, scores, 0.3)
    )
