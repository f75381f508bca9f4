"""Tests of the DETR losses against loops over queries and objects."""

import math

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from detlib.modeling.detr import DeformableCriterion, DINOCriterion, HungarianMatcher, SetCriterion
from detlib.modeling.detr import criterion as criterion_module
from detlib.modeling.detr.denoising import denoising_matches
from tests.modeling.detr.small_models import NUM_CLASSES, predictions, targets


def slow_losses(outputs, gt, pairs, num_boxes, kind="focal_loss", eos_coef=0.1):
    """Compute the losses query by query; `pairs` maps (image, query) to the object of that image."""
    logits, boxes = outputs["pred_logits"].detach().double(), outputs["pred_boxes"].detach().double()
    by_class = l1 = giou = weights = 0.0
    for i, target in enumerate(gt):
        for q in range(logits.shape[1]):
            label = target["labels"][pairs[i, q]].item() if (i, q) in pairs else NUM_CLASSES
            if kind == "ce_loss":
                weight = eos_coef if label == NUM_CLASSES else 1.0
                by_class -= weight * logits[i, q].log_softmax(0)[label].item()
                weights += weight
            else:
                for k in range(NUM_CLASSES):
                    p = 1 / (1 + math.exp(-logits[i, q, k].item()))
                    if k == label:
                        by_class -= 0.25 * (1 - p) ** 2 * math.log(p)
                    else:
                        by_class -= 0.75 * p**2 * math.log(1 - p)
            if (i, q) in pairs:
                box, gt_box = boxes[i, q], target["boxes"][pairs[i, q]].double()
                l1 += (box - gt_box).abs().sum().item()
                corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, gt_box)]
                giou += 1 - generalized_box_iou(*corners).item()
    by_class /= weights if kind == "ce_loss" else num_boxes
    return {"loss_class": by_class, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def as_pairs(matches):
    return {
        (i, q): o
        for i, (queries, objects) in enumerate(matches)
        for q, o in zip(queries.tolist(), objects.tolist())
    }


def assert_losses(found, want, suffix=""):
    for name, value in want.items():
        assert found[name + suffix].item() == pytest.approx(value, rel=1e-5), name + suffix


@pytest.mark.parametrize("kind", ["focal_loss", "ce_loss"])
def test_losses_of_all_layers_match_loops(kind):
    cost = "ce_cost" if kind == "ce_loss" else "focal_loss_cost"
    matcher = HungarianMatcher(2.0, 5.0, 2.0, cost)
    criterion = SetCriterion(NUM_CLASSES, matcher, {}, loss_class_type=kind, eos_coef=0.2)
    gt = targets((3, 0, 1))
    num_logits = NUM_CLASSES + (kind == "ce_loss")
    outputs = predictions(num_logits=num_logits)
    outputs["aux_outputs"] = [predictions(num_logits=num_logits, seed=s) for s in (5, 6)]
    found = criterion(outputs, gt)
    names = ("loss_class", "loss_bbox", "loss_giou")
    assert set(found) == {name + suffix for suffix in ("", "_0", "_1") for name in names}
    for suffix, layer in (
        ("", outputs),
        ("_0", outputs["aux_outputs"][0]),
        ("_1", outputs["aux_outputs"][1]),
    ):
        pairs = as_pairs(matcher(layer, gt))
        assert_losses(found, slow_losses(layer, gt, pairs, 4, kind, 0.2), suffix)


def test_return_indices_gives_last_layer_last():
    gt = targets()
    outputs = predictions()
    outputs["aux_outputs"] = [predictions(seed=5)]
    criterion = SetCriterion(NUM_CLASSES, HungarianMatcher(), {})
    _, (of_first, of_last) = criterion(outputs, gt, return_indices=True)
    assert torch.equal(of_last.flat, criterion.matcher(outputs, gt).flat)
    assert torch.equal(of_first.flat, criterion.matcher(outputs["aux_outputs"][0], gt).flat)


def test_losses_accept_matches_as_plain_lists():
    gt, outputs = targets(), predictions()
    criterion = SetCriterion(NUM_CLASSES, HungarianMatcher(), {})
    matches = criterion.matcher(outputs, gt)
    for kind in criterion.losses:
        a = criterion.get_loss(kind, outputs, gt, matches, 4.0)
        b = criterion.get_loss(kind, outputs, gt, list(matches), 4.0)
        assert a == b


def test_subclass_can_add_a_loss():
    class WithCardinality(SetCriterion):
        def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
            if loss == "matched":
                return {"matched": torch.tensor(float(sum(len(q) for q, _ in indices)))}
            return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)

    outputs = {**predictions(), "aux_outputs": [predictions(seed=3)]}
    found = WithCardinality(NUM_CLASSES, HungarianMatcher(), {}, losses=["matched"])(outputs, targets())
    assert found == {"matched": torch.tensor(4.0), "matched_0": torch.tensor(4.0)}


