"""The settings of a run: declared once, read from YAML and lazy configs, checked and documented."""

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detlib.config import LazyConfig, get_cfg, try_get_key
from detlib.config.run_options import declarations
from detlib.engine.options import RunSettings, option_table, warn_about_unknown_entries
from tests.builders import tiny_cfg

ROOT = Path(__file__).parents[2]


def _lazy_train(change: dict):
    train = LazyConfig.load("configs/common/train.py").train
    train.update(change)
    return train


@pytest.mark.parametrize(
    ("name", "yaml_key", "lazy_key", "default", "other"),
    [
        ("output_dir", "OUTPUT_DIR", "output_dir", "./output", "out"),
        ("seed", "SEED", "seed", -1, 3),
        ("cudnn_benchmark", "CUDNN_BENCHMARK", "cudnn_benchmark", False, True),
        ("timeout", "TRAIN.TIMEOUT", "timeout", 1800, 60),
        ("device", "MODEL.DEVICE", "device", "auto", "cpu"),
        ("weights", "MODEL.WEIGHTS", "init_checkpoint", "", "model.pth"),
        ("report", "TRAIN.REPORT", "report", True, False),
        ("log_period", "TRAIN.LOG_PERIOD", "log_period", 20, 5),
        ("vis_period", "VIS_PERIOD", "vis_period", 0, 100),
        ("accum_steps", "SOLVER.ACCUM_STEPS", "accum_steps", 1, 4),
        ("skip_non_finite", "SOLVER.SKIP_NON_FINITE", "skip_non_finite", 0, 2),
        ("strategy", "TRAIN.STRATEGY", "strategy", "ddp", "fsdp"),
        ("compile", "TRAIN.COMPILE.ENABLED", "compile.enabled", False, True),
        ("eval_epochs", "TEST.EVAL_EPOCHS", "eval_epochs", 0, 0.5),
        ("checkpoint_async", "SOLVER.CHECKPOINT_ASYNC", "checkpointer.async_save", False, True),
    ],
)
def test_yaml_and_lazy_configs_give_the_same_setting(name, yaml_key, lazy_key, default, other):
    cfg, lazy = get_cfg(), OmegaConf.create({"train": {}})
    settings = [RunSettings.from_config(c) for c in (cfg, lazy, {})]
    assert [getattr(s, name) for s in settings] == [default] * 3
    cfg.merge_from_list([yaml_key, other])
    OmegaConf.update(lazy.train, lazy_key, other)
    settings = [RunSettings.from_config(c) for c in (cfg, lazy)]
    assert [getattr(s, name) for s in settings] == [other] * 2


@pytest.mark.parametrize(
    ("name", "off", "yaml_on", "lazy_on"),
    [
        ("precision", "", "float16", "float16"),
        ("ema_decay", 0.0, 0.9998, 0.999),
        ("precise_bn_batches", 0, 200, 200),
        ("profile_steps", 0, 5, 5),
    ],
)
def test_an_option_with_a_switch_is_off_until_it_is_enabled(name, off, yaml_on, lazy_on):
    cfg, lazy = get_cfg(), OmegaConf.create({"train": {}})
    declaration = declarations()[name]
    assert [getattr(RunSettings.from_config(c), name) for c in (cfg, lazy)] == [off, off]
    cfg.merge_from_list([declaration.yaml_switch, True])
    OmegaConf.update(lazy, declaration.lazy_switch, True, force_add=True)
    assert [getattr(RunSettings.from_config(c), name) for c in (cfg, lazy)] == [yaml_on, lazy_on]


def test_every_declared_yaml_key_exists_with_its_default():
    cfg = get_cfg()
    for declaration in declarations().values():
        assert declaration.doc and (declaration.yaml or declaration.lazy)
        if declaration.yaml:
            assert try_get_key(cfg, declaration.yaml, default="missing") == declaration.default


