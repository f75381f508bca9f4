"""FCOS: assignment of points to boxes, losses and detections, each compared with loops."""

import math

import pytest
import torch

from detlib.layers import ShapeSpec
from detlib.modeling.meta_arch import fcos
from detlib.modeling.meta_arch.fcos import FCOS, FCOSHead
from detlib.structures import Boxes, Instances, pairwise_iou
from detlib.utils.events import EventStorage
from tests.builders import (
    NUM_CLASSES,
    TinyFPN,
    overfits_training_batch,
    random_image,
    slow_giou_loss,
    small_fcos,
)

K = NUM_CLASSES
STRIDES = (8, 16, 32, 64, 128)
# Sizes of the feature maps of a 128 x 256 image.
MAPS = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]


@pytest.fixture(scope="module")
def model():
    return small_fcos()


@pytest.fixture(scope="module")
def anchors(model):
    return model.anchor_generator([torch.zeros(1, 1, h, w) for h, w in MAPS])


def objects(num, seed=0, height=128, width=256) -> Instances:
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.rand(num, 2, generator=g) * math.log(20)) * 10
    corner = torch.rand(num, 2, generator=g) * torch.tensor([width, height]) - size / 2
    boxes = Boxes(torch.cat((corner, corner + size), dim=1))
    boxes.clip((height, width))
    return Instances((height, width), gt_boxes=boxes, gt_classes=torch.arange(num) % K)


def points():
    """Return (x, y, stride) of every point, level by level."""
    return [
        ((i + 0.5) * s, (j + 0.5) * s, s)
        for s, (h, w) in zip(STRIDES, MAPS)
        for j in range(h)
        for i in range(w)
    ]


def slow_match(x, y, stride, boxes, radius):
    """Return the index of the box that a point is assigned to, or None."""
    low = 0 if stride == STRIDES[0] else 4 * stride
    high = math.inf if stride == STRIDES[-1] else 8 * stride
    found = []
    for m, (x0, y0, x1, y1) in enumerate(boxes):
        sides = (x - x0, y - y0, x1 - x, y1 - y)
        off_center = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
        if min(sides) > 0 and low < max(sides) < high and off_center < radius * stride:
            found.append(((x1 - x0) * (y1 - y0), m))
    return min(found)[1] if found else None


@pytest.mark.parametrize("radius", [1.5, 0.5])
@pytest.mark.parametrize("max_pairs", [None, 2000])
def test_labels_equal_a_loop_over_points(anchors, radius, max_pairs, monkeypatch):
    if max_pairs:
        monkeypatch.setattr(fcos, "_MAX_PAIRS", max_pairs)  # two boxes per chunk
    model = small_fcos(center_sampling_radius=radius)
    gt = [objects(60), objects(0), objects(7, seed=1)]
    labels, boxes = model.label_anchors(anchors, gt)
    for image, image_labels, image_boxes in zip(gt, labels, boxes):
        gt_boxes, num_fg = image.gt_boxes.tensor.tolist(), 0
        for r, (x, y, stride) in enumerate(points()):
            m = slow_match(x, y, stride, gt_boxes, radius)
            if m is None:
                assert image_labels[r] == K
            else:
                num_fg += 1
                assert image_labels[r] == image.gt_classes[m] and image_boxes[r].tolist() == gt_boxes[m]
        assert num_fg > 5 or len(image) == 0
        assert image_labels.shape == (len(points()),) and image_boxes.shape == (len(points()), 4)


def test_point_in_several_boxes_gets_the_smallest(anchors):
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 99.99], [0, 0, 100, 99.995]])
    gt = Instances((128, 256), gt_boxes=Boxes(boxes), gt_classes=torch.arange(3))
    labels, _ = small_fcos().label_anchors(anchors, [gt])
    assert set(labels[0].tolist()) == {1, K}


