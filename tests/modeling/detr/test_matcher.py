"""Tests of the matcher against costs in loops over pairs, and against a search of all assignments."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from detlib.modeling.detr import HungarianMatcher
from detlib.modeling.detr.matcher import Matches, flat_matches
from tests.modeling.detr.small_models import predictions, targets


def slow_cost(matcher, outputs, image, target):
    """Return the costs of one image, pair by pair: a list of Q rows of M costs."""
    table = []
    logits, boxes = outputs["pred_logits"][image].detach(), outputs["pred_boxes"][image].detach()
    for logit, box in zip(logits, boxes):
        row = []
        for label, gt in zip(target["labels"], target["boxes"]):
            if matcher.cost_class_type == "ce_cost":
                by_class = -logit.softmax(0)[label].item()
            else:
                p = 1 / (1 + math.exp(-logit[label].item()))
                a, g = matcher.alpha, matcher.gamma
                by_class = -a * (1 - p) ** g * math.log(p + 1e-8)
                by_class += (1 - a) * p**g * math.log(1 - p + 1e-8)
            distance = sum(abs(x - y) for x, y in zip(box.tolist(), gt.tolist()))
            corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, gt)]
            giou = generalized_box_iou(*corners).item()
            row.append(
                matcher.cost_class * by_class + matcher.cost_bbox * distance - matcher.cost_giou * giou
            )
        table.append(row)
    return table


@pytest.mark.parametrize("kind", ["focal_loss_cost", "ce_cost"])
def test_matches_have_minimal_cost(kind):
    matcher = HungarianMatcher(2.0, 5.0, 3.0, cost_class_type=kind, alpha=0.3, gamma=1.5)
    outputs, gt = predictions(num_logits=4), targets()
    cost = matcher.cost(outputs["pred_logits"][None], outputs["pred_boxes"][None], gt)
    found = matcher(outputs, gt)
    assert cost.shape == (1, 3, 6, 3) and len(found) == 3
    for i, target in enumerate(gt):
        table = slow_cost(matcher, outputs, i, target)
        count = len(target["labels"])
        torch.testing.assert_close(
            cost[0, i, :, :count].detach(), torch.tensor(table).reshape(6, count), rtol=1e-5, atol=1e-5
        )
        queries, objects = found[i]
        assert queries.dtype == objects.dtype == torch.int64 and len(queries) == len(objects) == count
        if count:
            best = min(
                itertools.permutations(range(6), count),
                key=lambda q: sum(table[a][b] for b, a in enumerate(q)),
            )
            assert dict(zip(objects.tolist(), queries.tolist())) == dict(enumerate(best))


def test_match_layers_equals_matching_each_layer():
    matcher = HungarianMatcher(2.0, 5.0, 2.0)
    gt = targets((4, 0, 2))
    as_one_class = [{**t, "labels": torch.zeros_like(t["labels"])} for t in gt]
    outputs = [predictions(seed=1), predictions(seed=2), predictions(num_queries=40, seed=3)]
    found = matcher.match_layers(outputs, [gt, gt, as_one_class])
    for layer, own, matches in zip(outputs, (gt, gt, as_one_class), found):
        assert torch.equal(matches.flat, matcher(layer, own).flat)
        for i, target in enumerate(own):
            table = slow_cost(matcher, layer, i, target)
            if table[0]:
                queries, objects = linear_sum_assignment(table)
                assert matches[i][0].tolist() == queries.tolist()
                assert matches[i][1].tolist() == objects.tolist()


def test_costs_of_all_layers_are_copied_to_the_host_once(monkeypatch):
    calls = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self.shape) or original(self))
    gt = targets((4, 0, 2))
    layers = [predictions(seed=s) for s in range(3)] + [predictions(num_queries=9)]
    HungarianMatcher().match_layers(layers, [gt] * 4)
    assert calls == [(3 * 3 * 6 * 4 + 3 * 9 * 4,)]


def test_flat_matches_count_objects_over_the_batch():
    gt = targets((2, 0, 3))
    pairs = [([4, 5], [1, 0]), ([], []), ([0, 1, 2], [2, 0, 1])]
    matches = Matches.on_device([pairs], [2, 0, 3], torch.device("cpu"))[0]
    assert [(q.tolist(), o.tolist()) for q, o in matches] == pairs
    want = [[0, 0, 2, 2, 2], [4, 5, 0, 1, 2], [1, 0, 4, 2, 3]]
    assert matches.flat.tolist() == want
    assert flat_matches(list(matches), gt).tolist() == want
    assert flat_matches(matches, gt) is matches.flat


def test_every_query_is_matched_if_objects_are_more():
    found = HungarianMatcher()(predictions(num_images=1, num_queries=2), targets((5,)))
    assert len(found[0][0]) == 2 and len(set(found[0][1].tolist())) == 2


def test_batch_without_objects_has_no_matches():
    found = HungarianMatcher()(predictions(), targets((0, 0, 0)))
    assert [len(q) for q, _ in found] == [0, 0, 0] and found.flat.shape == (3, 0)


def test_nan_predictions_are_matched():
    """A diverged model is reported by its loss, not by the matcher."""
    outputs = predictions()
    outputs["pred_boxes"] = outputs["pred_boxes"].detach().fill_(float("nan"))
    assert [len(q) for q, _ in HungarianMatcher()(outputs, targets())] == [3, 0, 1]


def test_half_precision_is_matched_in_float32():
    outputs, gt = predictions(), targets()
    half = {name: x.detach().bfloat16() for name, x in outputs.items()}
    single = {name: x.float() for name, x in half.items()}
    assert torch.equal(HungarianMatcher()(half, gt).flat, HungarianMatcher()(single, gt).flat)


def test_unknown_cost_type_and_zero_weights_are_rejected():
    with pytest.raises(
        ValueError, match="cost_class_type is 'focal'; legal are 'ce_cost', 'focal_loss_cost'"
    ):
        HungarianMatcher(cost_class_type="focal")
    with pytest.raises(ValueError, match="must not be 0"):
        HungarianMatcher(0, 0, 0)
