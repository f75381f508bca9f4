"""Tests of complete models: inputs and outputs, images without objects, dtypes, checkpoints and errors."""

from collections import Counter

import pytest
import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.layers import PositionEmbeddingSine
from detlib.modeling.detr import HungarianMatcher, SetCriterion
from detlib.modeling.detr.query_detector import padding_masks
from detlib.structures import Boxes, Instances
from tests.modeling.detr.small_models import (
    DIM,
    MODELS,
    NUM_CLASSES,
    NUM_QUERIES,
    WEIGHTS,
    batch,
    neck,
    small_deformable_detr,
    small_detr,
    small_dino,
)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_detections_are_sorted_and_inside_the_image(model):
    items = batch((None, None))
    with torch.no_grad():
        outputs = model.eval()(items)
    assert len(outputs) == 2
    for item, output in zip(items, outputs):
        found = output["instances"]
        height, width = item["height"], item["width"]
        assert found.image_size == (height, width)
        assert isinstance(found.pred_boxes, Boxes)
        boxes = found.pred_boxes.tensor
        assert 0 < len(found) <= NUM_QUERIES * NUM_CLASSES
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert found.scores.diff().max() <= 0 and 0 <= found.scores.min() and found.scores.max() <= 1
        assert found.pred_classes.dtype == torch.int64 and 0 <= found.pred_classes.min()
        assert found.pred_classes.max() < NUM_CLASSES


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_all_parameters_get_gradients(model, counts):
    """DDP waits for every gradient, even if some or all images have no objects."""
    losses = model(batch(counts))
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(batch((3, 1))).keys() == losses.keys(), "processes must agree on the losses"


def test_double_precision_model_trains(model):
    items = batch()
    single = model(items) if not hasattr(model, "dn_number") else None
    model.double()
    losses = model(items)
    assert {loss.dtype for loss in losses.values()} <= {torch.float64, torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())
    if single is not None:
        for name, loss in losses.items():
            torch.testing.assert_close(loss.float(), single[name], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        found = model.eval()(items)[0]["instances"]
    assert found.scores.dtype == torch.float64 and len(found)


def test_autocast_model_returns_float32(model):
    items = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(items)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        want = model.eval()(items[:1])[0]["instances"]
        with torch.autocast("cpu", torch.bfloat16):
            found = model(items[:1])[0]["instances"]
    assert found.pred_boxes.tensor.dtype == torch.float32
    assert found.scores[:5].tolist() == pytest.approx(want.scores[:5].tolist(), rel=0.2)


@pytest.mark.gpu
def test_gpu_matches_cpu(model, exact_float32):
    items = batch()
    with torch.no_grad():
        want, found = (model.eval().to(device)(items)[0]["instances"] for device in ("cpu", "cuda"))
    assert found.scores.is_cuda
    torch.testing.assert_close(found.scores.cpu(), want.scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        found.pred_boxes.tensor[:3].cpu(), want.pred_boxes.tensor[:3], rtol=1e-3, atol=0.05
    )
    model.train()
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        model.zero_grad()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            losses = model(items)
        assert all(loss.is_cuda and loss.isfinite() for loss in losses.values()), losses
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    items[0]["instances"].gt_classes[0] = NUM_CLASSES
    with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
        model(items)
    torch.cuda.synchronize()  # a device-side assert would surface here


def test_checkpoint_restores_shared_parameters(model, tmp_path):
    """Heads that share a tensor are saved and loaded under all of their names."""
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["detr", pytest.param("deformable_detr_two_stage", marks=pytest.mark.slow), "dino"]
)
def test_loss_falls_on_one_batch(name):
    model = MODELS[name]()
    items = batch((3, 1), ((64, 64), (64, 64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(25):
        torch.manual_seed(step % 2)
        loss = sum(model(items).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) < 0.75 * sum(history[:3])


def test_losses_are_multiplied_by_weight_dict(model):
    torch.manual_seed(3)
    weighted = model(batch())
    model.criterion.weight_dict = {}
    torch.manual_seed(3)
    plain = model(batch())
    for name, loss in plain.items():
        torch.testing.assert_close(weighted[name], loss * WEIGHTS.get(name, 1))


def test_masked_padding_does_not_change_detections():
    """With masks, the detections of an image do not depend on the other images of the batch."""
    model = small_detr(mask_padding_at_test=True).eval()
    items = batch((None, None), ((64, 64), (96, 128)))
    with torch.no_grad():
        alone, together = model(items[:1])[0]["instances"], model(items)[0]["instances"]
    torch.testing.assert_close(together.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-3, atol=1e-4)


def test_padding_is_masked_in_training_or_on_request(model):
    images = model.preprocess_image(batch())
    assert torch.equal(model.padding_mask(images), padding_masks(images))
    assert padding_masks(images).any()
    model.eval()
    assert not model.padding_mask(images).any()
    model.mask_padding_at_test = True
    assert torch.equal(model.padding_mask(images), padding_masks(images))


def test_unmasked_padding_is_warned_about_once(log, monkeypatch):
    monkeypatch.setattr("detlib.utils.logger._counts", Counter())
    model = small_detr().eval()
    with torch.no_grad():
        model(batch((None, None), ((64, 64), (64, 64))))
        assert "mask_padding_at_test" not in log.text
        model(batch((None, None)))
        model(batch((None, None)))
    assert log.text.count("mask_padding_at_test") == 1


def test_targets_are_fractions_of_the_image():
    model = small_dino()
    instances = Instances((50, 200), gt_boxes=Boxes([[20.0, 10.0, 60.0, 30.0]]), gt_classes=torch.tensor([2]))
    (target,) = model.prepare_targets([instances])
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.2, 0.4, 0.2, 0.4]]))
    assert target["labels"].tolist() == [2]


