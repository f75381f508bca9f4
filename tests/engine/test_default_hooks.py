"""The hooks that both kinds of config ask for by their keys."""

import csv
import logging

import pytest

from detlib.config import LazyCall, LazyConfig
from detlib.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detlib.data import transforms as T  # noqa: N812
from detlib.engine import DefaultTrainer, LazyTrainer, hooks, option_checks
from detlib.engine.options import RunOptions
from detlib.engine.setup import RUN_SETTINGS
from detlib.utils import comm
from detlib.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detlib.utils.writers import CSVWriter
from tests.builders import tiny_cfg, tiny_lazy_config

ALL = [
    "IterationTimer",
    "LRScheduler",
    "StepsProfiler",
    "TrainingPictures",
    "PreciseBN",
    "PeriodicCheckpointer",
    "EvalHook",
    "BestCheckpointer",
    "EarlyStopping",
    "MissedEvaluation",
    "PeriodicWriter",
]


def yaml_trainer(folder, **more):
    return DefaultTrainer(
        tiny_cfg(
            folder,
            MODEL__RESNETS__NORM="BN",
            SOLVER__MAX_ITER=4,
            SOLVER__CHECKPOINT_PERIOD=2,
            SOLVER__CHECKPOINT_KEEP_LAST=1,
            SOLVER__BEST_CHECKPOINT__METRIC="val/total_loss",
            SOLVER__BEST_CHECKPOINT__MODE="min",
            SOLVER__EARLY_STOP__PATIENCE=2,
            TEST__EVAL_EPOCHS=0.5,
            TEST__PRECISE_BN__ENABLED=True,
            TEST__PRECISE_BN__NUM_ITER=1,
            TEST__VAL_LOSS=("shapes:val?num=2&size=64",),
            VIS_PERIOD=3,
            TRAIN__PROFILE__ENABLED=True,
            TRAIN__PROFILE__START=1,
            TRAIN__PROFILE__STEPS=1,
            TRAIN__LOG_PERIOD=2,
            **more,
        )
    )


def lazy_trainer(folder, *more):
    cfg = tiny_lazy_config(
        folder,
        "train.max_iter=4",
        "train.checkpointer.period=2",
        "train.checkpointer.max_to_keep=1",
        "+train.best_checkpoint={metric: val/total_loss, mode: min}",
        "+train.early_stop.patience=2",
        "+train.eval_epochs=0.5",
        "+train.precise_bn={enabled: true, num_iter: 1}",
        "+train.vis_period=3",
        "+train.profile={enabled: true, start: 1, steps: 1}",
        "train.log_period=2",
        *more,
    )
    cfg.dataloader.val_loss = LazyCall(build_detection_test_loader)(
        dataset=LazyCall(get_detection_dataset_dicts)(names="shapes:val?num=2&size=64", filter_empty=False),
        mapper=LazyCall(DatasetMapper)(
            is_train=True,
            augmentations=[LazyCall(T.ResizeShortestEdge)(short_edge_length=64, max_size=192)],
            image_format="BGR",
        ),
    )
    return LazyTrainer(cfg)


