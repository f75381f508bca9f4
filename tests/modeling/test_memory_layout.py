"""Memory layout of feature maps: channels-last where it makes convolutions faster."""

import pytest
import torch

from tests.modeling.architectures import architecture_batch, build_architecture
from tests.modeling.detr.small_models import MODELS
from tests.modeling.detr.small_models import batch as detr_batch


def layouts(model: torch.nn.Module, modules: list[torch.nn.Module], items: list[dict]) -> set[str]:
    """Return the layouts of the inputs of modules in a training step and in a prediction."""
    found = set()

    def record_layout(module, args):
        is_contiguous = args[0].is_contiguous()
        is_channels_last = args[0].is_contiguous(memory_format=torch.channels_last)
        if not (is_contiguous and is_channels_last):  # a feature map of one pixel is both
            found.add("contiguous" if is_contiguous else "channels-last" if is_channels_last else "neither")

    for module in modules:
        module.register_forward_pre_hook(record_layout)
    sum(model.train()(items).values()).backward()
    with torch.no_grad():
        model.eval()(items)
    return found


def convolutions(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize(
    "name", ["mask_rcnn", "dc5", "deformable", "gn", "frozen", "syncbn", "c4", "retinanet", "regnety"]
)
def test_convolutions_of_backbones_get_channels_last_features(name):
    model = build_architecture(name)
    assert layouts(model, convolutions(model), architecture_batch(name)) == {"channels-last"}


@pytest.mark.parametrize("name", ["mask_rcnn", "dc5", "cascade"])
def test_box_heads_get_contiguous_features(name):
    model = build_architecture(name)
    head = model.roi_heads.box_head
    heads = list(head) if isinstance(head, torch.nn.ModuleList) else [head]
    assert layouts(model, heads, architecture_batch(name)) == {"contiguous"}


@pytest.mark.parametrize(
    ("name", "head"),
    [("mask_rcnn", "mask_head"), ("keypoint", "keypoint_head"), ("gn", "box_head"), ("c4", "mask_head")],
)
def test_convolutions_of_heads_get_channels_last_features(name, head):
    model = build_architecture(name)
    convolutions = [m for m in getattr(model.roi_heads, head).modules() if isinstance(m, torch.nn.Conv2d)]
    assert layouts(model, convolutions, architecture_batch(name)) == {"channels-last"}


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_of_detr_models_get_contiguous_features(name):
    model = MODELS[name]()
    assert layouts(model, convolutions(model), detr_batch()) == {"contiguous"}
