"""Lazy configs, which must equal the published ones, and the instantiation of their optimizers and data."""

import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from detlib.config import LazyConfig, instantiate
from detlib.config._lazy_text import as_plain_data
from detlib.data import DatasetCatalog, DatasetMapper
from detlib.layers import ShapeSpec
from detlib.utils.registry import locate
from tests.shipped_configs.published_lazy import (
    DETR_LIKE,
    FILES,
    NAMES,
    OWN,
    PARTS,
    PUBLISHED,
    differences,
    load,
    tree,
)

RECIPES = [name for name in NAMES if "optimizer" in PUBLISHED[name] and not name.startswith(DETR_LIKE)]


def test_shipped_configs_are_the_published_and_own_ones():
    files = {
        name
        for name in FILES
        if Path(name).stem not in PARTS
        and not name.startswith("Quickstart/")
        and not (name.startswith(DETR_LIKE) and "/models/" in name)
    }
    assert files - set(OWN) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_equals_the_published_one(name):
    found = differences(tree(load(name)), name)
    assert not found, "\n".join(found)


def nodes(value):
    """Yield all nodes with a target in `value`, a tree of plain containers."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes(item)


def test_targets_accept_their_arguments():
    calls = {}
    for name in FILES:
        cfg = OmegaConf.to_container(load(name), resolve=False)
        calls |= {(node["_target_"], *node): name for node in nodes(cfg)}
    assert len(calls) > 50
    for (target, *keys), name in calls.items():
        target = locate(target) if isinstance(target, str) else target
        arguments = dict.fromkeys(key for key in keys if key != "_target_")
        if target is locate("detlib.solver.get_default_optimizer_params"):
            arguments["model"] = None
        try:
            inspect.signature(target).bind(**arguments)
        except TypeError as error:
            pytest.fail(f"{name}: {target}: {error}")


@pytest.mark.parametrize("name", FILES)
def test_saved_config_is_the_same(name, tmp_path):
    cfg = load(name)
    LazyConfig.save(cfg, str(tmp_path / "cfg.yaml"))
    assert as_plain_data(LazyConfig.load(str(tmp_path / "cfg.yaml"))) == as_plain_data(cfg)
    lines = LazyConfig.to_py(cfg).splitlines()
    assert not cfg or lines[0].startswith("cfg.")
    compile("\n".join(lines).replace("<", "_").replace(">", "_"), name, "exec")


class TestOptimizers:
    @pytest.fixture
    def model(self):
        """Return a model with the parameter names that recipes treat separately."""
        block = nn.ModuleDict({"norm": nn.LayerNorm(2), "linear": nn.Linear(2, 2)})
        net = nn.ModuleDict({"blocks": nn.ModuleList([block])})
        net.register_parameter("pos_embed", nn.Parameter(torch.zeros(1)))
        net.register_parameter("relative_position_bias_table", nn.Parameter(torch.zeros(1)))
        backbone = nn.ModuleDict({"net": net})
        return nn.ModuleDict({"backbone": backbone, "roi_heads": nn.Linear(2, 2)})

    @pytest.mark.parametrize("name", RECIPES)
    def test_parameter_groups(self, name, model):
        cfg = copy.deepcopy(load(name).optimizer)
        OmegaConf.set_readonly(cfg, False)
        cfg.params.model = model
        optimizer = instantiate(cfg)
        settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        of = {key: settings[id(p)] for key, p in model.named_parameters()}
        head, norm = of["roi_heads.weight"], of["backbone.net.blocks.0.norm.weight"]
        assert type(optimizer) is cfg._target_ and len(of) == 8
        assert head["lr"] == cfg.lr and head["weight_decay"] == cfg.weight_decay
        is_huge_vit = "vitdet_h" in name
        assert norm["weight_decay"] == (cfg.weight_decay if is_huge_vit else 0.0)
        for table in cfg.params.get("overrides", {}):
            if f"backbone.net.{table}" in of:
                assert of[f"backbone.net.{table}"]["weight_decay"] == 0.0
        if decay := cfg.params.get("lr_factor_func"):
            layers, rate = decay.keywords["num_layers"], decay.keywords["lr_decay_rate"]
            assert norm["lr"] == pytest.approx(cfg.lr * rate**layers)  # block 0: layer 1 of num_layers + 1
            assert of["backbone.net.pos_embed"]["lr"] == pytest.approx(cfg.lr * rate ** (layers + 1))

    @pytest.mark.parametrize("name", RECIPES)
    def test_schedule_has_a_warmup_and_two_decays(self, name):
        node = load(name).lr_multiplier
        multiplier = instantiate(node)
        length, factor = node.warmup_length, node.warmup_factor
        assert multiplier(0.0) == pytest.approx(factor)
        assert multiplier(length / 2) == pytest.approx((1 + factor) / 2)
        milestones = node.scheduler.milestones
        first, second = (m / node.scheduler.get("num_updates", milestones[-1]) for m in milestones[:2])
        positions = (length, first - 1e-4, first + 1e-4, second - 1e-4, second + 1e-4, 1.0)
        assert [multiplier(x) for x in positions] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize(
    "name",
    [
        "common/data/coco.py",
        "common/data/coco_keypoint.py",
        "common/data/coco_panoptic_separated.py",
        "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
        "ViTDet/common/coco_loader_lsj.py",
        "MViTv2/common/coco_loader.py",
        "MViTv2/common/coco_loader_lsj.py",
    ],
)
def test_mappers_are_instantiated(name):
    loaders = load(name).dataloader
    train, test = instantiate(loaders.train.mapper), instantiate(loaders.test.mapper)
    assert isinstance(train, DatasetMapper) and isinstance(test, DatasetMapper)
    assert train.is_train and not test.is_train
    assert train.image_format == test.image_format == loaders.train.mapper.image_format
    assert len(train.augmentations.augs) == len(loaders.train.mapper.augmentations)


def test_datasets_are_registered():
    loaders = [load(name).dataloader for name in NAMES if "dataloader" in PUBLISHED[name]]
    names = {loader[part].dataset.names for loader in loaders for part in ("train", "test")}
    assert names <= set(DatasetCatalog.list()) and len(names) >= 6


def test_arguments_are_instantiated_as_plain_objects():
    cfg = load("common/models/mask_rcnn_c4.py").model
    made = instantiate({**cfg.roi_heads.mask_head, "_target_": dict})
    assert made["input_shape"] == ShapeSpec(channels=2048, height=14, width=14)
    cfg = load("common/models/mask_rcnn_vitdet.py").model
    norm = instantiate({**cfg.backbone.net, "_target_": dict})["norm_layer"]
    assert isinstance(norm, functools.partial) and norm(8).eps == 1e-6