def test_dino_keeps_best_scores_over_queries_and_classes():
    model = small_dino(select_box_nums_for_evaluation=4)
    logits = torch.full((1, 5, NUM_CLASSES), -5.0)
    for score, (query, label) in enumerate([(3, 0), (1, 2), (3, 1), (0, 0)]):
        logits[0, query, label] = 4.0 - score
    boxes = torch.rand(1, 5, 4)
    found = model.inference(logits, boxes, [(100, 200)])[0]
    assert found.pred_classes.tolist() == [0, 2, 1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([4.0, 3, 2, 1]).sigmoid())
    cx, cy, w, h = boxes[0, 1].tolist()
    want = [(cx - w / 2) * 200, (cy - h / 2) * 100, (cx + w / 2) * 200, (cy + h / 2) * 100]
    assert found.pred_boxes.tensor[1].tolist() == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert torch.equal(found.pred_boxes.tensor[0], found.pred_boxes.tensor[2])
    more = small_dino(select_box_nums_for_evaluation=300).inference(logits, boxes, [(100, 200)])[0]
    assert len(more) == 5 * NUM_CLASSES


def test_detr_keeps_best_class_of_each_query():
    logits = torch.tensor([[[1.0, 3, 0, 0], [0, 0, 0, 9], [2, 5, 1, 0]]])
    found = small_detr().inference(logits, torch.rand(1, 3, 4), [(10, 10)])[0]
    want = logits[0].softmax(1)[:, :-1].max(1)
    order = want.values.argsort(descending=True)
    torch.testing.assert_close(found.scores, want.values[order])
    assert found.pred_classes.tolist() == want.indices[order].tolist()


def test_batch_first_does_not_change_losses():
    a, b = small_detr(batch_first=False), small_detr(batch_first=True)
    b.load_state_dict(a.state_dict())
    for (name, x), y in zip(a(batch()).items(), b(batch()).values()):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}")


def test_denoising_losses_are_zero_without_dn_number():
    model = small_dino()
    assert {name for name in model(batch()) if "_dn" in name} == {
        f"loss_{kind}_dn{layer}" for kind in ("class", "bbox", "giou") for layer in ("", "_0")
    }
    without = small_dino(dn_number=0)
    losses = without(batch())
    assert all(loss == 0 for name, loss in losses.items() if "_dn" in name)


def test_no_losses_of_earlier_layers_without_aux_loss(model):
    model.aux_loss = False
    names = set(model(batch()))
    assert "loss_class" in names and not {name for name in names if name.endswith("_0")}


def test_label_out_of_range_is_rejected_with_file_name(model):
    items = batch((2, 1))
    items[1]["file_name"] = "b.jpg"
    items[1]["instances"].gt_classes[0] = NUM_CLASSES
    with pytest.raises(ValueError, match=r"item 1 of the batch \(b.jpg\) must be in \[0, 3\).*got \[3\]"):
        model(items)


@pytest.mark.parametrize("name", MODELS)
def test_training_needs_instances(name):
    with pytest.raises(ValueError, match="needs 'instances'"):
        MODELS[name]()(batch((2, None)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: small_dino(num_proposals=9), "num_queries is 12.*two_stage_num_proposals is 9"),
        (lambda: small_dino(embed_dim=64), "embed_dim is 64, but the transformer's encoder has 32"),
        (
            lambda: small_dino(position_embedding=PositionEmbeddingSine(DIM)),
            "num_pos_feats must be half of embed_dim = 32, got 32",
        ),
        (lambda: small_dino(num_classes=5), "num_classes is 5, but its criterion's num_classes is 3"),
        (lambda: small_detr(in_features=["res6"]), "in_features is .'res6'.*gives .'res3', 'res4', 'res5'."),
        (lambda: small_detr(in_channels=8), "in_channels is 8, but 'res5'.* has 16 channels"),
        (lambda: small_deformable_detr(as_two_stage=True), "as_two_stage needs with_box_refine"),
        (
            lambda: small_deformable_detr(return_intermediate=False),
            "return_intermediate of the transformer's decoder must be True",
        ),
    ],
)
def test_modules_that_do_not_fit_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_neck_that_does_not_fit_the_backbone_is_rejected():
    other = neck()
    other.in_features = ["res3", "res4", "p6"]
    with pytest.raises(ValueError, match="the neck's in_features is .*'p6' is not among them"):
        small_dino(neck=other)
    other = neck()
    other.convs[0].conv = nn.Conv2d(9, DIM, 1)
    with pytest.raises(ValueError, match="9 channels for 'res3', but the backbone has 8"):
        small_dino(neck=other)
    with pytest.raises(ValueError, match="num_feature_levels is 4, but the neck gives 3 feature maps"):
        small_dino(neck=neck(num_outs=3))(batch())


def test_more_queries_than_cells_is_rejected():
    with pytest.raises(ValueError, match="num_queries .*is 500, but these images have 163 cells"):
        small_dino(num_queries=500)(batch())


def test_device_argument_is_ignored():
    """The argument exists only for configs that set it."""
    model = small_dino(device="cuda")
    assert model.device.type == "cpu"


def test_only_ce_loss_has_a_buffer():
    assert "criterion.empty_weight" in small_detr().state_dict()
    focal = SetCriterion(NUM_CLASSES, HungarianMatcher(), {})
    assert not focal.state_dict()