def slow_centerness(x, y, box):
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    if min(left, top, right, bottom) <= 0:
        return 0.0
    return math.sqrt(
        min(left, right) / max(left, right) * (min(top, bottom) / max(top, bottom)),
    )


def test_centerness_equals_the_formula(model, anchors):
    boxes = [
        b.tensor.repeat(len(points()), 1)[: len(points())]
        for b in (objects(50).gt_boxes, objects(3).gt_boxes)
    ]
    targets = model.compute_ctrness_targets(anchors, boxes)
    want = [[slow_centerness(x, y, b) for (x, y, _), b in zip(points(), image.tolist())] for image in boxes]
    torch.testing.assert_close(targets, torch.tensor(want), rtol=1e-4, atol=1e-5)
    assert (targets > 0).sum() > 50


def predictions(anchors, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        [s * torch.randn(2, len(a), n, generator=g) + s for a in anchors] for s, n in ((1, K), (2, 4), (1, 1))
    ]


def test_losses_equal_the_formulas(anchors):
    model = small_fcos(focal_loss_alpha=0.4, focal_loss_gamma=1.0)
    logits, deltas, centerness = predictions(anchors)
    labels, boxes = model.label_anchors(anchors, [objects(20), objects(5, seed=1)])
    with EventStorage() as storage:
        losses = model.losses(anchors, logits, labels, deltas, boxes, centerness)
    loss_cls = loss_loc = loss_ctr = num_fg = 0
    flat = [torch.cat(x, dim=1).tolist() for x in (logits, deltas, centerness)]
    for i in range(2):
        for r, (x, y, s) in enumerate(points()):
            label, box = labels[i][r].item(), boxes[i][r].tolist()
            for k, logit in enumerate(flat[0][i][r]):
                p = 1 / (1 + math.exp(-logit if k == label else logit))
                loss_cls -= (0.4 if k == label else 0.6) * (1 - p) * math.log(p)
            if label == K:
                continue
            num_fg += 1
            left, top, right, bottom = (s * max(d, 0) for d in flat[1][i][r])
            loss_loc += slow_giou_loss((x - left, y - top, x + right, y + bottom), box)
            target, p = slow_centerness(x, y, box), 1 / (1 + math.exp(-flat[2][i][r][0]))
            loss_ctr -= target * math.log(p) + (1 - target) * math.log(1 - p)
    normalizer = 0.9 * 300 + 0.1 * num_fg
    assert storage.latest()["num_pos_anchors"][0] == num_fg / 2 > 10
    assert {name: x.item() for name, x in losses.items()} == pytest.approx(
        {
            "loss_fcos_cls": loss_cls / normalizer,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        },
        rel=1e-4,
    )


def rows(detections: Instances) -> torch.Tensor:
    columns = (detections.pred_boxes.tensor, detections.pred_classes[:, None], detections.scores[:, None])
    return torch.cat(columns, dim=1)


