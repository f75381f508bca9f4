"""Training, resuming and evaluating lazy configs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from detlib.config import LazyConfig
from detlib.engine import LazyTrainer, hooks
from detlib.utils.env import seed_all_rng
from tests.builders import TINY_LAZY_FILE, TINY_LAZY_OVERRIDES, tiny_lazy_config

ROOT = Path(__file__).parents[2]


def test_a_lazy_config_is_trained_evaluated_and_resumed(tmp_path):
    seed_all_rng(1)
    trainer = LazyTrainer(tiny_lazy_config(tmp_path, "train.eval_period=2", "train.checkpointer.period=2"))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    results = trainer.train()
    assert set(results) == {"bbox"} and "AP50" in results["bbox"]
    moved = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert "head.cls_score.weight" in moved and "backbone.bottom_up.stem.conv1.weight" in moved
    rates = [json.loads(line).get("lr") for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any(rates)
    names = {p.name for p in tmp_path.glob("model*")}
    assert names == {"model_0000001.pth", "model_0000003.pth", "model_final.pth"}

    resumed = LazyTrainer(tiny_lazy_config(tmp_path, "train.max_iter=6"))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    resumed.train()
    assert resumed.iter == 6


def test_clip_grad_limits_the_norm_of_all_gradients(tmp_path):
    clip = ["+train.clip_grad.enabled=True", "+train.clip_grad.params.max_norm=0.001"]
    trainer = LazyTrainer(tiny_lazy_config(tmp_path, "train.max_iter=1", "~dataloader.evaluator", *clip))
    trainer.train()
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.001, rel=0.01)


def test_wrong_arguments_of_clip_grad_raise_an_error_before_training(tmp_path):
    clip = ["+train.clip_grad.enabled=True", "+train.clip_grad.params.maxnorm=1"]
    with pytest.raises(TypeError, match="train.clip_grad.params .*clip_grad_norm_: .*max_norm"):
        LazyTrainer(tiny_lazy_config(tmp_path, *clip))


def test_precise_bn_uses_batches_of_one_forward_pass(tmp_path):
    options = ["+train.accum_steps=2", "+train.precise_bn.enabled=True", "+train.precise_bn.num_iter=1"]
    trainer = LazyTrainer(tiny_lazy_config(tmp_path, *options))
    hook = next(h for h in trainer._hooks if isinstance(h, hooks.PreciseBN))
    assert [len(next(iter(loader))) for loader in (trainer.data_loader, hook._data_loader)] == [1, 1]


def test_a_missing_node_raises_an_error_that_names_it(tmp_path):
    cfg = tiny_lazy_config(tmp_path)
    del cfg["lr_multiplier"]
    with pytest.raises(KeyError, match="lacks .'lr_multiplier'.*'dataloader'"):
        LazyTrainer(cfg)


def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_script_runs_a_lazy_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    options = [*TINY_LAZY_OVERRIDES, f"train.output_dir={tmp_path}", "train.max_iter=2"]
    train_net().run(["--config-file", str(TINY_LAZY_FILE), *options])
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "model_final.pth").exists()
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 4
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert saved.train.max_iter == 2 and saved.model.num_classes == 3
    weights = [f"train.init_checkpoint={tmp_path}/model_final.pth"]
    train_net().run(["--config-file", str(TINY_LAZY_FILE), "--eval-only", *options, *weights])
    assert "evaluates random weights" not in (tmp_path / "log.txt").read_text()
    train_net().run(["--config-file", str(TINY_LAZY_FILE), "--eval-only", *options])
    assert "--eval-only evaluates random weights" in (tmp_path / "log.txt").read_text()
    for change, said in (
        ("dataloader.train.dataset.names=shapes:trian", "trian"),
        ("train.init_checkpoint=nothing.pth", "(train.init_checkpoint): the file nothing.pth"),
        ("train.max_itr=3", "max_itr"),
    ):
        with pytest.raises(SystemExit):
            train_net().run(["--config-file", str(TINY_LAZY_FILE), *options, change])
        assert said in capsys.readouterr().err