@pytest.mark.parametrize("is_binary", [False, True])
def test_encoder_losses_match_loops(is_binary):
    """Deformable DETR's encoder is class-agnostic: all objects are class 0."""
    gt = targets((3, 0, 1))
    outputs = {**predictions(), "enc_outputs": predictions(num_queries=20, seed=9)}
    matcher = HungarianMatcher(2.0, 5.0, 2.0)
    criterion = (DeformableCriterion if is_binary else DINOCriterion)(NUM_CLASSES, matcher, {})
    found = criterion(outputs, gt)
    own = [{**t, "labels": t["labels"] * 0} for t in gt] if is_binary else gt
    pairs = as_pairs(matcher(outputs["enc_outputs"], own))
    assert_losses(found, slow_losses(outputs["enc_outputs"], own, pairs, 4), "_enc")
    assert_losses(found, slow_losses(outputs, gt, as_pairs(matcher(outputs, gt)), 4))
    assert any(t["labels"].any() for t in gt), "the ground truth must not be modified"


def test_denoising_losses_match_loops():
    gt = targets((2, 0, 1))
    known = {**predictions(num_queries=12, seed=4), "aux_outputs": [predictions(num_queries=12, seed=5)]}
    outputs = {**predictions(), "aux_outputs": [predictions(seed=6)]}
    criterion = DINOCriterion(NUM_CLASSES, HungarianMatcher(), {})
    metas = {"single_padding": 4, "dn_num": 3, "output_known_lbs_bboxes": known}
    found = criterion(outputs, gt, metas)
    pairs = {
        (i, 4 * group + o): o for i, t in enumerate(gt) for group in range(3) for o in range(len(t["labels"]))
    }
    assert as_pairs(denoising_matches([2, 0, 1], 4, 3, torch.device("cpu"))) == pairs
    for suffix, layer in (("_dn", known), ("_dn_0", known["aux_outputs"][0])):
        assert_losses(found, slow_losses(layer, gt, pairs, 9), suffix)
    without = criterion(outputs, gt)
    assert set(without) == set(found)
    assert all(without[name] == (0 if "_dn" in name else found[name]) for name in found)


def test_objects_are_counted_with_one_all_reduce(monkeypatch):
    """Every all-reduce waits for all processes.

    The other one of the two processes has no objects here, so the losses are doubled.
    """
    known = {**predictions(num_queries=12, seed=4), "aux_outputs": [predictions(num_queries=12, seed=5)]}
    outputs = {**predictions(), "aux_outputs": [predictions(seed=6)], "enc_outputs": predictions(seed=9)}
    metas = {"single_padding": 4, "dn_num": 3, "output_known_lbs_bboxes": known}
    criterion = DINOCriterion(NUM_CLASSES, HungarianMatcher(), {})
    alone = criterion(outputs, targets((3, 0, 1)), metas)
    reduced = []
    monkeypatch.setattr(criterion_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    both = criterion(outputs, targets((3, 0, 1)), metas)
    assert len(reduced) == 1
    assert both.keys() == alone.keys()
    for name in both:
        torch.testing.assert_close(both[name], 2 * alone[name])


@pytest.mark.parametrize("kind", ["focal_loss", "ce_loss"])
def test_images_without_objects_have_only_class_loss(kind):
    outputs = predictions(num_logits=NUM_CLASSES + (kind == "ce_loss"))
    cost = "ce_cost" if kind == "ce_loss" else "focal_loss_cost"
    criterion = SetCriterion(NUM_CLASSES, HungarianMatcher(cost_class_type=cost), {}, loss_class_type=kind)
    found = criterion(outputs, targets((0, 0, 0)))
    assert found["loss_bbox"] == found["loss_giou"] == 0 and found["loss_class"] > 0
    sum(found.values()).backward()
    assert outputs["pred_boxes"].grad.abs().sum() == 0 and outputs["pred_logits"].grad.abs().sum() > 0


def test_gradients_match_finite_differences():
    outputs, gt = predictions(dtype=torch.float64), targets(dtype=torch.float64)
    criterion = SetCriterion(NUM_CLASSES, HungarianMatcher(), {})
    matches = criterion.matcher(outputs, gt)

    def total(logits, boxes):
        layer = {"pred_logits": logits, "pred_boxes": boxes}
        losses = {
            **criterion.loss_labels(layer, gt, matches, 4.0),
            **criterion.loss_boxes(layer, gt, matches, 4.0),
        }
        return sum(losses.values())

    assert torch.autograd.gradcheck(total, (outputs["pred_logits"], outputs["pred_boxes"]))


def test_unknown_losses_are_rejected():
    with pytest.raises(ValueError, match="loss_class_type is 'focal'; legal are 'ce_loss', 'focal_loss'"):
        SetCriterion(3, HungarianMatcher(), {}, loss_class_type="focal")
    criterion = SetCriterion(NUM_CLASSES, HungarianMatcher(), {}, losses=["class", "masks"])
    with pytest.raises(ValueError, match="losses is 'masks'"):
        criterion(predictions(), targets())