def test_detections_equal_a_loop(anchors):
    model = small_fcos(
        test_score_thresh=0.75, test_topk_candidates=50, test_nms_thresh=0.3, max_detections_per_image=25
    ).eval()
    flat = predictions(anchors)
    maps = [[x.view(2, h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(p, MAPS)] for p in flat]
    images = model.preprocess_image([{"image": random_image(128, 256)}, {"image": random_image(96, 200)}])
    results = model.forward_inference(images, maps[0], maps)
    for i, result in enumerate(results):
        scores = [(a[i].sigmoid() * c[i].sigmoid()).sqrt() for a, c in zip(flat[0], flat[2])]
        found = []
        for a, s, d in zip(anchors, scores, flat[1]):
            level = [(s[r, k].item(), r, k) for r, k in (s > 0.75).nonzero().tolist()]
            for score, r, k in sorted(level, reverse=True)[:50]:
                (x0, y0, x1, y1), sides = a.tensor[r].tolist(), [max(v, 0) for v in d[i, r].tolist()]
                x, y, side = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0
                box = (x - side * sides[0], y - side * sides[1], x + side * sides[2], y + side * sides[3])
                found.append((score, k, box))
        kept = []
        for score, k, box in sorted(found, reverse=True):
            same = [Boxes(torch.tensor([b])) for _, c, b in kept if c == k]
            if all(pairwise_iou(Boxes(torch.tensor([box])), b) <= 0.3 for b in same):
                kept.append((score, k, box))
        want = torch.tensor([(*box, k, score) for score, k, box in kept[:25]])
        assert len(want) == 25 and result.image_size == images.image_sizes[i]
        torch.testing.assert_close(rows(result), want)
        single = model.inference_single_image(anchors, scores, [d[i] for d in flat[1]], result.image_size)
        torch.testing.assert_close(rows(single), want)


def test_head_has_published_names_and_outputs():
    shapes = [ShapeSpec(channels=8)] * 2
    head = FCOSHead(input_shape=shapes, num_classes=K, conv_dims=[32], norm="GN", prior_prob=0.05)
    out = head([torch.randn(1, 8, 4, 6), torch.randn(1, 8, 2, 3)])
    assert [[tuple(x.shape[1:]) for x in levels] for levels in out] == [
        [(n, 4, 6), (n, 2, 3)] for n in (K, 4, 1)
    ]
    assert [name for name, _ in head.named_children()] == [
        "cls_subnet", "bbox_subnet", "cls_score", "bbox_pred", "ctrness",
    ]  # fmt: skip
    assert not head.ctrness.bias.any() and 0.005 < head.ctrness.weight.std() < 0.015
    with pytest.raises(ValueError, match="built for 2 levels, got 1 feature maps"):
        head([torch.zeros(1, 8, 4, 4)])


def test_head_uses_all_features_by_default():
    model = small_fcos(head_in_features=None)
    assert model.head_in_features == ["p3", "p4", "p5", "p6", "p7"]
    assert model.anchor_generator.strides == list(STRIDES)


def test_overfits_a_batch():
    torch.manual_seed(0)
    head = FCOSHead(input_shape=[ShapeSpec(channels=16)] * 3, num_classes=K, conv_dims=[32], norm="GN")
    model = small_fcos(backbone=TinyFPN(), head=head, head_in_features=None, test_score_thresh=0.3)
    assert overfits_training_batch(model, num_steps=60)


class OneByOne(FCOS):
    """Overrides the detections of one image and the centerness."""

    def inference_single_image(self, anchors, box_cls, box_delta, image_size):
        self.given = [*getattr(self, "given", []), image_size]
        return super().inference_single_image(anchors, box_cls, box_delta, image_size)

    def compute_ctrness_targets(self, anchors, gt_boxes):
        return torch.full_like(super().compute_ctrness_targets(anchors, gt_boxes), 0.25)


def test_methods_overridden_by_a_subclass_are_used(anchors):
    model = small_fcos(test_score_thresh=0.75).eval()
    flat = predictions(anchors)
    maps = [[x.view(2, h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(p, MAPS)] for p in flat]
    images = model.preprocess_image([{"image": random_image(128, 256)}, {"image": random_image(96, 200)}])
    want = model.forward_inference(images, maps[0], maps)
    model.__class__ = OneByOne
    for a, b in zip(model.forward_inference(images, maps[0], maps), want):
        assert len(a) > 20
        torch.testing.assert_close(rows(a), rows(b))
    assert model.given == [(128, 256), (96, 200)]

    labels, boxes = model.label_anchors(anchors, [objects(50), objects(3)])
    losses = model.losses(anchors, flat[0], labels, flat[1], boxes, flat[2])
    logits = torch.cat(flat[2], dim=1)[..., 0][torch.stack(labels) != K]
    total = -(0.25 * logits.sigmoid().log() + 0.75 * (-logits).sigmoid().log()).sum()
    normalizer = 0.9 * 300 + 0.1 * len(logits)
    torch.testing.assert_close(losses["loss_fcos_ctr"], total / normalizer)
