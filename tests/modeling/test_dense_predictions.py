"""Selection and decoding of dense predictions, compared with loops."""

import pytest
import torch

from detlib.modeling.anchor_generator import check_rows, same_on_all_levels
from detlib.modeling.box_regression import Box2BoxTransform, dense_box_regression_loss
from detlib.modeling.meta_arch.dense_detector import (
    Candidates,
    best_candidates,
    candidates_from_logits,
    candidates_from_scores,
    decode_candidates,
    detections_per_image,
    permute_to_N_HWA_K,
)
from detlib.modeling.proposal_generator.proposal_utils import decode_top_predictions, top_per_level
from detlib.structures import Boxes
from tests.builders import random_boxes

TRANSFORM = Box2BoxTransform((1, 1, 1, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_permutation_keeps_the_order_of_anchors(memory_format):
    n, a, k, h, w = 2, 3, 4, 5, 6
    x = torch.arange(n * a * k * h * w).view(n, a * k, h, w).to(memory_format=memory_format)
    out = permute_to_N_HWA_K(x, k)
    assert out.shape == (n, h * w * a, k)
    for i, y, xx, j, c in [(0, 0, 0, 0, 0), (1, 4, 5, 2, 3), (1, 2, 3, 1, 2), (0, 3, 1, 2, 0)]:
        assert out[i, (y * w + xx) * a + j, c] == x[i, j * k + c, y, xx]


@pytest.mark.parametrize("shape", [(2, 7, 3, 3), (2, 8, 3)])
def test_permutation_of_wrong_shape_raises(shape):
    with pytest.raises(ValueError, match=r"\(N, A\*4, H, W\)"):
        permute_to_N_HWA_K(torch.zeros(shape), 4)


def test_top_predictions_are_selected_per_level():
    scores = [torch.tensor([[1.0, 5.0, 3.0], [9.0, 8.0, 7.0]]), torch.tensor([[2.0], [4.0]])]
    top, indices, levels = top_per_level(scores, 2)
    assert top.tolist() == [[5, 3, 2], [9, 8, 4]]
    assert [i.tolist() for i in indices] == [[[1, 2], [0, 1]], [[0], [0]]]
    assert levels.tolist() == [0, 0, 1] and levels.dtype == torch.int64


def test_decoding_selected_boxes_equals_selecting_decoded_boxes():
    g = torch.Generator().manual_seed(0)
    anchors = [Boxes(random_boxes(40, seed=1)), Boxes(random_boxes(9, seed=2))]
    scores = [torch.randn(2, len(a), generator=g) for a in anchors]
    deltas = [torch.randn(2, len(a), 4, generator=g) for a in anchors]
    boxes, top, levels = decode_top_predictions(anchors, scores, deltas, TRANSFORM, 12)
    assert boxes.shape == (2, 21, 4) and levels.tolist() == [0] * 12 + [1] * 9
    for i in range(2):
        want_boxes, want_scores = [], []
        for a, s, d in zip(anchors, scores, deltas):
            decoded = TRANSFORM.apply_deltas(d[i], a.tensor)
            order = sorted(range(len(a)), key=lambda j: -s[i, j].item())[:12]  # noqa: B023
            want_boxes += decoded[order].tolist()
            want_scores += s[i, order].tolist()
        torch.testing.assert_close(boxes[i], torch.tensor(want_boxes))
        torch.testing.assert_close(top[i], torch.tensor(want_scores))


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_dense_box_loss_equals_a_loop(loss_type):
    g = torch.Generator().manual_seed(0)
    anchors, gt = Boxes(random_boxes(30, seed=1)), [random_boxes(30, seed=s) for s in (2, 3)]
    pred = [torch.randn(2, 20, 4, generator=g), torch.randn(2, 10, 4, generator=g)]
    fg = [(0, 3), (1, 0), (1, 25), (0, 29)]
    loss = dense_box_regression_loss(
        anchors, TRANSFORM, pred, gt, tuple(torch.tensor(fg).unbind(1)), loss_type, 0.1
    )
    want = 0.0
    for image, i in fg:
        d = pred[0][image, i] if i < 20 else pred[1][image, i - 20]
        if loss_type == "smooth_l1":
            diff = (d - TRANSFORM.get_deltas(anchors.tensor[i : i + 1], gt[image][i : i + 1])[0]).abs()
            want += sum(x * x / 0.2 if x < 0.1 else x - 0.05 for x in diff.tolist())
        else:
            p, t = (
                TRANSFORM.apply_deltas(d[None], anchors.tensor[i : i + 1])[0].tolist(),
                gt[image][i].tolist(),
            )
            inter = max(min(p[2], t[2]) - max(p[0], t[0]), 0) * max(min(p[3], t[3]) - max(p[1], t[1]), 0)
            union = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - inter
            hull = (max(p[2], t[2]) - min(p[0], t[0])) * (max(p[3], t[3]) - min(p[1], t[1]))
            want += 1 - inter / union + (hull - union) / hull
    assert loss.item() == pytest.approx(want, rel=1e-4)


def rows_of(candidates):
    """Return {(image, row, class): score}."""
    keys = zip(*(x.tolist() for x in candidates[:3]))
    return dict(zip(keys, candidates.scores.tolist(), strict=True))


@pytest.mark.parametrize("with_quality", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.0, -1.0, 1.0])
def test_candidates_equal_all_scores_above_the_threshold(threshold, with_quality):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 30, 3, generator=g)
    quality = torch.randn(2, 30, 1, generator=g) if with_quality else None
    scores = logits.sigmoid() if quality is None else (logits.sigmoid() * quality.sigmoid()).sqrt()
    found = candidates_from_logits(logits, threshold, quality)
    assert found.images.tolist() == sorted(found.images.tolist())
    have = {key: score for key, score in rows_of(found).items() if score > threshold}
    want = rows_of(candidates_from_scores(scores, threshold))
    assert have.keys() == want.keys() and len(want) == (scores > threshold).sum()
    assert all(have[key] == pytest.approx(want[key], rel=1e-6) for key in want)
    if threshold == 0.9:
        assert len(found.scores) < (60 if with_quality else 30)  # of 180; the others were not scored


