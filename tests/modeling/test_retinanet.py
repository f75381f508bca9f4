"""RetinaNet: labels, losses and detections compared with loops, its head and its errors."""

import logging
import math

import pytest
import torch
from torch import nn

from detlib.layers import CycleBatchNormList, ShapeSpec
from detlib.modeling import RetinaNet, build_model
from detlib.modeling.anchor_generator import DefaultAnchorGenerator
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.matcher import Matcher
from detlib.modeling.meta_arch.retinanet import RetinaNetHead
from detlib.structures import Boxes, Instances, pairwise_iou
from detlib.utils.events import EventStorage
from tests.builders import (
    NUM_CLASSES,
    RETINANET,
    TinyFPN,
    ground_truth,
    overfits_training_batch,
    random_image,
    slow_giou_loss,
    small_config,
    training_batch,
)

K = NUM_CLASSES


def small_retinanet(**overrides) -> RetinaNet:
    torch.manual_seed(0)
    keys = {f"MODEL__RETINANET__{key}": value for key, value in overrides.items()}
    return build_model(small_config(RETINANET, **keys))


@pytest.fixture(scope="module")
def model():
    return small_retinanet()


@pytest.fixture(scope="module")
def anchors(model):
    """Return the anchors of a 64 x 128 image: five levels, the last of one pixel."""
    return model.anchor_generator([torch.zeros(1, 1, max(1, 8 >> i), max(1, 16 >> i)) for i in range(5)])


def predictions(anchors, num_images=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(num_images, len(a), K, generator=g) for a in anchors]
    deltas = [0.3 * torch.randn(num_images, len(a), 4, generator=g) for a in anchors]
    return logits, deltas


def test_labels_equal_a_loop_over_anchors(model, anchors):
    gt = [ground_truth(boxes=((8, 8, 40, 40), (30, 20, 90, 60), (100, 50, 104, 54))), ground_truth(boxes=())]
    labels, boxes = model.label_anchors(anchors, gt)
    iou = pairwise_iou(gt[0].gt_boxes, Boxes.cat(anchors))
    best = iou.max(dim=1).values
    for i, (label, box) in enumerate(zip(labels[0].tolist(), boxes[0])):
        j = int(iou[:, i].argmax())
        forced = any(iou[m, i] == best[m] for m in range(3))  # every object has an anchor
        if iou[j, i] >= 0.5 or forced:
            assert label == gt[0].gt_classes[j] and torch.equal(box, gt[0].gt_boxes.tensor[j])
        else:
            assert label == (K if iou[j, i] < 0.4 else -1)
    assert {-1, 0, 1, 2, K} == set(labels[0].tolist())
    assert set(labels[1].tolist()) == {K} and boxes[1].shape == boxes[0].shape


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_losses_equal_the_formulas(anchors, loss_type):
    model = small_retinanet(BBOX_REG_LOSS_TYPE=loss_type, SMOOTH_L1_LOSS_BETA=0.1)
    logits, deltas = predictions(anchors)
    labels, boxes = model.label_anchors(anchors, [ground_truth(), ground_truth(boxes=((50, 10, 80, 40),))])
    with EventStorage() as storage:
        losses = model.losses(anchors, logits, labels, deltas, boxes)
    all_logits, all_deltas = torch.cat(logits, 1), torch.cat(deltas, 1)
    all_anchors = Boxes.cat(anchors).tensor
    loss_cls = loss_box = num_fg = 0
    for i in range(2):
        for r, label in enumerate(labels[i].tolist()):
            if label < 0:
                continue
            for k, x in enumerate(all_logits[i, r].tolist()):
                p = 1 / (1 + math.exp(-x if k == label else x))
                loss_cls -= (0.25 if k == label else 0.75) * (1 - p) ** 2 * math.log(p)
            if label < K:
                num_fg += 1
                if loss_type == "giou":
                    box = model.box2box_transform.apply_deltas(all_deltas[i, r][None], all_anchors[r][None])
                    loss_box += slow_giou_loss(box[0].tolist(), boxes[i][r].tolist())
                else:
                    want = model.box2box_transform.get_deltas(all_anchors[r][None], boxes[i][r][None])[0]
                    errors = (all_deltas[i, r] - want).abs().tolist()
                    loss_box += sum(e * e / 0.2 if e < 0.1 else e - 0.05 for e in errors)
    normalizer = 0.9 * 100 + 0.1 * num_fg
    assert model.loss_normalizer == pytest.approx(normalizer)
    assert storage.latest()["num_pos_anchors"][0] == num_fg / 2
    assert losses["loss_cls"].item() == pytest.approx(loss_cls / normalizer, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(loss_box / normalizer, rel=1e-5)
    # Without foreground anchors the normalizer is updated as if there were one.
    model.losses(anchors, logits, [torch.full_like(x, K) for x in labels], deltas, boxes)
    assert model.loss_normalizer == pytest.approx(0.9 * normalizer + 0.1)


def slow_detections(model, anchors, scores, deltas, threshold, topk, nms_thresh, limit):
    """Return rows of (box, class, score) for one image, in descending score order."""
    found = []
    for a, s, d in zip(anchors, scores, deltas):
        level = [(s[r, k].item(), r, k) for r in range(len(a)) for k in range(K) if s[r, k] > threshold]
        for score, r, k in sorted(level, reverse=True)[:topk]:
            box = model.box2box_transform.apply_deltas(d[r][None], a.tensor[r][None])
            found.append((score, k, box))
    kept = []
    for score, k, box in sorted(found, key=lambda x: -x[0]):
        overlaps = [pairwise_iou(Boxes(box), Boxes(b)).item() for _, c, b in kept if c == k]
        if all(x <= nms_thresh for x in overlaps):
            kept.append((score, k, box))
    return [(*box[0].tolist(), k, score) for score, k, box in kept[:limit]]


def rows(detections: Instances) -> torch.Tensor:
    columns = (detections.pred_boxes.tensor, detections.pred_classes[:, None], detections.scores[:, None])
    return torch.cat(columns, dim=1)


def test_detections_equal_a_loop(anchors):
    model = small_retinanet(SCORE_THRESH_TEST=0.7, TOPK_CANDIDATES_TEST=40, NMS_THRESH_TEST=0.3).eval()
    logits, deltas = predictions(anchors)
    maps = [
        [
            x.view(2, h, w, -1).permute(0, 3, 1, 2)
            for x, (h, w) in zip(p, [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)])
        ]
        for p in (logits, deltas)
    ]
    images = model.preprocess_image([{"image": random_image(64, 96)}, {"image": random_image(56, 128)}])
    results = model.forward_inference(images, maps[0], maps)
    for i, result in enumerate(results):
        scores = [x[i].sigmoid() for x in logits]
        want = slow_detections(model, anchors, scores, [d[i] for d in deltas], 0.7, 40, 0.3, 20)
        assert 5 < len(want) and result.image_size == images.image_sizes[i]
        torch.testing.assert_close(rows(result), torch.tensor(want))
        single = model.inference_single_image(anchors, scores, [d[i] for d in deltas], result.image_size)
        torch.testing.assert_close(rows(single), rows(result))


