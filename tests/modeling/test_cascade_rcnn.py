"""CascadeROIHeads built from parts, compared with its stages run one after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import ShapeSpec
from detlib.modeling import build_model
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers
from detlib.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detlib.structures import Boxes, Instances, pairwise_iou
from detlib.utils.events import EventStorage
from tests.builders import NUM_CLASSES, ground_truth, small_config

SIZE = (64, 96)
IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


def make_heads(agnostic: bool = True, **kwargs) -> CascadeROIHeads:
    torch.manual_seed(0)
    box_heads = [
        FastRCNNConvFCHead(ShapeSpec(channels=4, height=3, width=3), conv_dims=[], fc_dims=[8]) for _ in IOUS
    ]
    predictors = [
        FastRCNNOutputLayers(
            8,
            box2box_transform=Box2BoxTransform(weights),
            num_classes=NUM_CLASSES,
            cls_agnostic_bbox_reg=agnostic,
            test_topk_per_image=7,
            test_nms_thresh=0.6,
            test_score_thresh=0.1,
        )
        for weights in WEIGHTS
    ]
    for predictor in predictors:
        nn.init.normal_(predictor.bbox_pred.weight, std=0.6)
        nn.init.normal_(predictor.cls_score.weight, std=0.5)
    args = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 1000,
        "positive_fraction": 1.0,
        "box_in_features": ["p3"],
        "box_pooler": ROIPooler(3, [1 / 8], 2, "ROIAlignV2"),
        "box_heads": box_heads,
        "box_predictors": predictors,
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in IOUS],
    }
    return CascadeROIHeads(**(args | kwargs))


def make_features(num_images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"p3": torch.randn(num_images, 4, 8, 12, generator=generator)}


def proposals_near_objects(count: int, seed: int) -> Instances:
    """Return random boxes and eight boxes near the objects of `ground_truth`."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([70.0, 40])
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
    near = ground_truth().gt_boxes.tensor.repeat(4, 1)
    boxes = torch.cat([boxes, near + 3 * torch.randn(len(near), 4, generator=generator)])
    x = Instances(SIZE, proposal_boxes=Boxes(boxes))
    x.objectness_logits = torch.zeros(len(x))
    return x


def slow_stage(heads, features, boxes, stage):
    """Return the logits and deltas of each image's boxes, computed image by image."""
    out = []
    for i, image_boxes in enumerate(boxes):
        pooled = heads.box_pooler([features["p3"][i : i + 1]], [Boxes(image_boxes)])
        out.append(heads.box_predictor[stage](heads.box_head[stage](pooled)))
    return out


def slow_refine(deltas, boxes, weights):
    boxes = Box2BoxTransform(weights).apply_deltas(deltas.detach(), boxes)
    limits = torch.tensor([SIZE[1], SIZE[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limits)


def slow_labels(boxes, target, threshold):
    if len(target) == 0:
        return torch.full((len(boxes),), NUM_CLASSES), boxes
    iou, matched = pairwise_iou(target.gt_boxes, Boxes(boxes)).max(dim=0)
    classes = target.gt_classes[matched].clone()
    classes[iou < threshold] = NUM_CLASSES
    return classes, target.gt_boxes.tensor[matched]


def test_training_losses_equal_those_of_separate_stages():
    heads = make_heads()
    features = make_features(2)
    targets = [ground_truth(), ground_truth(boxes=())]
    with EventStorage() as storage:
        sampled, losses = heads(
            None, features, [proposals_near_objects(20, 0), proposals_near_objects(15, 1)], targets
        )
    assert set(losses) == {f"loss_{kind}_stage{k}" for kind in ("cls", "box_reg") for k in range(3)}

    boxes = [x.proposal_boxes.tensor for x in sampled]
    assert [len(x) for x in boxes] == [20 + 8 + 2, 15 + 8]  # the ground-truth boxes are added
    scalars = {name: value for name, (value, _) in storage.latest().items()}
    foregrounds = []
    for k, (threshold, weights) in enumerate(zip(IOUS, WEIGHTS)):
        labeled = [slow_labels(b, t, threshold) for b, t in zip(boxes, targets)]
        classes = torch.cat([c for c, _ in labeled])
        matched = torch.cat([b for _, b in labeled])
        predictions = slow_stage(heads, features, boxes, k)
        logits, deltas = (torch.cat(x) for x in zip(*predictions))
        torch.testing.assert_close(losses[f"loss_cls_stage{k}"], F.cross_entropy(logits, classes))
        foreground = classes < NUM_CLASSES
        wanted = Box2BoxTransform(weights).get_deltas(torch.cat(boxes)[foreground], matched[foreground])
        want = (deltas[foreground] - wanted).abs().sum() / len(classes)
        torch.testing.assert_close(losses[f"loss_box_reg_stage{k}"], want)
        prefix = f"stage{k}/" if k else ""
        assert scalars[f"{prefix}roi_head/num_fg_samples"] == foreground.sum() / 2
        assert scalars[f"{prefix}roi_head/num_bg_samples"] == (~foreground).sum() / 2
        right = (logits.argmax(dim=1) == classes).float().mean().item()
        assert scalars[f"stage{k}/fast_rcnn/cls_accuracy"] == pytest.approx(right)
        foregrounds.append(foreground.sum().item())
        boxes = [slow_refine(d, b, weights) for (_, d), b in zip(predictions, boxes)]
        boxes = [b[(b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1])] for b in boxes]
    assert len(set(foregrounds)) == 3  # otherwise the test would not detect wrong thresholds


def test_gradient_of_features_is_scaled_by_the_number_of_stages():
    heads = make_heads()
    features = {"p3": make_features(1)["p3"].requires_grad_()}
    torch.manual_seed(3)
    _, losses = heads(None, features, [proposals_near_objects(20, 0)], [ground_truth()])
    sum(losses.values()).backward()
    got = features["p3"].grad.clone()
    own = heads.box_head[1].fc1.weight.grad.clone()

    heads.zero_grad()
    features["p3"].grad = None
    heads.num_cascade_stages = 1  # the gradient is scaled by its inverse
    torch.manual_seed(3)
    _, losses = heads(None, features, [proposals_near_objects(20, 0)], [ground_truth()])
    sum(losses.values()).backward()
    assert got.any()
    torch.testing.assert_close(3 * got, features["p3"].grad)
    # The gradient of the heads is not scaled.
    torch.testing.assert_close(own, heads.box_head[1].fc1.weight.grad)


@torch.no_grad()
def test_inference_averages_scores_and_uses_the_last_boxes():
    heads = make_heads().eval()
    features = make_features(2)
    proposals = [proposals_near_objects(20, 0), proposals_near_objects(15, 1)]
    got, losses = heads(None, features, proposals)
    assert losses == {}
    boxes, scores = [x.proposal_boxes.tensor for x in proposals], [0.0, 0.0]
    for k, weights in enumerate(WEIGHTS):
        predictions = slow_stage(heads, features, boxes, k)
        scores = [s + logits.softmax(dim=1) / 3 for s, (logits, _) in zip(scores, predictions)]
        last = [Box2BoxTransform(weights).apply_deltas(d, b) for (_, d), b in zip(predictions, boxes)]
        boxes = [slow_refine(d, b, weights) for (_, d), b in zip(predictions, boxes)]
    want, _ = fast_rcnn_inference(last, scores, [SIZE, SIZE], 0.1, 0.6, 7)
    for a, b in zip(got, want):
        assert len(a) == len(b) == 7 and torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("seed", [0, 1])
def test_images_without_regions_give_finite_losses(seed):
    heads = make_heads(proposal_append_gt=False)
    none = proposals_near_objects(0, 0)[:0]
    _, losses = heads(None, make_features(2), [none, none], [ground_truth(), ground_truth(boxes=())])
    assert [v.item() for v in losses.values()] == [0] * 6
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in heads.parameters())
    with torch.no_grad():
        out, _ = heads.eval()(None, make_features(2), [none, proposals_near_objects(9, seed)])
    assert len(out[0]) == 0 and len(out[1]) > 0


