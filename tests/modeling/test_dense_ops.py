"""The dense-prediction toolkit against loops."""

import pytest
import torch

from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.dense_ops import (
    decode_top_predictions,
    dense_box_regression_loss,
    permute_to_N_HWA_K,
    top_per_level,
)
from detlib.structures import Boxes

TRANSFORM = Box2BoxTransform((1, 1, 1, 1))


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 60
    return Boxes(torch.cat((corner, corner + 5 + torch.rand(n, 2, generator=g) * 60), dim=1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_permute(memory_format):
    n, a, k, h, w = 2, 3, 4, 5, 6
    x = torch.arange(n * a * k * h * w).view(n, a * k, h, w).to(memory_format=memory_format)
    out = permute_to_N_HWA_K(x, k)
    assert out.shape == (n, h * w * a, k)
    for i, y, xx, j, c in [(0, 0, 0, 0, 0), (1, 4, 5, 2, 3), (1, 2, 3, 1, 2), (0, 3, 1, 2, 0)]:
        assert out[i, (y * w + xx) * a + j, c] == x[i, j * k + c, y, xx]


@pytest.mark.parametrize("shape", [(2, 7, 3, 3), (2, 8, 3)])
def test_permute_errors(shape):
    with pytest.raises(ValueError, match=r"\(N, A\*4, H, W\)"):
        permute_to_N_HWA_K(torch.zeros(shape), 4)


def test_top_per_level():
    scores = [torch.tensor([[1.0, 5.0, 3.0], [9.0, 8.0, 7.0]]), torch.tensor([[2.0], [4.0]])]
    top, indices, levels = top_per_level(scores, 2)
    assert top.tolist() == [[5, 3, 2], [9, 8, 4]]
    assert [i.tolist() for i in indices] == [[[1, 2], [0, 1]], [[0], [0]]]
    assert levels.tolist() == [0, 0, 1] and levels.dtype == torch.int64


def test_decode_top_is_the_top_of_all_decoded():
    g = torch.Generator().manual_seed(0)
    anchors = [random_boxes(40, 1), random_boxes(9, 2)]
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
def test_dense_box_loss(loss_type):
    g = torch.Generator().manual_seed(0)
    anchors, gt = random_boxes(30, 1), [random_boxes(30, s).tensor for s in (2, 3)]
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
