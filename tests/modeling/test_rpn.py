"""RPN and its proposals, compared with slow formulas."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from detlib.config import get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling.anchor_generator import DefaultAnchorGenerator
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.matcher import Matcher
from detlib.modeling.proposal_generator import (
    RPN,
    StandardRPNHead,
    build_proposal_generator,
    build_rpn_head,
)
from detlib.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detlib.structures import Boxes, ImageList, Instances
from detlib.utils.events import EventStorage

SIZES = [(60, 64), (48, 50)]


def build_rpn(**kwargs):
    torch.manual_seed(0)
    rpn = RPN(
        **{
            "in_features": ["p3", "p4"],
            "head": StandardRPNHead(in_channels=8, num_anchors=3),
            "anchor_generator": DefaultAnchorGenerator(
                sizes=[[16], [32]], aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16], offset=0.0
            ),
            "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
            "batch_size_per_image": 40,
            "positive_fraction": 0.5,
            "pre_nms_topk": (100, 20),
            "post_nms_topk": (50, 10),
            **kwargs,
        }
    )
    for p in rpn.parameters():
        nn.init.normal_(p, std=0.2)
    return rpn


def batch():
    g = torch.Generator().manual_seed(1)
    features = {"p3": torch.randn(2, 8, 8, 8, generator=g), "p4": torch.randn(2, 8, 4, 4, generator=g)}
    targets = []
    for i, size in enumerate(SIZES):
        inst = Instances(size)
        inst.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 28.0], [20.0, 20.0, 47.0, 40.0]]) + i)
        targets.append(inst)
    return ImageList(torch.zeros(2, 3, 64, 64), SIZES), features, targets


def flat_predictions(rpn, features):
    """Return the (R,) logits, (R, 4) deltas and (R, 4) anchors of all levels for each image, by loops."""
    maps = [features[f] for f in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    anchors = torch.cat([a.tensor for a in rpn.anchor_generator(maps)])
    out = []
    for i in range(2):
        flat_logits, flat_deltas = [], []
        for lo, de in zip(logits, deltas):
            for y in range(lo.shape[2]):
                for x in range(lo.shape[3]):
                    for a in range(3):
                        flat_logits.append(lo[i, a, y, x])
                        flat_deltas.append(de[i, 4 * a : 4 * a + 4, y, x])
        out.append((torch.stack(flat_logits), torch.stack(flat_deltas)))
    return out, anchors


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"smooth_l1_beta": 0.2, "loss_weight": {"loss_rpn_loc": 3.0}},
        {"box_reg_loss_type": "giou", "loss_weight": 0.5},
        {"anchor_boundary_thresh": 0.0},
    ],
)
def test_losses_equal_the_formulas(kwargs):
    """All anchors are sampled, so the losses are deterministic."""
    rpn = build_rpn(batch_size_per_image=2000, **kwargs).train()
    images, features, targets = batch()
    with EventStorage() as storage:
        _, losses = rpn(images, features, targets)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    cls, loc, num_fg, num_bg = 0.0, 0.0, 0, 0
    predictions, anchors = flat_predictions(rpn, features)
    for (logits, deltas), target, (height, width) in zip(predictions, targets, SIZES):
        gt = target.gt_boxes.tensor
        iou = torchvision.ops.box_iou(gt, anchors)
        best, match = iou.max(0)
        fg = (best >= 0.7) | (iou == iou.max(1, keepdim=True).values).any(0)
        bg = (best < 0.3) & ~fg
        if "anchor_boundary_thresh" in kwargs:
            inside = (anchors >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
            fg, bg = fg & inside, bg & inside
        num_fg, num_bg = num_fg + fg.sum().item(), num_bg + bg.sum().item()
        p = logits.sigmoid()
        cls = cls - p[fg].log().sum() - (1 - p[bg]).log().sum()
        if "box_reg_loss_type" in kwargs:
            boxes = rpn.box2box_transform.apply_deltas(deltas[fg], anchors[fg])
            loc = loc + torchvision.ops.generalized_box_iou_loss(boxes, gt[match[fg]], reduction="sum")
        else:
            want = rpn.box2box_transform.get_deltas(anchors[fg], gt[match[fg]])
            beta = kwargs.get("smooth_l1_beta", 0.0)
            loc = loc + (
                F.smooth_l1_loss(deltas[fg], want, beta=beta, reduction="sum")
                if beta
                else (deltas[fg] - want).abs().sum()
            )
    weights = kwargs.get("loss_weight", 1.0)
    if not isinstance(weights, dict):
        weights = {"loss_rpn_cls": weights, "loss_rpn_loc": weights}
    assert num_fg > 1 and set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    for name, value in {"loss_rpn_cls": cls, "loss_rpn_loc": loc}.items():
        want = value / (2 * 2000) * weights.get(name, 1.0)
        torch.testing.assert_close(losses[name], want, rtol=1e-4, atol=1e-6)
    assert logged["rpn/num_pos_anchors"] == num_fg / 2 and logged["rpn/num_neg_anchors"] == num_bg / 2
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in rpn.parameters())


def test_forward_returns_the_best_proposals():
    rpn = build_rpn().eval()
    images, features, _ = batch()
    proposals, losses = rpn(images, features)
    assert losses == {}
    predictions, anchors = flat_predictions(rpn, features)
    split = [192, 48]
    boxes = torch.stack([rpn.box2box_transform.apply_deltas(d, anchors) for _, d in predictions])
    scores = torch.stack([s for s, _ in predictions])
    want = find_top_rpn_proposals(
        boxes.split(split, 1), scores.split(split, 1), SIZES, 0.7, 20, 10, 0.0, False
    )
    for inst, reference in zip(proposals, want, strict=True):
        assert len(inst) == 10 and not inst.proposal_boxes.tensor.requires_grad
        torch.testing.assert_close(
            inst.proposal_boxes.tensor, reference.proposal_boxes.tensor, rtol=1e-5, atol=1e-3
        )
        torch.testing.assert_close(inst.objectness_logits, reference.objectness_logits)


def test_number_of_proposals_in_training_has_its_own_limit():
    rpn = build_rpn(post_nms_topk=(7, 3)).train()
    proposals, _ = rpn(*batch())
    assert [len(p) for p in proposals] == [7, 7]


def test_sampled_labels_fit_the_ground_truth():
    rpn = build_rpn()
    _, features, targets = batch()
    anchors = rpn.anchor_generator([features["p3"], features["p4"]])
    flat = Boxes.cat(anchors)
    labels, boxes = rpn.label_and_sample_anchors(anchors, targets)
    for label, matched, target in zip(labels, boxes, targets):
        assert label.shape == (240,) and label.dtype == torch.int8 and matched.shape == (240, 4)
        assert (label >= 0).sum() == 40 and 1 <= (label == 1).sum() <= 20
        iou = target.gt_boxes.pairwise_iou(flat)
        assert torch.equal(matched[label == 1], target.gt_boxes.tensor[iou.max(0).indices][label == 1])


def test_images_without_objects_have_background_only():
    rpn = build_rpn().train()
    images, features, targets = batch()
    targets = [targets[0][:0], targets[1][:0]]
    _, losses = rpn(images, features, targets)
    assert losses["loss_rpn_loc"].item() == 0 and losses["loss_rpn_cls"].item() > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in rpn.parameters())


def test_training_without_ground_truth_or_with_nan_raises():
    rpn = build_rpn().train()
    images, features, targets = batch()
    with pytest.raises(ValueError, match="gt_instances"):
        rpn(images, features)
    features["p4"][1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"images \[1\] of the batch: the training run has diverged"):
        rpn(images, features, targets)


def test_autocast_keeps_boxes_and_losses_in_float32():
    rpn = build_rpn(batch_size_per_image=2000).train()
    images, features, targets = batch()
    _, want = rpn(images, features, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proposals, losses = rpn(images, features, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(want[name].item(), rel=0.02)
    assert proposals[0].proposal_boxes.tensor.dtype == torch.float32
    assert proposals[0].objectness_logits.dtype == torch.float32


def test_rpn_works_with_another_box_type():
    """Boxes as (cx, cy, w, h): the box type implements IoU, clipping and NMS, as rotated boxes do."""

    class CenterBoxes(Boxes):
        def corners(self):
            t = self.tensor
            return Boxes(torch.cat((t[:, :2] - t[:, 2:] / 2, t[:, :2] + t[:, 2:] / 2), dim=1))

        def clip(self, box_size):
            corners = self.corners()
            corners.clip(box_size)
            t = corners.tensor
            self.tensor = torch.cat(((t[:, :2] + t[:, 2:]) / 2, t[:, 2:] - t[:, :2]), dim=1)

        def nonempty(self, threshold=0.0):
            return self.corners().nonempty(threshold)

        def pairwise_iou(self, other):
            return self.corners().pairwise_iou(other.corners())

        def batched_nms(self, scores, idxs, iou_threshold):
            return self.corners().batched_nms(scores, idxs, iou_threshold)

    class CenterAnchors(DefaultAnchorGenerator):
        def forward(self, features):
            return [CenterBoxes(center(b.tensor)) for b in super().forward(features)]

    class CenterTransform(Box2BoxTransform):
        def apply_deltas(self, deltas, boxes):
            return center(super().apply_deltas(deltas, CenterBoxes(boxes).corners().tensor))

    def center(t):
        return torch.cat(((t[:, :2] + t[:, 2:]) / 2, t[:, 2:] - t[:, :2]), dim=1)

    images, features, _ = batch()
    want, _ = build_rpn().eval()(images, features)
    generator = CenterAnchors(sizes=[[16], [32]], aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16], offset=0.0)
    rpn = build_rpn(anchor_generator=generator, box2box_transform=CenterTransform((1, 1, 1, 1))).eval()
    got, _ = rpn(images, features)
    for a, b in zip(got, want, strict=True):
        assert isinstance(a.proposal_boxes, CenterBoxes)
        torch.testing.assert_close(
            a.proposal_boxes.corners().tensor, b.proposal_boxes.tensor, rtol=1e-4, atol=1e-3
        )


def test_head_has_published_names_and_initial_weights():
    head = StandardRPNHead(in_channels=64, num_anchors=3)
    assert [k for k, _ in head.named_parameters() if k.endswith("weight")] == [
        "conv.weight",
        "objectness_logits.weight",
        "anchor_deltas.weight",
    ]
    for name, p in head.named_parameters():
        assert p.std().item() == pytest.approx(0.01, rel=0.2) if "weight" in name else not p.any()
    head = StandardRPNHead(in_channels=8, num_anchors=2, box_dim=5, conv_dims=[16, -1])
    assert head.conv.conv0.out_channels == head.conv.conv1.out_channels == 16
    maps = [torch.randn(1, 8, 4, 5), torch.randn(1, 8, 2, 3)]
    logits, deltas = head(maps)
    assert [tuple(x.shape) for x in logits] == [(1, 2, 4, 5), (1, 2, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(1, 10, 4, 5), (1, 10, 2, 3)]
    hidden = F.relu(head.conv.conv0(maps[0]))
    hidden = F.relu(head.conv.conv1(hidden))
    torch.testing.assert_close(logits[0], head.objectness_logits(hidden))
    with pytest.raises(ValueError, match=r"MODEL.RPN.CONV_DIMS.*\[0\]"):
        StandardRPNHead(in_channels=8, num_anchors=2, conv_dims=[0])


def shapes(channels=(8, 8)):
    return {f"p{i}": ShapeSpec(channels=c, stride=2**i) for i, c in enumerate(channels, start=3)}


def rpn_config():
    cfg = get_cfg()
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    return cfg


def test_config_values_reach_the_rpn():
    cfg = rpn_config()
    cfg.MODEL.RPN.LOSS_WEIGHT, cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = 2.0, 3.0
    cfg.MODEL.RPN.CONV_DIMS = [-1, 16]
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 4
    rpn = build_proposal_generator(cfg, shapes())
    assert rpn.loss_weight == {"loss_rpn_cls": 2.0, "loss_rpn_loc": 6.0}
    assert rpn.pre_nms_topk == {True: 12000, False: 6000} and rpn.min_box_size == 4
    assert rpn.post_nms_topk == {True: 2000, False: 1000}
    assert rpn.rpn_head.anchor_deltas.weight.shape == (12, 16, 1, 1)
    assert rpn.anchor_generator.strides == [8, 16]
    assert rpn.anchor_matcher.allow_low_quality_matches
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert build_proposal_generator(cfg, shapes()) is None


def test_config_errors_name_the_key():
    cfg = rpn_config()
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES is .*\['p3'\]: 'p4' is not"):
        build_proposal_generator(cfg, shapes((8,)))
    with pytest.raises(ValueError, match=r"channels \(MODEL.RPN.IN_FEATURES\).*\[8, 9\]"):
        build_proposal_generator(cfg, shapes((8, 9)))
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32, 64]]
    with pytest.raises(ValueError, match=r"number of anchors \(MODEL.ANCHOR_GENERATOR\).*\[3, 6\]"):
        build_rpn_head(cfg, list(shapes().values()))
    cfg = rpn_config()
    cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE = "l2"
    with pytest.raises(ValueError, match="MODEL.RPN.BBOX_REG_LOSS_TYPE"):
        build_proposal_generator(cfg, shapes())


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    rpn = build_rpn(batch_size_per_image=2000)
    images, features, targets = batch()
    want, want_losses = rpn.train()(images, features, targets)
    rpn = rpn.cuda()
    features = {k: v.cuda() for k, v in features.items()}
    got, losses = rpn(images.to("cuda"), features, [t.to("cuda") for t in targets])
    for name in losses:
        torch.testing.assert_close(losses[name].cpu(), want_losses[name], rtol=1e-3, atol=1e-4)
    for a, b in zip(got, want):
        assert abs(len(a) - len(b)) <= 1
        torch.testing.assert_close(
            a.objectness_logits[:20].cpu(), b.objectness_logits[:20], rtol=0, atol=1e-2
        )
