"""FastRCNNOutputLayers: losses compared with loops, inference compared with a slow NMS."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detlib.config import get_cfg
from detlib.engine import checks
from detlib.layers import ShapeSpec
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detlib.structures import Boxes, Instances
from detlib.utils.events import EventStorage
from tests.builders import random_boxes, slow_iou

NUM_CLASSES = 5
BBOX_PRED = ("bbox_pred.weight", "bbox_pred.bias")
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def make_layers(**kwargs) -> FastRCNNOutputLayers:
    args = {"box2box_transform": Box2BoxTransform(WEIGHTS), "num_classes": NUM_CLASSES}
    return FastRCNNOutputLayers(ShapeSpec(channels=6), **(args | kwargs))


def labeled_proposals(counts=(7, 4), empty_last=False) -> list[Instances]:
    proposals = []
    for i, count in enumerate(counts):
        p = Instances((100, 110), proposal_boxes=Boxes(random_boxes(count, seed=2 * i)))
        p.gt_classes = torch.randint(0, NUM_CLASSES + 1, (count,))
        p.gt_classes[:2] = torch.tensor([1, NUM_CLASSES])
        if empty_last and i == len(counts) - 1:
            p.gt_classes[:] = NUM_CLASSES
        else:
            p.gt_boxes = Boxes(random_boxes(count, seed=2 * i + 1))
        proposals.append(p)
    return proposals


def slow_inference(boxes, scores, shape, score_thresh, nms_thresh, topk):
    """Return (row, class, score, box) of each detection, in descending score order."""
    height, width = shape
    found = []
    for row, (row_boxes, row_scores) in enumerate(zip(boxes.numpy(), scores.numpy())):
        if not (np.isfinite(row_boxes).all() and np.isfinite(row_scores).all()):
            continue
        row_boxes = row_boxes.reshape(-1, 4)
        for c, score in enumerate(row_scores[:-1]):
            box = row_boxes[c if len(row_boxes) > 1 else 0]
            box = box.clip(0, np.array([width, height, width, height], box.dtype))
            if score > score_thresh:
                found.append((row, c, float(score), box))
    found.sort(key=lambda x: -x[2])
    kept = []
    for x in found:
        if all(x[1] != y[1] or slow_iou(x[3], y[3]) <= nms_thresh for y in kept):
            kept.append(x)
    return kept[:topk] if topk >= 0 else kept


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("topk", [-1, 10, 10_000])
def test_inference_equals_slow_nms(agnostic, topk):
    torch.manual_seed(0)
    boxes = (
        random_boxes(60 * (1 if agnostic else NUM_CLASSES), min_side=5, max_side=45).reshape(60, -1) * 1.4
        - 15
    )
    boxes[1::2] = boxes[::2] + torch.randn(30, boxes.shape[1])
    scores = torch.randn(60, NUM_CLASSES + 1).mul(2).softmax(dim=1)
    boxes[3, 1], scores[8, 2], scores[9, -1] = math.nan, math.inf, math.nan
    keep_boxes = boxes.clone()

    (got,), (rows,) = fast_rcnn_inference([boxes], [scores], [(80, 100)], 0.1, 0.5, topk)
    want = slow_inference(boxes, scores, (80, 100), 0.1, 0.5, topk)
    assert 10 <= len(want) < 150 and got.image_size == (80, 100)
    assert rows.tolist() == [x[0] for x in want]
    assert got.pred_classes.tolist() == [x[1] for x in want]
    assert got.scores.tolist() == [x[2] for x in want]
    torch.testing.assert_close(got.pred_boxes.tensor, torch.tensor(np.stack([x[3] for x in want])))
    torch.testing.assert_close(boxes, keep_boxes, equal_nan=True)


def test_inference_score_on_the_threshold_is_dropped():
    scores = torch.tensor([[0.5, 0.5], [0.5001, 0.4]])
    (got,), _ = fast_rcnn_inference([random_boxes(2)], [scores], [(200, 200)], 0.5, 0.5, 10)
    assert got.scores.tolist() == scores[1:, 0].tolist()


def test_inference_without_regions_gives_no_detections():
    (got,), (rows,) = fast_rcnn_inference(
        [torch.zeros(0, 8)], [torch.zeros(0, 3)], [(20, 30)], 0.05, 0.5, 100
    )
    assert len(got) == len(rows) == 0
    assert got.pred_boxes.tensor.shape == (0, 4) and got.pred_classes.dtype == torch.int64


def test_layers_inference_applies_deltas_and_softmax():
    torch.manual_seed(1)
    layers = make_layers(test_score_thresh=0.15, test_nms_thresh=0.6, test_topk_per_image=12)
    proposals = labeled_proposals((20, 15))
    logits, deltas = torch.randn(35, NUM_CLASSES + 1) * 2, torch.randn(35, NUM_CLASSES * 4)
    results, rows = layers.inference((logits, deltas), proposals)
    start = 0
    for p, result, result_rows in zip(proposals, results, rows):
        part = slice(start, start + len(p))
        start += len(p)
        x0, y0, x1, y1 = p.proposal_boxes.tensor.unbind(dim=1)
        w, h = x1 - x0, y1 - y0
        d = deltas[part].reshape(-1, NUM_CLASSES, 4)
        cx = (x0 + w / 2)[:, None] + d[..., 0] / 10 * w[:, None]
        cy = (y0 + h / 2)[:, None] + d[..., 1] / 10 * h[:, None]
        bw, bh = w[:, None] * torch.exp(d[..., 2] / 5), h[:, None] * torch.exp(d[..., 3] / 5)
        boxes = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], dim=2).flatten(1)
        want = slow_inference(boxes, logits[part].softmax(1), p.image_size, 0.15, 0.6, 12)
        assert result_rows.tolist() == [x[0] for x in want]
        assert result.pred_classes.tolist() == [x[1] for x in want]
        torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor(np.stack([x[3] for x in want])))


def slow_deltas(src, dst):
    w, h = src[2] - src[0], src[3] - src[1]
    gw, gh = dst[2] - dst[0], dst[3] - dst[1]
    return torch.stack(
        [
            10 * ((dst[0] + gw / 2) - (src[0] + w / 2)) / w,
            10 * ((dst[1] + gh / 2) - (src[1] + h / 2)) / h,
            5 * torch.log(gw / w),
            5 * torch.log(gh / h),
        ]
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_equal_the_formulas(agnostic, beta):
    torch.manual_seed(2)
    layers = make_layers(
        cls_agnostic_bbox_reg=agnostic, smooth_l1_beta=beta, loss_weight={"loss_box_reg": 2.0}
    )
    proposals = labeled_proposals((7, 4, 3), empty_last=True)
    logits = torch.randn(14, NUM_CLASSES + 1)
    deltas = torch.randn(14, 4 if agnostic else 4 * NUM_CLASSES)
    with EventStorage() as storage:
        losses = layers.losses((logits, deltas), proposals)

    classes = torch.cat([p.gt_classes for p in proposals])
    src = torch.cat([p.proposal_boxes.tensor for p in proposals])
    dst = torch.cat([p.gt_boxes.tensor if p.has("gt_boxes") else p.proposal_boxes.tensor for p in proposals])
    cls, box = 0.0, 0.0
    for i, c in enumerate(classes.tolist()):
        cls -= logits[i].log_softmax(0)[c]
        if c < NUM_CLASSES:
            mine = deltas[i] if agnostic else deltas[i, 4 * c : 4 * c + 4]
            diff = (mine - slow_deltas(src[i], dst[i])).abs()
            box += sum(0.5 * x * x / beta if x < beta else x - beta / 2 for x in diff)
    torch.testing.assert_close(losses["loss_cls"], cls / 14)
    torch.testing.assert_close(losses["loss_box_reg"], 2 * box / 14)

    scalars = {k: v[0] for k, v in storage.latest().items()}
    predicted = logits.argmax(dim=1)
    foreground = classes < NUM_CLASSES
    assert scalars["fast_rcnn/cls_accuracy"] == pytest.approx((predicted == classes).float().mean().item())
    right = (predicted == classes)[foreground].float().mean().item()
    assert scalars["fast_rcnn/fg_cls_accuracy"] == pytest.approx(right)
    missed = (predicted == NUM_CLASSES)[foreground].float().mean().item()
    assert scalars["fast_rcnn/false_negative"] == pytest.approx(missed)


@pytest.mark.parametrize(
    "kind, reference",
    [
        ("giou", generalized_box_iou_loss),
        ("diou", distance_box_iou_loss),
        ("ciou", complete_box_iou_loss),
    ],
)
def test_iou_losses_equal_torchvision(kind, reference):
    torch.manual_seed(3)
    layers = make_layers(box_reg_loss_type=kind)
    proposals = labeled_proposals()
    predictions = torch.randn(11, NUM_CLASSES + 1), torch.randn(11, 4 * NUM_CLASSES) * 0.1
    with EventStorage():
        loss = layers.losses(predictions, proposals)["loss_box_reg"]
    classes = torch.cat([p.gt_classes for p in proposals])
    boxes = torch.cat(layers.predict_boxes_for_gt_classes(predictions, proposals))
    foreground = classes < NUM_CLASSES
    gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
    want = reference(boxes[foreground], gt_boxes[foreground], reduction="sum") / 11
    torch.testing.assert_close(loss, want)


def test_boxes_of_ground_truth_classes_are_selected():
    torch.manual_seed(4)
    layers = make_layers()
    proposals = labeled_proposals()
    predictions = torch.zeros(11, NUM_CLASSES + 1), torch.randn(11, 4 * NUM_CLASSES)
    every = torch.cat(layers.predict_boxes(predictions, proposals))
    chosen = layers.predict_boxes_for_gt_classes(predictions, proposals)
    assert [len(x) for x in chosen] == [7, 4]
    for i, c in enumerate(torch.cat([p.gt_classes for p in proposals]).clamp(max=NUM_CLASSES - 1).tolist()):
        assert torch.equal(torch.cat(chosen)[i], every[i, 4 * c : 4 * c + 4])


def test_sigmoid_loss_and_probabilities_equal_the_formulas():
    torch.manual_seed(5)
    layers = make_layers(use_sigmoid_ce=True)
    proposals = labeled_proposals()
    predictions = torch.randn(11, NUM_CLASSES + 1), torch.zeros(11, 4 * NUM_CLASSES)
    with EventStorage():
        loss = layers.losses(predictions, proposals)["loss_cls"]
    want = 0.0
    for row, c in zip(predictions[0], torch.cat([p.gt_classes for p in proposals]).tolist()):
        for k in range(NUM_CLASSES):
            p = torch.sigmoid(row[k])
            want -= torch.log(p if k == c else 1 - p)
    torch.testing.assert_close(loss, want / 11)
    torch.testing.assert_close(
        torch.cat(layers.predict_probs(predictions, proposals)), predictions[0].sigmoid()
    )


def test_federated_loss_uses_the_selected_classes_only():
    torch.manual_seed(6)
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    layers = make_layers(
        use_sigmoid_ce=True, use_fed_loss=True, get_fed_loss_cls_weights=weights, fed_loss_num_classes=3
    )
    assert "fed_loss_cls_weights" not in layers.state_dict()
    gt_classes = torch.tensor([2, NUM_CLASSES, 2])
    chosen = layers.get_fed_loss_classes(gt_classes, 3, NUM_CLASSES, weights)
    assert sorted(chosen.tolist()) in ([1, 2, 5], [2, 3, 5])  # the classes present, and one sampled by weight
    assert sorted(layers.get_fed_loss_classes(gt_classes, 1, NUM_CLASSES, weights).tolist()) == [2, 5]
    assert sorted(layers.get_fed_loss_classes(gt_classes, 50, NUM_CLASSES, weights).tolist()) == [1, 2, 3, 5]

    logits = torch.randn(3, NUM_CLASSES + 1)
    got = layers.sigmoid_cross_entropy_loss(logits, gt_classes).item()
    wants = []
    for drawn in (1, 3):
        target = F.one_hot(gt_classes, NUM_CLASSES + 1).float()
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        wants.append(loss[:, [2, drawn]].sum().item() / 3)
    assert min(abs(got - w) for w in wants) < 1e-5


def test_federated_loss_without_weights_raises():
    with pytest.raises(ValueError, match="use_sigmoid_ce"):
        make_layers(use_fed_loss=True, get_fed_loss_cls_weights=torch.ones(NUM_CLASSES))
    with pytest.raises(ValueError, match="get_fed_loss_cls_weights.*got none"):
        make_layers(use_fed_loss=True, use_sigmoid_ce=True)
    with pytest.raises(ValueError, match=r"5 classes.*\(7,\)"):
        make_layers(use_fed_loss=True, use_sigmoid_ce=True, get_fed_loss_cls_weights=torch.ones(7))
    layers = make_layers(
        use_fed_loss=True, use_sigmoid_ce=True, get_fed_loss_cls_weights=lambda: torch.ones(7)
    )
    with pytest.raises(ValueError, match=r"5 classes.*\(7,\)"):
        layers.sigmoid_cross_entropy_loss(torch.zeros(1, 6), torch.tensor([2]))


def test_federated_loss_from_config_gets_weights_of_the_datasets(monkeypatch):
    calls = []

    def weights(dataset_names, freq_weight_power=1.0):
        calls.append((tuple(dataset_names), freq_weight_power))
        return torch.tensor([4.0, 0, 9, 0, 0]) ** freq_weight_power

    monkeypatch.setattr(checks, "get_fed_loss_cls_weights", weights)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("a", "b")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    head = cfg.MODEL.ROI_BOX_HEAD
    head.USE_FED_LOSS, head.USE_SIGMOID_CE = True, True
    head.FED_LOSS_NUM_CLASSES, head.FED_LOSS_FREQ_WEIGHT_POWER = 3, 0.25
    with torch.device("meta"):
        FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))
    layers = FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))
    layers.eval()(torch.zeros(2, 6))
    logits, gt_classes = torch.randn(3, NUM_CLASSES + 1), torch.tensor([1, NUM_CLASSES, 1])
    with pytest.raises(ValueError, match="USE_FED_LOSS.* provide_fed_loss_cls_weights"):
        layers.sigmoid_cross_entropy_loss(logits, gt_classes)
    checks.set_class_weights(cfg, torch.nn.Sequential(layers))
    assert not calls  # inference does not need the datasets
    got = [layers.sigmoid_cross_entropy_loss(logits, gt_classes).item() for _ in range(2)]
    assert calls == [(("a", "b"), 0.25)]
    torch.testing.assert_close(layers.fed_loss_cls_weights, torch.tensor([4.0, 0, 9, 0, 0]) ** 0.25)
    assert not layers.state_dict().keys() - {"cls_score.weight", "cls_score.bias", *BBOX_PRED}
    target = F.one_hot(gt_classes, NUM_CLASSES + 1).float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wants = [loss[:, [1, drawn]].sum().item() / 3 for drawn in (0, 2)]  # the class present, and a sampled one
    assert all(min(abs(value - want) for want in wants) < 1e-5 for value in got)

    head.USE_SIGMOID_CE = False
    with pytest.raises(ValueError, match="USE_FED_LOSS and USE_SIGMOID_CE"):
        FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("num_images", [0, 2])
def test_losses_without_regions_are_zero_and_require_grad(sigmoid, num_images):
    layers = make_layers(use_sigmoid_ce=sigmoid)
    proposals = [
        Instances(
            (9, 9), proposal_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64)
        )
        for _ in range(num_images)
    ]
    with EventStorage():
        losses = layers.losses(layers(torch.zeros(0, 6)), proposals)
    assert [v.item() for v in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layers.parameters())


def test_box_loss_without_foreground_is_zero():
    layers = make_layers()
    proposals = labeled_proposals((6,), empty_last=True)
    with EventStorage() as storage:
        losses = layers.losses(layers(torch.randn(6, 6)), proposals)
    assert losses["loss_box_reg"].item() == 0 and losses["loss_cls"].item() > 0
    assert "fast_rcnn/fg_cls_accuracy" not in storage.latest()
    sum(losses.values()).backward()
    assert not layers.bbox_pred.weight.grad.any()


def test_layers_have_published_names_and_initial_values():
    layers = FastRCNNOutputLayers(
        ShapeSpec(channels=8, height=3, width=2), box2box_transform=Box2BoxTransform(WEIGHTS), num_classes=3
    )
    assert {k: tuple(v.shape) for k, v in layers.state_dict().items()} == {
        "cls_score.weight": (4, 48),
        "cls_score.bias": (4,),
        "bbox_pred.weight": (12, 48),
        "bbox_pred.bias": (12,),
    }
    logits, deltas = layers(torch.randn(5, 8, 3, 2))
    assert logits.shape == (5, 4) and deltas.shape == (5, 12)
    big = FastRCNNOutputLayers(1000, box2box_transform=Box2BoxTransform(WEIGHTS), num_classes=80)
    assert big.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert big.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not big.cls_score.bias.any() and not big.bbox_pred.bias.any()


def test_unknown_loss_type_raises():
    with pytest.raises(ValueError, match="'l2'.*'giou'"):
        make_layers(box_reg_loss_type="l2")