@pytest.mark.parametrize("make", [yaml_trainer, lazy_trainer])
def test_every_key(tmp_path, make):
    trainer = make(tmp_path)
    by_name = {type(h).__name__: h for h in trainer._hooks}
    assert [type(h).__name__ for h in trainer._hooks] == ALL
    # Half of an epoch of eight pictures, two a step.
    assert trainer.options.eval_period == by_name["EvalHook"]._period == by_name["PreciseBN"]._period == 2
    assert by_name["PeriodicCheckpointer"].period == 2 and by_name["PeriodicCheckpointer"].max_to_keep == 1
    assert by_name["BestCheckpointer"]._mode == by_name["EarlyStopping"]._mode == "min"
    writer = by_name["PeriodicWriter"]
    assert writer._period == 2
    assert [type(w) for w in writer._writers] == [
        CommonMetricPrinter,
        JSONWriter,
        CSVWriter,
        TensorboardXWriter,
    ]
    results = trainer.train()
    assert "bbox" in results and results["val"]["total_loss"] > 0
    for name in (
        "train_pictures/iter_0000002.jpg",
        "profile/trace_iter1-1.json",
        "model_final.pth",
        "model_best.pth",
        "early_stop.json",
        "metrics.json",
    ):
        assert (tmp_path / name).exists(), name
    with open(tmp_path / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    # The last evaluation comes after the last step.
    assert [(int(r["iteration"]), r["val/total_loss"] != "", r["lr"] != "") for r in rows] == [
        (1, True, True),
        (3, False, True),
        (4, True, False),
    ]


def test_several_validation_sets_of_a_lazy_config(tmp_path):
    trainer = lazy_trainer(tmp_path)
    node = trainer.cfg.dataloader.val_loss
    assert list(trainer._val_loss_loaders()) == ["val_loss"]
    trainer.cfg.dataloader.val_loss = {"day": node, "night": node}
    loaders = trainer._val_loss_loaders()
    assert list(loaders) == ["day", "night"] and len(loaders["night"]) == 2


def test_without_keys_there_is_what_there_was(tmp_path):
    trainer = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=()))
    names = [type(h).__name__ for h in trainer._hooks]
    assert names == ["IterationTimer", "LRScheduler", "PeriodicCheckpointer", "EvalHook", "PeriodicWriter"]
    trainer.train()
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.csv", "metrics.json", "model_final.pth"}


