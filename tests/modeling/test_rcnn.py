"""R-CNN models: a training step, inference, mixed precision, and errors of wrong inputs."""

from types import SimpleNamespace

import pytest
import torch

from detlib.modeling import MetaArchitecture, build_model
from detlib.structures import Boxes, Instances
from detlib.utils.events import EventStorage
from tests.builders import (
    FAST_RCNN,
    FASTER_RCNN,
    MASK_RCNN,
    NUM_CLASSES,
    RPN,
    ground_truth,
    random_image,
    small_config,
    training_batch,
)

LOSSES = {
    MASK_RCNN: {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"},
    FASTER_RCNN: {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"},
    FAST_RCNN: {"loss_cls", "loss_box_reg"},
    RPN: {"loss_rpn_cls", "loss_rpn_loc"},
}


@pytest.fixture(scope="module")
def models():
    """Return a function that builds each model on first use; tests must not change its parameters."""
    built = {}

    def get(name: str) -> torch.nn.Module:
        if name not in built:
            torch.manual_seed(0)
            built[name] = build_model(small_config(name))
        model = built[name].train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        return model

    return get


def proposals(height: int = 64, width: int = 96, count: int = 30) -> Instances:
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 20, height - 20])
    boxes = torch.cat([corner, corner + 5 + 15 * torch.rand(count, 2, generator=generator)], dim=1)
    return Instances(
        (height, width), proposal_boxes=Boxes(boxes), objectness_logits=torch.linspace(4, -4, count)
    )


def batch_for(name: str, empty=(False, False)) -> list[dict]:
    batch = training_batch(empty)
    if name == FAST_RCNN:
        for item in batch:
            item["proposals"] = proposals()
    return batch