def test_later_stages_drop_regions_without_area_or_label():
    matchers = [Matcher([0.5], [0, 1]), Matcher([0.3, 0.6], [0, -1, 1]), Matcher([0.7], [0, 1])]
    heads = make_heads(proposal_matchers=matchers)
    boxes = [(8, 8, 40, 40), (8, 8, 40, 22), (8, 8, 40, 8), (96, 0, 96, 9), (60, 0, 90, 9)]
    proposals = [Instances(SIZE, proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))]
    (got,) = heads._match_and_label_boxes(proposals, 1, [ground_truth()])
    assert got.proposal_boxes.tensor.tolist() == [[8, 8, 40, 40], [60, 0, 90, 9]]
    assert got.gt_classes.tolist() == [0, NUM_CLASSES]
    assert got.gt_boxes.tensor[0].tolist() == [8, 8, 40, 40]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="targets"):
        make_heads()(None, make_features(1), [proposals_near_objects(3, 0)])
    with pytest.raises(ValueError, match="instead of proposal_matcher"):
        make_heads(proposal_matcher=Matcher([0.5], [0, 1]))
    with pytest.raises(ValueError, match="got 3, 3 and 2"):
        make_heads(proposal_matchers=[Matcher([0.5], [0, 1])] * 2)
    heads = make_heads(agnostic=False)
    with pytest.raises(ValueError, match="a stage predicts 3.*cls_agnostic_bbox_reg=True"):
        heads(None, make_features(1), [proposals_near_objects(3, 0)], [ground_truth()])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": False}, "CLS_AGNOSTIC_BBOX_REG = True"),
        ({"MODEL__ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.6)}, "IOUS and BBOX_REG_WEIGHTS.*2 and 3"),
        ({"MODEL__ROI_HEADS__IOU_THRESHOLDS": [0.4]}, r"IOU_THRESHOLDS.*\[0.4\].*\[0.5, 0.6, 0.7\]"),
    ],
)
def test_wrong_configs_raise_with_their_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_config(CASCADE, **overrides))


def test_config_values_reach_the_stages():
    cfg = small_config(
        CASCADE,
        MODEL__ROI_BOX_CASCADE_HEAD__IOUS=(0.5, 0.65),
        MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS=((10, 10, 5, 5), (25, 25, 9, 9)),
    )
    heads = build_model(cfg).roi_heads
    assert len(heads.box_head) == len(heads.box_predictor) == heads.num_cascade_stages == 2
    assert [p.box2box_transform.weights for p in heads.box_predictor] == [(10, 10, 5, 5), (25, 25, 9, 9)]
    assert [m.thresholds[1] for m in heads.proposal_matchers] == [0.5, 0.65]
    assert heads.proposal_matcher is heads.proposal_matchers[0]
