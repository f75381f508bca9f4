"""The recipes of DINO, Deformable DETR and DETR: optimizers, schedules, and changes in our own recipes."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from detlib.config import LazyConfig, get_config, instantiate, try_get_key
from detlib.config._lazy_text import as_plain_data
from detlib.data import DetrDatasetMapper
from tests.shipped_configs.published_lazy import CONFIGS, DETR_LIKE, FILES, OWN, load

RECIPES = [name for name in FILES if name.startswith(DETR_LIKE) and "/models/" not in name]
EPOCHS = {"12ep": 90000, "24ep": 180000, "50ep": 375000, "300ep": 554400}
DECAYS = {"12ep": 82500, "24ep": 150000, "50ep": 300000, "300ep": 369600}


def schedule_of(name):
    return next(text for text in EPOCHS if f"_{text}" in name)


def test_all_recipes_are_found():
    assert len(RECIPES) == 27 and len(OWN) == 15


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_batch_size_and_schedule(name):
    """The values are AdamW with 1e-4, clipping at 0.1, batches of 16 (DETR: 64), and one decay."""
    cfg = load(name)
    assert (
        cfg.optimizer._target_ is torch.optim.AdamW and cfg.optimizer.lr == cfg.optimizer.weight_decay == 1e-4
    )
    assert cfg.train.clip_grad.params == {"max_norm": 0.1, "norm_type": 2}
    assert cfg.train.clip_grad.enabled == (not name.startswith("DETR/"))
    assert cfg.dataloader.train.total_batch_size == (64 if name.startswith("DETR/") else 16)
    assert cfg.train.max_iter == EPOCHS[schedule_of(name)] and cfg.train.device == "auto"
    multiplier = instantiate(cfg.lr_multiplier)
    decay = DECAYS[schedule_of(name)] / cfg.train.max_iter
    assert [multiplier(x) for x in (0.0, decay - 1e-4, decay + 1e-4, 1.0)] == [1.0, 1.0, 0.1, 0.1]


@pytest.mark.parametrize("name", ["DINO/dino_R_50_4scale_12ep.py", "DINO/dino_vitdet_base_4scale_12ep.py"])
def test_parameter_groups_of_the_optimizer(name):
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])})
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": net}), "transformer": nn.LayerNorm(2)})
    cfg = copy.deepcopy(load(name).optimizer)
    OmegaConf.set_readonly(cfg, False)
    cfg.params.model = model
    settings = {id(p): g for g in instantiate(cfg).param_groups for p in g["params"]}
    of = {key: settings[id(p)] for key, p in model.named_parameters()}
    assert of["transformer.weight"]["lr"] == 1e-4 and of["transformer.weight"]["weight_decay"] == 0.0
    # The learning rate of a ViT decays from layer to layer; other backbones have a tenth of the learning
    # rate.
    first = 1e-4 * 0.7**12 if "vit" in name else 1e-5
    assert of["backbone.net.blocks.0.weight"]["lr"] == pytest.approx(first)
    assert of["backbone.net.blocks.0.weight"]["weight_decay"] == 1e-4


def test_both_names_of_a_recipe_are_the_same_config():
    upper, lower = (load(f"DINO/dino_{r}50_4scale_12ep.py") for r in ("R_", "r"))
    assert as_plain_data(upper) == as_plain_data(lower)


@pytest.mark.parametrize("name", OWN)
def test_own_recipe_has_a_separate_output_folder(name):
    if name == "DINO/dino_r50_4scale_12ep.py":
        return
    cfg = load(name)
    assert cfg.train.output_dir == cfg.dataloader.evaluator.output_dir
    assert sum(load(other).train.output_dir == cfg.train.output_dir for other in RECIPES) == 1


def test_own_recipes_change_only_backbone_and_neck():
    base = load("DINO/dino_R_50_4scale_12ep.py").model
    stages = load("DINO/dino_R_50_DC5_4scale_12ep.py").model.backbone.stages
    assert (
        stages.res5_dilation == 2 and load("DETR/detr_R_101_DC5_300ep.py").model.backbone.stages.depth == 101
    )
    for name in OWN:
        model = as_plain_data(load(name).model)
        if name.startswith("DINO/"):
            for part in ("transformer", "criterion", "position_embedding"):
                assert model[part] == as_plain_data(base[part]), (name, part)


def test_mappers_read_rgb_images():
    for name in RECIPES:
        mapper = load(name).dataloader.train.mapper
        if "vitdet" in name:
            assert mapper.image_format == "RGB"  # the mapper of large-scale jitter, 1024 x 1024
        else:
            assert mapper._target_ is DetrDatasetMapper and mapper.img_format == "RGB"
        assert load(name).model.get("input_format", "RGB") == "RGB"


def test_configs_load_from_any_working_directory(monkeypatch, tmp_path):
    from detlib import model_zoo

    monkeypatch.chdir(tmp_path)
    cfg = model_zoo.get_config("DINO/dino_r50_4scale_12ep.py")
    assert as_plain_data(cfg) == as_plain_data(load("DINO/dino_r50_4scale_12ep.py"))
    train = model_zoo.get_config("common/train.py").train
    assert train.max_iter == 90000 and train.checkpointer.period == 5000
    assert model_zoo.get_config("common/detr.py").lr_multiplier_24ep.scheduler.milestones == [150000, 180000]


def test_get_config_and_try_get_key_of_detrex(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lazy, plain = get_config("common/train.py"), get_config("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    keys = ("MODEL.WEIGHTS", "train.init_checkpoint")
    assert try_get_key(lazy, *keys) == "" and try_get_key(plain, *keys).endswith("R-50.pkl")
    assert try_get_key(lazy, "train.max_iter.more", "model", default=3) == 3
    with pytest.raises(FileNotFoundError, match="Did you mean 'common/train.py'"):
        get_config("common/trian.py")


def test_error_of_an_unresolved_interpolation_names_the_key():
    cfg = LazyConfig.load(str(CONFIGS / "DINO/dino_R_50_4scale_12ep.py"))
    cfg.model.transformer.encoder.num_feature_levels = "${..num_levels}"
    with pytest.raises(Exception, match="num_levels") as error:
        instantiate(cfg.model)
    assert "model.transformer.encoder.num_feature_levels" in str(error.value)