def test_candidates_of_half_precision_are_scored_in_float32():
    logits = torch.linspace(-4, 4, 800, dtype=torch.bfloat16).view(1, 100, 8)
    found = rows_of(candidates_from_logits(logits, 0.05))
    exact = logits.float().sigmoid()
    want = {tuple(key): exact[tuple(key)].item() for key in (exact > 0.05).nonzero().tolist()}
    assert {key: s for key, s in found.items() if s > 0.05} == pytest.approx(want, rel=1e-6)


def test_best_candidates_are_selected_per_image():
    scores = torch.tensor([[[0.5], [0.9], [0.7], [0.6]], [[0.2], [0.1], [0.3], [0.0]]])
    found = best_candidates(candidates_from_scores(scores, 0.0), 2)
    assert rows_of(found) == pytest.approx(
        {(0, 1, 0): 0.9, (0, 2, 0): 0.7, (1, 2, 0): 0.3, (1, 0, 0): 0.2}, abs=1e-6
    )
    second_alone = candidates_from_scores(scores * torch.tensor([0.0, 1.0]).view(2, 1, 1), 0.0)
    assert rows_of(best_candidates(second_alone, 2)).keys() == {(1, 2, 0), (1, 0, 0)}


def test_decoded_candidates_equal_a_loop():
    g = torch.Generator().manual_seed(0)
    anchors = [Boxes(random_boxes(20, seed=1)), Boxes(random_boxes(6, seed=2))]
    deltas = [torch.randn(2, len(a), 4, generator=g) for a in anchors]
    deltas[1][0, 3, 2] = float("nan")
    scores = [torch.rand(2, len(a), 3, generator=g) for a in anchors]
    levels = [candidates_from_scores(s, 0.5) for s in scores]
    boxes, images, classes, chosen = decode_candidates(anchors, deltas, levels, TRANSFORM, 0.6)
    want = [
        (*TRANSFORM.apply_deltas(d[i, r][None], a.tensor[r][None])[0].tolist(), i, k, s[i, r, k].item())
        for a, d, s in zip(anchors, deltas, scores)
        for i in range(2)
        for r in range(len(a))
        for k in range(3)
        if s[i, r, k] > 0.6 and d[i, r].isfinite().all()
    ]
    have = torch.cat((boxes, torch.stack((images.float(), classes.float(), chosen), dim=1)), dim=1)
    torch.testing.assert_close(have, torch.tensor(want))


def test_nms_does_not_mix_images_or_classes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, 10, 10], [50, 0, 60, 10], [0, 0, 10, 10]])
    images, classes = torch.tensor([0, 0, 2, 0, 0]), torch.tensor([1, 1, 1, 1, 0])
    scores = torch.tensor([0.5, 0.6, 0.1, 0.7, 0.9])
    sizes = [(20, 70), (5, 5), (30, 30)]

    def detect(limit):
        return detections_per_image(boxes, images, classes, scores, sizes, Boxes, 0.5, limit)

    results = detect(-1)
    assert [r.image_size for r in results] == sizes
    assert results[0].scores.tolist() == pytest.approx([0.9, 0.7, 0.6])  # 0.5 overlaps 0.6 of its class
    assert results[0].pred_classes.tolist() == [0, 1, 1]
    assert results[0].pred_boxes.tensor.tolist() == boxes[[4, 3, 1]].tolist()
    assert len(results[1]) == 0 and results[2].scores.tolist() == pytest.approx([0.1])
    assert detect(2)[0].scores.tolist() == pytest.approx([0.9, 0.7])


def test_images_without_candidates_have_no_detections():
    none = candidates_from_scores(torch.zeros(2, 5, 3), 0.5)
    assert isinstance(none, Candidates) and len(none.scores) == 0
    found = decode_candidates(
        [Boxes(random_boxes(5, seed=0))], [torch.zeros(2, 5, 4)], [none], TRANSFORM, 0.5
    )
    results = detections_per_image(*found, [(9, 9)] * 2, Boxes, 0.5, 10)
    assert [len(r) for r in results] == [0, 0] and results[0].pred_boxes.tensor.shape == (0, 4)


def test_mismatched_levels_raise():
    assert same_on_all_levels([3, 3], "channels") == 3
    with pytest.raises(ValueError, match=r"channels must be the same on each; got \[3, 4\]"):
        same_on_all_levels([3, 4], "channels")
    check_rows([Boxes(random_boxes(5, seed=0))], [torch.zeros(1, 5, 2)], "change the head")
    with pytest.raises(ValueError, match=r"\[6\] anchors per level, but there are \[5\]: change the head"):
        check_rows([Boxes(random_boxes(5, seed=0))], [torch.zeros(1, 6, 2)], "change the head")