def test_detections_of_an_image_do_not_depend_on_its_batch():
    model = small_retinanet(SCORE_THRESH_TEST=0.0).eval()
    items = [{"image": random_image(64, 128, seed=seed)} for seed in range(2)]
    with torch.no_grad():
        together = model(items)
        for item, output in zip(items, together):
            alone = model([item])[0]["instances"]
            assert len(alone) == 20
            torch.testing.assert_close(rows(alone), rows(output["instances"]), rtol=1e-4, atol=1e-4)


def test_overfits_a_batch():
    torch.manual_seed(0)
    model = RetinaNet(
        backbone=TinyFPN(),
        head=RetinaNetHead(
            input_shape=[ShapeSpec(channels=16)] * 3, num_classes=K, num_anchors=2, conv_dims=[32], norm="GN"
        ),
        head_in_features=["p3", "p4", "p5"],
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[16.0], [32.0], [64.0]], aspect_ratios=[0.6, 1.2], strides=[8, 16, 32]
        ),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=K,
        test_score_thresh=0.3,
        pixel_mean=[110.0] * 3,
        pixel_std=[57.0] * 3,
    )
    assert overfits_training_batch(model, num_steps=80)


SHAPES = [ShapeSpec(channels=8), ShapeSpec(channels=8)]


def head(**kwargs):
    return RetinaNetHead(
        **{"input_shape": SHAPES, "num_classes": K, "num_anchors": 2, "conv_dims": [32, 16]} | kwargs
    )


