"""What all architectures must do: train and predict in any dtype, and train on pictures without objects."""

import pytest
import torch

from detlib.modeling import build_model
from detlib.structures import Boxes, Instances, Keypoints
from detlib.utils.events import EventStorage
from tests.modeling.small_rcnn import (
    BOTTLENECKS,
    FAST_RCNN,
    FASTER_RCNN,
    MASK_RCNN,
    RPN,
    picture,
    small_config,
    truth,
)

HEIGHT, WIDTH = 64, 96
INSTANCES = "COCO-InstanceSegmentation"
YAML = {
    "faster_rcnn": (FASTER_RCNN, {}),
    "mask_rcnn": (MASK_RCNN, {}),
    "giou": (f"{INSTANCES}/mask_rcnn_R_50_FPN_1x_giou.yaml", {}),
    "class_agnostic": ("Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml", {}),
    "dc5": (f"{INSTANCES}/mask_rcnn_R_50_DC5_1x.yaml", BOTTLENECKS),
    "deformable": ("Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml", BOTTLENECKS),
    "modulated": (
        "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
        BOTTLENECKS | {"MODEL__RESNETS__DEFORM_MODULATED": True},
    ),
    "syncbn": (
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
        {"MODEL__RESNETS__NORM": "SyncBN", "MODEL__ROI_BOX_HEAD__CONV_DIM": 16},
    ),
    "gn": (
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
        {"MODEL__ROI_BOX_HEAD__CONV_DIM": 32, "MODEL__ROI_MASK_HEAD__CONV_DIM": 32},
    ),
    "frozen": (
        MASK_RCNN,
        {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__BACKBONE__FREEZE_AT": 2},
    ),
    "sigmoid": (FASTER_RCNN, {"MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE": True}),
    "rpn": (RPN, {}),
    "rpn_c4": ("COCO-Detection/rpn_R_50_C4_1x.yaml", BOTTLENECKS),
    "fast_rcnn": (FAST_RCNN, {}),
    "semantic": ("Misc/semantic_R_50_FPN_1x.yaml", {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32}),
    "panoptic": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
        {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32},
    ),
}
ARCHITECTURES = list(YAML)


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config, overrides = YAML[name]
    return build_model(small_config(config, **overrides))


def objects(boxes) -> Instances:
    """Truth of every kind: boxes, classes, masks and keypoints."""
    out = truth(boxes=boxes)
    points = torch.rand(len(boxes), 17, 3, generator=torch.Generator().manual_seed(0))
    boxes = out.gt_boxes.tensor[:, None]
    points[..., :2] = boxes[..., :2] + points[..., :2] * (boxes[..., 2:] - boxes[..., :2])
    points[..., 2] = 2  # visible
    out.gt_keypoints = Keypoints(points)
    return out


def batch(boxes=((8, 8, 40, 40), (30, 20, 90, 60))) -> list[dict]:
    """Two pictures with every key that a model may ask for."""
    regions = torch.tensor([[6.0, 6, 42, 38], [0, 0, 20, 30], [32, 20, 88, 60], [50, 5, 90, 25]])
    return [
        {
            "image": picture(HEIGHT, WIDTH, seed=seed),
            "instances": objects(boxes),
            "proposals": Instances(
                (HEIGHT, WIDTH), proposal_boxes=Boxes(regions), objectness_logits=torch.arange(4.0)
            ),
            "sem_seg": torch.arange(HEIGHT)[:, None].expand(HEIGHT, WIDTH) // 16,
        }
        for seed in range(2)
    ]


def tensors_of(output: dict):
    """Every floating point tensor in what a model returned for a picture."""
    for value in output.values():
        if isinstance(value, Instances):
            fields = [getattr(x, "tensor", x) for x in value.get_fields().values()]
            yield from (x for x in fields if x.is_floating_point())
        elif isinstance(value, torch.Tensor):
            yield value


def train_and_predict(model: torch.nn.Module, autocast: bool = False) -> dict[str, torch.Tensor]:
    """One training step and one prediction, both finite; returns the losses."""
    torch.manual_seed(1)  # of the sampling
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.train()(batch())
        assert losses and all(x.dim() == 0 and x.isfinite() for x in losses.values()), losses
        sum(losses.values()).backward()
        with torch.no_grad():
            outputs = model.eval()(batch())
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all())
    assert len(outputs) == 2
    for output in outputs:
        assert output and all(len(x) and x.isfinite().all() for x in tensors_of(output))
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_double(name):
    losses = train_and_predict(built(name).double())
    expected = train_and_predict(built(name))
    for key, value in expected.items():
        torch.testing.assert_close(
            losses[key].float(), value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16(name):
    train_and_predict(built(name).bfloat16())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_autocast(name):
    train_and_predict(built(name), autocast=True)


def trained(model: torch.nn.Module, items: list[dict]) -> set[str]:
    """Names of the parameters that one step gives a gradient."""
    model.train().zero_grad(set_to_none=True)
    losses = model(items)
    assert all(x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pictures_without_objects_train_the_same_parameters(name):
    model = built(name)
    usual = trained(model, batch())
    assert usual == {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained(model, batch(boxes=())) == usual
    assert trained(model, [batch()[0], batch(boxes=())[1]]) == usual


def test_deformable_convolutions_train_on_the_cpu():
    model = built("deformable")
    offsets = [m for name, m in model.named_modules() if name.endswith("conv2_offset")]
    assert len(offsets) == 13 and all(not m.weight.any() for m in offsets)  # res3 to res5 of ResNet-50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for _ in range(12):
        torch.manual_seed(1)
        losses = model(batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(sum(losses.values()).item())
    assert min(history[-3:]) < 0.7 * history[0], history
    assert all(m.weight.any() for m in offsets)
