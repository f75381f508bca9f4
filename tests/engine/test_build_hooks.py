"""The hooks that the options of YAML and lazy configs add."""

import csv
import logging

import pytest

from detlib.config import LazyCall
from detlib.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detlib.data import transforms as T  # noqa: N812
from detlib.engine import DefaultTrainer, LazyTrainer, hooks
from detlib.utils import comm
from detlib.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detlib.utils.writers import CSVWriter
from tests.builders import tiny_cfg, tiny_lazy_config

ALL = [
    "IterationTimer",
    "LRScheduler",
    "StepsProfiler",
    "TrainingImages",
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
def test_each_option_adds_its_hook_in_yaml_and_lazy_configs(tmp_path, make):
    trainer = make(tmp_path)
    by_name = {type(h).__name__: h for h in trainer._hooks}
    assert [type(h).__name__ for h in trainer._hooks] == ALL
    # Half an epoch of eight images, two per step.
    assert trainer.settings.eval_period == by_name["EvalHook"]._period == by_name["PreciseBN"]._period == 2
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
        "train_images/iter_0000002.jpg",
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


def test_lazy_val_loss_is_one_loader_or_a_dict_of_loaders(tmp_path):
    trainer = lazy_trainer(tmp_path)
    node = trainer.cfg.dataloader.val_loss
    assert list(trainer.build_val_loss_loaders()) == ["val_loss"]
    trainer.cfg.dataloader.val_loss = {"day": node, "night": node}
    loaders = trainer.build_val_loss_loaders()
    assert list(loaders) == ["day", "night"] and len(loaders["night"]) == 2


def test_default_options_build_the_basic_hooks(tmp_path):
    trainer = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=()))
    names = [type(h).__name__ for h in trainer._hooks]
    assert names == ["IterationTimer", "LRScheduler", "PeriodicCheckpointer", "EvalHook", "PeriodicWriter"]
    trainer.train()
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.csv", "metrics.json", "model_final.pth"}


def test_build_hooks_and_build_writers_can_be_overridden(tmp_path):
    class Mine(DefaultTrainer):
        def build_writers(self):
            return [JSONWriter(str(tmp_path / "mine.json"))]

        def build_hooks(self):
            return [h for h in super().build_hooks() if not isinstance(h, hooks.EvalHook)]

    trainer = Mine(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1))
    assert trainer.train() is None and (tmp_path / "mine.json").exists()
    assert not (tmp_path / "metrics.csv").exists()


def test_a_batch_that_passes_and_processes_cannot_divide_raises_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = tiny_cfg(tmp_path, SOLVER__ACCUM_STEPS=2)
    message = "SOLVER.IMS_PER_BATCH = 2 must be a multiple of SOLVER.ACCUM_STEPS = 2 times .* processes, 2"
    with pytest.raises(ValueError, match=message):
        DefaultTrainer.build_train_loader(cfg)
    message = "total_batch_size = 2 must be a multiple of train.accum_steps = 2 times .* processes, 2"
    with pytest.raises(ValueError, match=message):
        LazyTrainer(tiny_lazy_config(tmp_path, "+train.accum_steps=2"))


def test_early_stopping_without_evaluations_warns(tmp_path, caplog):
    cfg = tiny_cfg(tmp_path, SOLVER__EARLY_STOP__PATIENCE=3, SOLVER__EARLY_STOP__METRIC="bbox/AP")
    with caplog.at_level(logging.INFO, logger="detlib"):
        DefaultTrainer(cfg)
    assert "no evaluation before the end of training. Set TEST.EVAL_PERIOD or TEST.EVAL_EPOCHS" in caplog.text


def test_learning_rate_advice_uses_the_rate_of_the_model(tmp_path):
    """The published rate for 16 images is 0.02 for R-CNN models and 0.01 for dense detectors such as FCOS."""
    rcnn = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__BASE_LR=0.02))
    assert "use 0.02 for 16, which scales to 0.0025 here" in rcnn._trainer.advice
    fcos = LazyTrainer(tiny_lazy_config(tmp_path, "optimizer.lr=0.0025"))
    assert "use 0.01 for 16, which scales to 0.00125 here" in fcos._trainer.advice