def test_early_stopping_uses_the_mode_of_the_best_checkpoint():
    best = {"metric": "val/total_loss", "mode": "min"}
    lazy = {"best_checkpoint": best, "early_stop": {"patience": 2}}
    assert RunSettings.from_config({"train": lazy}).early_stop_mode == "min"
    lazy["early_stop"]["metric"] = "bbox/AP"
    assert RunSettings.from_config({"train": lazy}).early_stop_mode == "min"
    lazy["early_stop"]["mode"] = "max"
    assert RunSettings.from_config({"train": lazy}).early_stop_mode == "max"


def test_documented_options_are_the_declared_ones():
    page = (ROOT / "docs" / "training.md").read_text()
    assert option_table() in page, (
        'replace the table in docs/training.md by the output of python -c "from detlib.engine.options import '
        'option_table; print(option_table())"'
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TRAIN__WRITERS": ("json", "csvv")}, "Unknown writer 'csvv'.*choose from console, json, csv"),
        (
            {"SOLVER__BEST_CHECKPOINT__METRIC": "val/total_loss"},
            r"SOLVER.BEST_CHECKPOINT.MODE \(train.best_checkpoint.mode\) is 'max', but lower is better",
        ),
        (
            {"SOLVER__EARLY_STOP__METRIC": "val/my set/loss_cls"},
            r"SOLVER.EARLY_STOP.MODE \(train.early_stop.mode\) is 'max', but lower is better for the metric "
            "'val/my set/loss_cls'",
        ),
        ({"SOLVER__EARLY_STOP__PATIENCE": 3}, "Early stopping after 3 evaluations needs a metric"),
        ({"SOLVER__MAX_ITER": 0}, r"SOLVER.MAX_ITER \(train.max_iter\) must be at least 1, got 0"),
        ({"SOLVER__MAX_ITER": -5}, r"SOLVER.MAX_ITER \(train.max_iter\) must be at least 1, got -5"),
        ({"SOLVER__IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH must be at least 1, got 0"),
        ({"SOLVER__IMS_PER_BATCH": -2}, r"SOLVER.IMS_PER_BATCH \(.*\) must be at least 0, got -2"),
        ({"SOLVER__MAX_EPOCHS": math.inf}, "SOLVER.MAX_EPOCHS must be finite, got inf"),
        ({"SOLVER__MAX_EPOCHS": -1.0}, "SOLVER.MAX_EPOCHS must be at least 0, got -1"),
        ({"TEST__EVAL_EPOCHS": math.nan}, r"TEST.EVAL_EPOCHS \(train.eval_epochs\) must be finite, got nan"),
        ({"SOLVER__BASE_LR": math.inf}, "SOLVER.BASE_LR must be finite, got inf"),
        ({"SOLVER__BASE_LR": math.nan}, "SOLVER.BASE_LR must be at least 0, got nan"),
        ({"SOLVER__BASE_LR": -0.1}, "SOLVER.BASE_LR must be at least 0, got -0.1"),
        ({"SOLVER__WEIGHT_DECAY": math.inf}, "SOLVER.WEIGHT_DECAY must be finite, got inf"),
        ({"SOLVER__CLIP_GRADIENTS__CLIP_VALUE": math.inf}, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be finite"),
        ({"SOLVER__CHECKPOINT_KEEP_LAST": -1}, r"SOLVER.CHECKPOINT_KEEP_LAST \(.*max_to_keep\).*, got -1"),
        ({"TRAIN__STRATEGY": "dpp"}, r"TRAIN.STRATEGY \(train.strategy\) must be one of .*'fsdp'.*'dpp'"),
        (
            {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 1.5},
            r"SOLVER.EMA.DECAY \(train.model_ema.decay\) must be in \[0, 1\), got 1.5",
        ),
    ],
)
def test_illegal_values_raise_an_error_that_names_the_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        RunSettings.from_config(tiny_cfg(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_iter": "abc"}, r"SOLVER.MAX_ITER \(train.max_iter\) must be an integer, got 'abc'"),
        ({"max_iter": 2.5}, "must be an integer, got 2.5"),
        ({"eval_period": "x"}, r"TEST.EVAL_PERIOD \(train.eval_period\) must be an integer, got 'x'"),
        ({"eval_epochs": "x"}, r"TEST.EVAL_EPOCHS \(train.eval_epochs\) must be a number, got 'x'"),
        ({"checkpointer": {"period": "a"}}, r"\(train.checkpointer.period\) must be an integer"),
        ({"early_stop": {"patience": "x"}}, r"\(train.early_stop.patience\) must be an integer"),
        ({"model_ema": {"enabled": True, "decay": "x"}}, r"\(train.model_ema.decay\) must be a number"),
        ({"amp": {"enabled": True, "precision": 16}}, r"\(train.amp.precision\) must be a string, got 16"),
        ({"freeze": "backbone"}, r"\(train.freeze\) must be a list of strings, got 'backbone'"),
        ({"activation_checkpoint": "yes"}, r"\(train.activation_checkpoint\) must be True or False"),
    ],
)
def test_wrong_types_raise_an_error_that_names_the_key(change, message):
    with pytest.raises(TypeError, match=message):
        RunSettings.from_config({"train": _lazy_train(change)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": math.inf}, "optimizer.lr must be finite, got inf"),
        ({"lr": -1.0}, "optimizer.lr must be at least 0, got -1.0"),
        ({"params": {"base_lr": math.nan}}, "optimizer.params.base_lr must be at least 0, got nan"),
        ({"weight_decay": math.inf}, "optimizer.weight_decay must be finite, got inf"),
    ],
)
def test_illegal_numbers_of_a_lazy_optimizer_raise_an_error_that_names_the_entry(change, message):
    with pytest.raises(ValueError, match=message):
        RunSettings.from_config({"train": _lazy_train({}), "optimizer": change})


def test_misspelled_entries_of_lazy_configs_are_reported(caplog):
    clip = {"enabled": True, "params": {"max_norm": 1}}
    warn_about_unknown_entries(_lazy_train({"my_own": 1, "clip_grad": clip}))
    assert caplog.text == ""
    warn_about_unknown_entries(_lazy_train({"acum_steps": 2, "model_ema": {"enable": True}}))
    assert "Unknown config entry train.acum_steps is ignored. Did you mean 'accum_steps'?" in caplog.text
    assert "Unknown config entry train.model_ema.enable is ignored. Did you mean 'enabled'?" in caplog.text


def test_writer_arguments_come_from_yaml_and_lazy_configs():
    cfg = tiny_cfg("out", TRAIN__WANDB__PROJECT="cells", TRAIN__MLFLOW__EXPERIMENT="cells")
    settings = RunSettings.from_config(cfg)
    assert settings.writer_arguments == {"wandb": {"project": "cells"}, "mlflow": {"experiment": "cells"}}
    train = LazyConfig.load("configs/common/train.py").train
    train.wandb = {"enabled": True, "params": {"project": "cells"}}
    settings = RunSettings.from_config({"train": train})
    assert settings.writers == ("console", "json", "tensorboard", "csv", "wandb")
    assert settings.writer_arguments["wandb"] == {"project": "cells"}


def test_epochs_need_data_of_known_length():
    lazy = OmegaConf.create({"train": {"eval_epochs": 1}, "dataloader": {"train": {"total_batch_size": 2}}})
    settings = RunSettings.from_config(lazy)
    assert settings.in_iterations(8).eval_period == 4
    message = r"TEST.EVAL_EPOCHS \(train.eval_epochs\) = 1: the length of the training data is unknown"
    with pytest.raises(ValueError, match=message):
        settings.in_iterations(None)


def test_fast_dev_run_is_short():
    cfg = LazyConfig.load(str(ROOT / "configs/DINO/dino_R_50_4scale_12ep.py"))
    before = RunSettings.from_config(cfg)
    assert (before.max_iter, before.eval_period, before.log_period) == (90000, 5000, 20)
    assert before.ema_decay == 0.0 and before.writers[-1] != "wandb" and before.seed == -1
    cfg.train.fast_dev_run.enabled = cfg.train.model_ema.enabled = True
    after = RunSettings.from_config(cfg)
    assert (after.max_iter, after.eval_period, after.log_period) == (20, 10, 1)
    assert after.ema_decay == 0.999 and cfg.train.max_iter == 90000
