"""Models of the lazy configs, which must build and equal those of the YAML configs."""

import gzip
import json
import re

import pytest
import torch

from detlib.config import LazyConfig, get_cfg, instantiate
from detlib.config._lazy_text import as_plain_data
from detlib.modeling import build_model
from detlib.utils.events import EventStorage
from tests.shipped_configs.published_lazy import CONFIGS, HERE, NAMES, OWN, PUBLISHED, load, training_items

STATES = json.loads(gzip.decompress((HERE / "zoo_states.json.gz").read_bytes()))
TWINS = [
    "COCO-Detection/retinanet_R_50_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x",
]


# One config for each distinct model. Recipes that differ only in their length have the same model.
DISTINCT = {json.dumps(PUBLISHED[name]["model"]): name for name in NAMES if "model" in PUBLISHED[name]}


def on_meta(node):
    with torch.device("meta"):
        return build_model(node)


def shapes(model):
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def saved(name, tmp_path):
    """Save and reload a config, without pretrained backbone weights, which would need a download."""
    LazyConfig.save(load(name), str(tmp_path / "cfg.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "cfg.yaml"))
    if "pretrained" in cfg.model.get("backbone", {}):
        assert cfg.model.backbone.pretrained
        cfg.model.backbone.pretrained = False
    return cfg


@pytest.mark.parametrize("name", DISTINCT.values())
def test_model_is_built(name, tmp_path):
    model = on_meta(saved(name, tmp_path).model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# Models that take long to build.
SLOW = (
    "DINO/dino_timm_resnet152d",
    "DINO/dino_timm_convnext_base",
    "DINO/dino_R_101",
    "DETR/detr_R_101",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n.startswith(SLOW) else []) for n in OWN],
)
def test_own_model_is_built_with_a_neck_that_fits_the_backbone(name, tmp_path):
    if "timm" in name:
        pytest.importorskip("timm")
    cfg = saved(name, tmp_path)
    model = on_meta(cfg.model)
    shapes = model.backbone.output_shape()
    if name.startswith("DETR/"):
        assert shapes[model.in_features[-1]].channels == cfg.model.in_channels == 2048
        assert shapes["res5"].stride == (16 if "DC5" in name else 32)
        return
    assert {n: shapes[n].channels for n in model.neck.in_features} == {
        n: cfg.model.neck.input_shapes[n].channels for n in cfg.model.neck.in_features
    }
    with torch.device("meta"):
        scales = model.neck({n: torch.empty(1, s.channels, 4, 4) for n, s in shapes.items()})
    assert len(scales) == cfg.model.transformer.num_feature_levels


@pytest.mark.parametrize("name", [name for name in STATES if name.endswith("100ep_LSJ.py")])
def test_model_of_saved_config_has_the_published_state(name, tmp_path):
    LazyConfig.save(load(name), str(tmp_path / "cfg.yaml"))
    model = on_meta(LazyConfig.load(str(tmp_path / "cfg.yaml")).model)
    assert shapes(model) == dict(STATES[name]["state"])
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == set(STATES[name]["frozen"])


@pytest.mark.parametrize("name", [name for name in STATES if name.endswith(".py") and "100ep" not in name])
def test_longer_recipe_has_the_same_model(name):
    base = re.sub(r"\d+ep", "100ep", name)
    assert STATES[name] == STATES[base]
    assert as_plain_data(load(name).model) == as_plain_data(load(base).model)


@pytest.mark.parametrize("name", TWINS)
def test_yaml_and_lazy_config_have_the_same_model(name):
    """Parameters and frozen parameters must be the same, and for the same seed the losses."""
    if f"{name}.py" not in NAMES:
        pytest.skip("there is no lazy config with this name")
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    models = [build_model(cfg), instantiate(load(f"{name}.py").model)]
    assert shapes(models[0]) == shapes(models[1])
    frozen = [{key for key, p in model.named_parameters() if not p.requires_grad} for model in models]
    assert frozen[0] == frozen[1] and frozen[0]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    for model in models:
        torch.manual_seed(1)
        with EventStorage(), torch.no_grad():
            losses.append(model.train()(training_items(model)))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        assert value > 0 and value.isfinite(), key
        torch.testing.assert_close(
            losses[1][key], value, rtol=1e-5, atol=0.0, msg=lambda m, k=key: f"{k}: {m}"
        )
