"""Training DINO from random weights with the lazy trainer."""

import json

import pytest
from torch import nn
from torch._dynamo.utils import counters

from detlib.config import LazyConfig
from detlib.engine import LazyTrainer
from detlib.utils.env import seed_all_rng
from tests.shipped_configs.published_lazy import CONFIGS


def shapes_config(tmp_path, **train):
    cfg = LazyConfig.load(str(CONFIGS / "Quickstart/dino_R_18_4scale_shapes.py"))
    cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = "shapes:train?num=8"
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    cfg.train.update(output_dir=str(tmp_path), device="cpu", **train)
    cfg.dataloader.evaluator.output_dir = str(tmp_path)
    return cfg


def test_a_step_is_saved_resumed_and_evaluated(tmp_path):
    """One step of the shipped config: train, save, resume, evaluate."""
    cfg = shapes_config(tmp_path, max_iter=1)
    cfg.model.transformer.encoder.num_layers = cfg.model.transformer.decoder.num_layers = 1
    cfg.dataloader.train.mapper.augmentation[1].short_edge_length = (96,)
    cfg.dataloader.test.mapper.augmentation[0].short_edge_length = 96
    trainer = LazyTrainer(cfg)
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} <= {cfg.optimizer.lr * f for f in (1.0, 0.001)}
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trainer.model.modules())
    trainer.train()
    cfg.train.max_iter = 2
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1
    trainer.train()
    assert set(LazyTrainer.test(cfg, trainer.model)) == {"bbox"}


@pytest.mark.slow
def test_compiled_parts_give_the_same_losses(tmp_path):
    found = []
    for enabled in (False, True):
        seed_all_rng(1)
        cfg = shapes_config(tmp_path / str(enabled), max_iter=2, log_period=1)
        cfg.train.compile = {"enabled": enabled, "backend": "eager"}
        del cfg.dataloader.evaluator
        trainer = LazyTrainer(cfg)
        counters.clear()
        trainer.train()
        assert (counters["stats"]["unique_graphs"] > 1) == enabled
        lines = [
            json.loads(line) for line in (tmp_path / str(enabled) / "metrics.json").read_text().splitlines()
        ]
        found.append([{k: v for k, v in line.items() if "loss" in k} for line in lines])
    plain, compiled = found
    assert len(plain) == 2 and len(plain[0]) > 20
    for one, two in zip(plain, compiled, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_overfits_eight_images(device, tmp_path):
    """300 steps of two images, about 1.5 s each on one core; in bfloat16 on a GPU."""
    cfg = shapes_config(tmp_path, max_iter=300, seed=0)
    cfg.train.device = device
    cfg.train.amp.update(enabled=device == "cuda", precision="bfloat16")
    cfg.lr_multiplier.scheduler.milestones = [250, 300]
    cfg.dataloader.train.mapper.augmentation = cfg.dataloader.train.mapper.augmentation[1:]  # no flips
    trainer = LazyTrainer(cfg)
    trainer.train()
    results = LazyTrainer.test(cfg, trainer.model)
    assert results["bbox"]["AP50"] >= 90, results