@pytest.mark.parametrize("name", LOSSES)
def test_training_step_gives_every_parameter_a_gradient(models, name):
    model = models(name)
    with EventStorage() as storage:
        losses = model(batch_for(name))
    assert set(losses) == LOSSES[name]
    assert all(v.dim() == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    if name != FAST_RCNN:  # its proposals are too small for the upper levels
        assert [n for n, p in model.named_parameters() if not p.grad.any()] == []
    if name == MASK_RCNN:
        assert {
            *("rpn/num_pos_anchors", "rpn/num_neg_anchors"),
            *("roi_head/num_fg_samples", "roi_head/num_bg_samples"),
            *("fast_rcnn/cls_accuracy", "fast_rcnn/fg_cls_accuracy", "fast_rcnn/false_negative"),
            *("mask_rcnn/accuracy", "mask_rcnn/false_positive", "mask_rcnn/false_negative"),
        } <= set(storage.latest())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("empty", [(True, True), (False, True)])
def test_images_without_objects_give_finite_losses(models, name, empty):
    model = models(name)
    with EventStorage():
        losses = model(batch_for(name, empty))
    assert set(losses) == LOSSES[name]
    if all(empty):
        for key in set(losses) & {"loss_box_reg", "loss_mask", "loss_rpn_loc"}:
            assert losses[key].item() == 0, key
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    # Distributed training requires that every parameter has a gradient, even if it is zero.
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_training_works_without_event_storage(models):
    model = models(MASK_RCNN)
    batch = training_batch()
    bare = model(batch)
    torch.manual_seed(1)
    with EventStorage():
        logged = model(batch)
    assert all(torch.equal(bare[k], logged[k]) for k in logged)


@pytest.mark.parametrize("name", [MASK_RCNN, FAST_RCNN])
def test_losses_are_float32_under_bfloat16_autocast(models, name):
    model = models(name)
    batch = batch_for(name)
    full = model(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch)
    for key, value in half.items():
        assert value.dtype == torch.float32 and value.isfinite()
        # The losses of the second stage depend on the proposals, which only Fast R-CNN takes from the input.
        if name == FAST_RCNN or key.startswith("loss_rpn"):
            assert value.item() == pytest.approx(full[key].item(), rel=0.05, abs=0.01), key
    sum(half.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (out, _) = model(batch)
    x = out["instances"]
    assert len(x) and x.scores.dtype == x.pred_boxes.tensor.dtype == torch.float32
    if name == MASK_RCNN:
        assert x.pred_masks.dtype == torch.bool and x.pred_masks.shape == (len(x), 64, 96)


@torch.no_grad()
def test_detections_of_an_image_do_not_depend_on_its_batch(models):
    model = models(MASK_RCNN).eval()
    items = [{"image": random_image(seed=s)} for s in (1, 2)]
    together = model(items)
    for item, out in zip(items, together):
        alone = model([item])[0]["instances"]
        x = out["instances"]
        assert len(x) == len(alone) > 0
        torch.testing.assert_close(x.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(x.scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert (x.pred_masks != alone.pred_masks).float().mean() < 1e-3


@torch.no_grad()
def test_outputs_have_the_requested_size(models):
    model = models(MASK_RCNN).eval()
    plain = model([{"image": random_image()}])[0]["instances"]
    larger = model([{"image": random_image(), "height": 128, "width": 288}])[0]["instances"]
    assert plain.image_size == (64, 96) and larger.image_size == (128, 288)
    assert plain.pred_masks.shape[1:] == (64, 96) and larger.pred_masks.shape[1:] == (128, 288)
    scaled = plain.pred_boxes.tensor * torch.tensor([3.0, 2, 3, 2])
    torch.testing.assert_close(larger.pred_boxes.tensor, scaled)


@torch.no_grad()
def test_inference_without_postprocessing_and_with_given_boxes(models):
    model = models(MASK_RCNN).eval()
    item = {"image": random_image(), "height": 128, "width": 192}
    (raw,) = model.inference([item], do_postprocess=False)
    assert isinstance(raw, Instances) and raw.image_size == (64, 96)
    assert raw.pred_masks.shape[1:] == (1, 28, 28)

    given = Instances((64, 96), pred_boxes=raw.pred_boxes, pred_classes=raw.pred_classes)
    (out,) = model.inference([item], detected_instances=[given])
    full = model([item])[0]["instances"]
    torch.testing.assert_close(out["instances"].pred_boxes.tensor, full.pred_boxes.tensor)
    assert torch.equal(out["instances"].pred_masks, full.pred_masks)


@torch.no_grad()
def test_given_proposals_are_classified(models):
    model = models(FAST_RCNN).eval()
    assert model.proposal_generator is None
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    item = {"image": random_image(), "proposals": proposals(count=1)}
    x = model([item])[0]["instances"]
    assert sorted(x.pred_classes.tolist()) == [0, 1, 2]
    # Box deltas are near zero at initialization, so the detections are at the proposals.
    want = item["proposals"].proposal_boxes.tensor.expand(3, 4)
    torch.testing.assert_close(x.pred_boxes.tensor, want, atol=1.0, rtol=0)


@torch.no_grad()
def test_proposal_network_returns_sorted_proposals(models):
    model = models(RPN).eval()
    (out,) = model([{"image": random_image(), "height": 128, "width": 192}])
    x = out["proposals"]
    assert set(out) == {"proposals"} and 0 < len(x) <= 40 and x.image_size == (128, 192)
    assert (x.objectness_logits.diff() <= 0).all()
    boxes = x.proposal_boxes.tensor
    assert (boxes >= 0).all() and (boxes <= torch.tensor([192.0, 128, 192, 128])).all()


def test_preprocessing_normalizes_and_pads_images():
    mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    images = [random_image(40, 64), random_image(32, 72).float()]
    model = MetaArchitecture()
    model.register_pixel_stats(mean.flatten().tolist(), std.flatten().tolist())
    model.backbone = SimpleNamespace(size_divisibility=32)
    out = model.preprocess_image([{"image": x} for x in images])
    assert out.tensor.shape == (2, 3, 64, 96) and out.tensor.dtype == torch.float32
    assert [tuple(s) for s in out.image_sizes] == [(40, 64), (32, 72)]
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        for c in range(3):
            want = (image[c].float() - mean[c]) / std[c]
            torch.testing.assert_close(out.tensor[i, c, :h, :w], want)
        assert not out.tensor[i, :, h:].any() and not out.tensor[i, :, :, w:].any()


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ({"image": random_image()}, TypeError, "list of dicts"),
        (random_image()[None], TypeError, "list of dicts"),
        ([random_image()], TypeError, "list of dicts"),
        ([], ValueError, "empty list"),
        ([{"img": 1, "file_name": "a.jpg"}], ValueError, r"item 0 .*\(a.jpg\) has no 'image'"),
        ([{"image": random_image().numpy()}], TypeError, "torch.Tensor.*got ndarray"),
        (
            [{"image": random_image()}, {"image": random_image()[0]}],
            ValueError,
            r"item 1 .*\(3, H, W\), got \(64, 96\)",
        ),
        ([{"image": random_image().permute(1, 2, 0)}], ValueError, r"\(64, 96, 3\).*permute"),
        ([{"image": random_image()[:1]}], ValueError, r"got \(1, 64, 96\)"),
        ([{"image": random_image() > 9}], ValueError, "torch.bool"),
        ([{"image": random_image()[:, :0]}], ValueError, "empty"),
    ],
)
def test_malformed_images_raise(models, batch, error, message):
    for name in (FASTER_RCNN, RPN):
        with pytest.raises(error, match=message):
            models(name).eval()(batch)


def test_training_without_ground_truth_raises(models):
    batch = training_batch()
    del batch[1]["instances"]
    batch[1]["file_name"] = "b.jpg"
    for name in (FASTER_RCNN, RPN):
        with pytest.raises(ValueError, match=r"Training needs 'instances'.*item 1 .*\(b.jpg\)"):
            models(name)(batch)


def test_missing_proposals_raise(models):
    with pytest.raises(ValueError, match="'proposals'.*item 0"):
        models(FAST_RCNN)(training_batch())
    with pytest.raises(ValueError, match="'proposals'.*item 0"):
        models(FAST_RCNN).eval()([{"image": random_image()}])


@pytest.mark.parametrize("label", [NUM_CLASSES, -1])
def test_labels_out_of_range_raise(models, label):
    batch = training_batch()
    batch[1]["instances"].gt_classes[0] = label
    with pytest.raises(ValueError, match=rf"item 1 .*\[0, {NUM_CLASSES}\).*NUM_CLASSES.*{label}"):
        models(FASTER_RCNN)(batch)


def test_missing_masks_raise(models):
    batch = training_batch()
    for item in batch:
        item["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="gt_masks"):
        models(MASK_RCNN)(batch)


def test_inference_in_training_mode_raises(models):
    with pytest.raises(ValueError, match="eval()"):
        models(FASTER_RCNN).inference([{"image": random_image()}])


def test_training_does_not_change_its_inputs(models):
    batch = batch_for(FAST_RCNN)
    models(FAST_RCNN)(batch)
    for item in batch:
        assert set(item) == {"image", "instances", "proposals"}
        assert set(item["proposals"].get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert torch.equal(item["proposals"].proposal_boxes.tensor, proposals().proposal_boxes.tensor)
        assert torch.equal(item["instances"].gt_boxes.tensor, ground_truth().gt_boxes.tensor)


def test_postprocess_scales_each_image_to_its_size(models):
    """Custom overrides of `inference` call `_postprocess`, with or without an output size in each dict."""
    model = models(MASK_RCNN).eval()
    batch = [
        {"image": random_image(64, 96), "height": 128, "width": 192},
        {"image": random_image(48, 64, seed=1)},
    ]
    with torch.no_grad():
        sizes = model.preprocess_image(batch).image_sizes
        raw = model.inference(batch, do_postprocess=False)
        boxes = [x.pred_boxes.tensor.clone() for x in raw]
        got = type(model)._postprocess(raw, batch, sizes)
    assert [x["instances"].image_size for x in got] == [(128, 192), (48, 64)]
    for x, wanted, scale in zip(got, boxes, (2, 1)):
        assert torch.equal(x["instances"].pred_boxes.tensor, wanted * scale)