def test_hooks_and_writers_can_be_overridden(tmp_path):
    class Mine(DefaultTrainer):
        def build_writers(self):
            return [JSONWriter(str(tmp_path / "mine.json"))]

        def build_hooks(self):
            return [h for h in super().build_hooks() if not isinstance(h, hooks.EvalHook)]

    trainer = Mine(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1))
    assert trainer.train() is None and (tmp_path / "mine.json").exists()
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TRAIN__WRITERS": ("json", "csvv")}, "no writer 'csvv'.*legal are console, json, csv"),
        (
            {"SOLVER__BEST_CHECKPOINT__METRIC": "val/total_loss"},
            r"SOLVER.BEST_CHECKPOINT.MODE \(train.best_checkpoint.mode\) is 'max', but less is better",
        ),
        (
            {"SOLVER__EARLY_STOP__METRIC": "val/my set/loss_cls"},
            r"SOLVER.EARLY_STOP.MODE \(train.early_stop.mode\) is 'max', but less is better of the metric "
            "'val/my set/loss_cls'",
        ),
        ({"SOLVER__EARLY_STOP__PATIENCE": 3}, "Early stopping after 3 evaluations needs a metric"),
        ({"SOLVER__MAX_ITER": 0}, r"SOLVER.MAX_ITER \(train.max_iter\) must be at least 1, got 0"),
        ({"SOLVER__CHECKPOINT_KEEP_LAST": -1}, r"SOLVER.CHECKPOINT_KEEP_LAST \(.*max_to_keep\).*, got -1"),
        ({"TRAIN__STRATEGY": "dpp"}, r"TRAIN.STRATEGY \(train.strategy\) must be one of .*'fsdp'.*'dpp'"),
        (
            {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 1.5},
            r"SOLVER.EMA.DECAY \(train.model_ema.decay\) lies in \[0, 1\), got 1.5",
        ),
    ],
)
def test_mistakes_are_told_early(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        RunOptions.from_cfg(tiny_cfg(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_iter": "abc"}, r"SOLVER.MAX_ITER \(train.max_iter\) must be a whole number, got 'abc'"),
        ({"max_iter": 2.5}, "must be a whole number, got 2.5"),
        ({"eval_period": "x"}, r"TEST.EVAL_PERIOD \(train.eval_period\) must be a whole number, got 'x'"),
        ({"eval_epochs": "x"}, "train.eval_epochs must be a number, got 'x'"),
        ({"checkpointer": {"period": "a"}}, r"\(train.checkpointer.period\) must be a whole number"),
        ({"early_stop": {"patience": "x"}}, r"\(train.early_stop.patience\) must be a whole number"),
        ({"model_ema": {"enabled": True, "decay": "x"}}, r"\(train.model_ema.decay\) must be a number"),
        ({"amp": {"enabled": True, "precision": 16}}, r"\(train.amp.precision\) must be a string, got 16"),
        ({"freeze": "backbone"}, r"\(train.freeze\) must be a list of strings, got 'backbone'"),
        ({"activation_checkpoint": "yes"}, r"\(train.activation_checkpoint\) must be True or False"),
    ],
)
def test_wrong_types_in_lazy_configs_are_told(change, message):
    with pytest.raises(TypeError, match=message):
        RunOptions.from_lazy(_lazy_train(change))


def _lazy_train(change: dict):
    train = LazyConfig.load("configs/common/train.py").train
    train.update(change)
    return train


def test_passes_that_the_processes_cannot_share_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = tiny_cfg(tmp_path, SOLVER__ACCUM_STEPS=2)
    message = "SOLVER.IMS_PER_BATCH = 2 must be a multiple of SOLVER.ACCUM_STEPS = 2 times .* processes, 2"
    with pytest.raises(ValueError, match=message):
        DefaultTrainer.build_train_loader(cfg)
    message = "total_batch_size = 2 must be a multiple of train.accum_steps = 2 times .* processes, 2"
    with pytest.raises(ValueError, match=message):
        LazyTrainer(tiny_lazy_config(tmp_path, "+train.accum_steps=2"))


def test_misspelt_entries_of_lazy_configs_are_told(caplog):
    clip = {"enabled": True, "params": {"max_norm": 1}}
    RunOptions.from_lazy(_lazy_train({"my_own": 1, "clip_grad": clip}))
    assert caplog.text == ""
    RunOptions.from_lazy(_lazy_train({"acum_steps": 2, "model_ema": {"enable": True}}))
    assert "The config's train.acum_steps is read by nobody. Did you mean 'accum_steps'?" in caplog.text
    assert "The config's train.model_ema.enable is read by nobody. Did you mean 'enabled'?" in caplog.text


class Recording(dict):
    """Notes what is asked for, by the path from the top."""

    def __init__(self, asked: set[str], path: str = ""):
        super().__init__(max_iter=1, output_dir="")
        self.asked, self.path = asked, path

    def get(self, key, default=None):
        self.asked.add(f"{self.path}{key}")
        if key == "enabled":  # a trial run leaves much out
            return self.path != "fast_dev_run."
        if key in ("ddp", "params") or not isinstance(default, dict):
            return default
        return Recording(self.asked, f"{self.path}{key}.")

    def __getattr__(self, key):
        self.asked.add(key)
        return self[key]


def test_all_entries_that_are_read_are_known():
    asked: set[str] = set()
    RunOptions.from_lazy(Recording(asked))
    asked |= {lazy_key.removeprefix("train.") for _, lazy_key, _ in RUN_SETTINGS.values()}
    assert {"max_iter", "amp.precision", "model_ema.decay", "wandb.params", "timeout"} <= asked
    for entry in asked:
        name, _, below = entry.partition(".")
        assert name in option_checks._ENTRIES, entry
        assert not below or below in option_checks._ENTRIES[name], entry


def test_early_stopping_without_evaluations_is_told(tmp_path, caplog):
    cfg = tiny_cfg(tmp_path, SOLVER__EARLY_STOP__PATIENCE=3, SOLVER__EARLY_STOP__METRIC="bbox/AP")
    with caplog.at_level(logging.INFO, logger="detlib"):
        DefaultTrainer(cfg)
    assert "no evaluation before its end. Set TEST.EVAL_PERIOD or TEST.EVAL_EPOCHS" in caplog.text


def test_names_for_the_services():
    cfg = tiny_cfg("out", TRAIN__WANDB__PROJECT="cells", TRAIN__MLFLOW__EXPERIMENT="cells")
    options = RunOptions.from_cfg(cfg)
    assert options.writer_params == {"wandb": {"project": "cells"}, "mlflow": {"experiment": "cells"}}
    train = LazyConfig.load("configs/common/train.py").train
    train.wandb = {"enabled": True, "params": {"project": "cells"}}
    options = RunOptions.from_lazy(train)
    assert options.writers == ("console", "json", "tensorboard", "csv", "wandb")
    assert options.writer_params["wandb"] == {"project": "cells"}
    train.eval_epochs = 1
    with pytest.raises(ValueError, match="train.eval_epochs = 1: the training data do not tell their length"):
        RunOptions.from_lazy(train)