def test_head_has_published_names_and_outputs():
    net = head(prior_prob=0.02)
    logits, deltas = net([torch.zeros(1, 8, 4, 6), torch.zeros(1, 8, 2, 3)])
    assert [tuple(x.shape) for x in logits] == [(1, 6, 4, 6), (1, 6, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(1, 8, 4, 6), (1, 8, 2, 3)]
    torch.testing.assert_close(logits[0].sigmoid(), torch.full((1, 6, 4, 6), 0.02))
    assert not deltas[0].any()
    stds = [p.std().item() for name, p in net.named_parameters() if name.endswith("weight")]
    assert len(stds) == 6 and all(0.008 < std < 0.012 for std in stds)
    assert set(dict(head(conv_dims=[]).named_parameters())) == {
        "cls_score.weight", "cls_score.bias", "bbox_pred.weight", "bbox_pred.bias",
    }  # fmt: skip


def test_batch_norms_of_the_head_are_separate_per_level(caplog):
    assert [type(m) for m in head(norm="GN", conv_dims=[32, 64]).cls_subnet] == [
        nn.Conv2d,
        nn.GroupNorm,
        nn.ReLU,
    ] * 2
    with caplog.at_level(logging.INFO, "detlib"):
        net = head(norm="BN")
    assert "separate statistics for each of 2 levels" in caplog.text
    assert {k: tuple(v.shape) for k, v in net.state_dict().items() if k.startswith("bbox_subnet.4")} == {
        "bbox_subnet.4.weight": (16,),
        "bbox_subnet.4.bias": (16,),
    } | {
        f"bbox_subnet.4.{level}.{name}": shape
        for level in range(2)
        for name, shape in [("running_mean", (16,)), ("running_var", (16,)), ("num_batches_tracked", ())]
    }
    features = [torch.randn(2, 8, 4, 6), 5 + torch.randn(2, 8, 2, 3)]
    net.train()(features)
    norm = net.cls_subnet[1]
    assert isinstance(norm, CycleBatchNormList)
    for x, level in zip(features, norm):
        torch.testing.assert_close(level.running_mean, 0.1 * net.cls_subnet[0](x).mean(dim=(0, 2, 3)))
    assert all(isinstance(m, nn.SyncBatchNorm) for m in head(norm="SyncBN").cls_subnet[1])
    caplog.clear()
    shared = head(norm="FrozenBN")
    assert "one FrozenBN shared by all levels mixes their statistics" in caplog.text
    assert "cls_subnet.1.running_var" in shared.state_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"IN_FEATURES": ["p3", "q4"]}, r"MODEL.RETINANET.IN_FEATURES is \['p3', 'q4'\]; .*'p4'"),
        ({"IN_FEATURES": ["p3", "p4"]}, "MODEL.ANCHOR_GENERATOR.SIZES"),
        ({"NORM": "XN"}, "MODEL.RETINANET.NORM: .*XN"),
        ({"PRIOR_PROB": 1.0}, r"MODEL.RETINANET.PRIOR_PROB\) must be in \(0, 1\)"),
        ({"BBOX_REG_LOSS_TYPE": "gious"}, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE.*'gious'.*Did you mean 'giou'"),
        ({"IOU_THRESHOLDS": [0.5, 0.4]}, "MODEL.RETINANET.IOU_THRESHOLDS.*must be above 0 and in ascending"),
        ({"BBOX_REG_WEIGHTS": (1.0, 1.0)}, "MODEL.RETINANET.BBOX_REG_WEIGHTS"),
    ],
)
def test_wrong_configs_raise_with_their_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_retinanet(**overrides)


def test_anchors_that_do_not_fit_the_head_raise():
    sizes = [[32.0]] * 4 + [[32.0, 64.0]]
    with pytest.raises(ValueError, match=r"MODEL.ANCHOR_GENERATOR\) must be the same .* \[3, 3, 3, 3, 6\]"):
        build_model(small_config(RETINANET, MODEL__ANCHOR_GENERATOR__SIZES=sizes))
    with pytest.raises(ValueError, match="channels .* must be the same on each"):
        head(input_shape=[ShapeSpec(channels=8), ShapeSpec(channels=4)])
    with pytest.raises(ValueError, match="built for 2 levels, got 1 feature maps"):
        head()([torch.zeros(1, 8, 4, 4)])
    model = small_retinanet()
    model.head = head(input_shape=[ShapeSpec(channels=32)] * 5)
    with pytest.raises(ValueError, match="num_anchors must be the anchor generator's"):
        model(training_batch())


def test_labels_out_of_range_raise():
    batch = training_batch()
    batch[0]["instances"].gt_classes[0] = K
    with pytest.raises(ValueError, match=r"'gt_classes' of item 0 .*MODEL.RETINANET.NUM_CLASSES"):
        small_retinanet()(batch)


class OneByOne(RetinaNet):
    """Records the arguments of `inference_single_image`."""

    def inference_single_image(self, anchors, box_cls, box_delta, image_size):
        self.given = [*getattr(self, "given", []), (box_cls, image_size)]
        return super().inference_single_image(anchors, box_cls, box_delta, image_size)


def test_methods_overridden_by_a_subclass_are_used():
    model = small_retinanet(SCORE_THRESH_TEST=0.0).eval()
    items = [{"image": random_image(64, 128)}, {"image": random_image(48, 128, seed=1)}]
    with torch.no_grad():
        want = model(items)
        model.__class__ = OneByOne
        got = model(items)
    assert [size for _, size in model.given] == [(64, 128), (48, 128)]
    assert all(x.dim() == 2 and 0 < x.min() < x.max() < 1 for x in model.given[0][0])
    for a, b in zip(got, want):
        assert len(a["instances"]) == 20
        torch.testing.assert_close(rows(a["instances"]), rows(b["instances"]))
