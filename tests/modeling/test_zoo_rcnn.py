"""Models with the second stages of the zoo: C4, keypoint, cascade, GN and class-agnostic heads."""

import pytest
import torch

from detlib.modeling import build_model
from detlib.structures import Keypoints
from detlib.utils.events import EventStorage
from tests.builders import small_config, training_batch

KEYPOINTS = {"MODEL__KEYPOINT_ON": True, "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (8, 8)}
CASCADE_YAML = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
# Name: config, overrides, losses of the second stage.
MODELS = {
    "c4": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        {"MODEL__ROI_MASK_HEAD__NUM_CONV": 0, "MODEL__RESNETS__WIDTH_PER_GROUP": 8},
        {"loss_cls", "loss_box_reg", "loss_mask"},
    ),
    "keypoint": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        KEYPOINTS,
        {"loss_cls", "loss_box_reg", "loss_keypoint"},
    ),
    "cascade": (
        CASCADE_YAML,
        KEYPOINTS,
        {f"loss_{x}_stage{k}" for x in ("cls", "box_reg") for k in range(3)} | {"loss_mask", "loss_keypoint"},
    ),
    "gn": (
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
        {"MODEL__ROI_MASK_HEAD__CONV_DIM": 32, "MODEL__ROI_BOX_HEAD__CONV_DIM": 32},
        {"loss_cls", "loss_box_reg", "loss_mask"},
    ),
    "agnostic": (
        "Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml",
        {"MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES": True, "MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "giou"},
        {"loss_cls", "loss_box_reg", "loss_mask"},
    ),
}
RPN_LOSSES = {"loss_rpn_cls", "loss_rpn_loc"}


def make_model(name: str) -> torch.nn.Module:
    config, overrides, _ = MODELS[name]
    torch.manual_seed(0)
    return build_model(small_config(config, **overrides))


@pytest.fixture(scope="module")
def models():
    """Return a function that builds each model on first use; tests must not change its parameters."""
    built = {}

    def get(name: str) -> torch.nn.Module:
        if name not in built:
            built[name] = make_model(name)
        built[name].zero_grad(set_to_none=True)
        torch.manual_seed(1)
        return built[name].train()

    return get


def batch(empty=(False, False)) -> list[dict]:
    """Return the batch of `training_batch` with 17 visible keypoints for each object."""
    generator = torch.Generator().manual_seed(5)
    items = training_batch(empty)
    for item in items:
        boxes = item["instances"].gt_boxes.tensor[:, None]
        points = torch.rand(len(boxes), 17, 2, generator=generator)
        points = boxes[..., :2] + points * (boxes[..., 2:] - boxes[..., :2])
        keypoints = torch.cat([points, torch.full_like(points[..., :1], 2)], dim=2)
        item["instances"].gt_keypoints = Keypoints(keypoints)
    return items


@pytest.mark.parametrize("name", MODELS)
def test_training_step_gives_every_parameter_a_gradient(models, name):
    model = models(name)
    with EventStorage() as storage:
        losses = model(batch())
    assert set(losses) == MODELS[name][2] | RPN_LOSSES
    assert all(v.dim() == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    if name == "cascade":
        logged = set(storage.latest())
        assert {"keypoint_head/num_fg_samples", "stage2/roi_head/num_bg_samples"} <= logged
        assert {"stage0/fast_rcnn/cls_accuracy", "mask_rcnn/accuracy"} <= logged


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("empty", [(True, True), (False, True)])
def test_images_without_objects_give_finite_losses(models, name, empty):
    model = models(name)
    losses = model(batch(empty))
    assert set(losses) == MODELS[name][2] | RPN_LOSSES
    if all(empty):
        assert all(v.item() == 0 for key, v in losses.items() if "_cls" not in key)
    sum(losses.values()).backward()
    # Distributed training requires that every parameter has a gradient, even if it is zero.
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast"])
def test_losses_are_finite_in_other_precisions(models, name, kind):
    if kind == "autocast":
        model = models(name)
    else:
        model = make_model(name).to(getattr(torch, kind)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        losses = model(batch())
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        with torch.no_grad():
            x = model.eval()(batch())[0]["instances"]
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(x) and x.scores.dtype == x.pred_boxes.tensor.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_fields_and_sizes_of_the_heads(models, name):
    model = models(name).eval()
    items = [{**item, "height": 128, "width": 192} for item in batch()]
    x = model(items)[0]["instances"]
    assert 0 < len(x) <= 20 and x.image_size == (128, 192)
    losses = MODELS[name][2]
    if "loss_mask" in losses:
        assert x.pred_masks.shape == (len(x), 128, 192) and x.pred_masks.dtype == torch.bool
    if "loss_keypoint" in losses:
        assert x.pred_keypoints.shape == (len(x), 17, 3) and (x.pred_keypoints[..., 2] > 0).all()
        # Each keypoint is in its box, up to half a pixel of the heatmap.
        points, boxes = x.pred_keypoints[..., :2], x.pred_boxes.tensor[:, None]
        assert (points > boxes[..., :2] - 1).all() and (points < boxes[..., 2:] + 1).all()
        # With given boxes, only the other heads run.
        (raw,) = model.inference(items[:1], do_postprocess=False)
        given = raw[:3]
        for field in set(given.get_fields()) - {"pred_boxes", "pred_classes"}:
            given.remove(field)
        (again,) = model.inference(items[:1], detected_instances=[given], do_postprocess=False)
        torch.testing.assert_close(again.pred_keypoints, raw.pred_keypoints[:3])
        assert again.pred_keypoint_heatmaps.shape == (3, 17, 56, 56)


def test_missing_keypoints_raise(models):
    with pytest.raises(ValueError, match="gt_keypoints.*KEYPOINT_ON"):
        models("keypoint")(training_batch())
