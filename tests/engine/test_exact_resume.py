"""An interrupted run ends with the same parameters as an uninterrupted one, bit for bit."""

import json

import pytest
import torch

from detlib.engine import DefaultTrainer
from detlib.utils.env import seed_all_rng
from tests.builders import tiny_cfg
from tests.engine.training_runs import make_interrupted_run, train

_STEPS = 3


def _assert_equal(one: DefaultTrainer, two: DefaultTrainer) -> None:
    a, b = one.checkpointer.model.state_dict(), two.checkpointer.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.iter == two.iter
    for (_, x), (_, y) in zip(_tensors(one.state_dict()), _tensors(two.state_dict()), strict=True):
        assert torch.equal(x, y)
    if one.ema is not None:
        x, y = one.ema.state_dict(), two.ema.state_dict()
        assert all(torch.equal(x[name], y[name]) for name in x)
        assert any(not torch.equal(x[name], a[name]) for name in x)


def _tensors(tree, path=""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _tensors(value, f"{path}.{i}")


_KINDS = {
    "sgd": {},
    "adamw": {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 1e-3},
    "ema": {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.5},
    "bfloat16": {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "bfloat16"},
    "accumulated": {"SOLVER__ACCUM_STEPS": 2, "SOLVER__IMS_PER_BATCH": 4},
    "workers": {"DATALOADER__NUM_WORKERS": 2},
    "drawn seed": {"SEED": -1},
    "evaluated": {"TEST__EVAL_PERIOD": 1, "DATASETS__TEST": ("shapes:val?num=2&size=64",)},
    "batch norm": {"MODEL__RESNETS__NORM": "BN", "MODEL__FPN__NORM": "BN", "TEST__PRECISE_BN__ENABLED": True,
                   "TEST__PRECISE_BN__NUM_ITER": 2, "TEST__EVAL_PERIOD": 1},
    "retinanet": {"MODEL__META_ARCHITECTURE": "RetinaNet", "MODEL__MASK_ON": False,
                  "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
                  "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
                  "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"], "MODEL__RETINANET__NUM_CLASSES": 3},
}  # fmt: skip


_SLOW = ("adamw", "bfloat16", "drawn seed", "evaluated")  # seconds each, and they rarely fail alone


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in _SLOW else kind for kind in _KINDS]
)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind):
    overrides = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": _STEPS, "DATASETS__TEST": ()}
    overrides |= _KINDS[kind]
    seed_all_rng(3)
    uninterrupted = train(tiny_cfg(tmp_path / "uninterrupted", **overrides), resume=False)
    make_interrupted_run(uninterrupted, tmp_path / "parts", iteration=0)
    # Random numbers drawn before a run resumes, such as initial weights, must not matter.
    seed_all_rng(99)
    resumed = train(tiny_cfg(tmp_path / "parts", **overrides), resume=True)
    assert resumed.start_iter == 1
    _assert_equal(uninterrupted, resumed)


def test_a_run_killed_before_its_final_checkpoint_saves_it_on_resume(tmp_path):
    overrides = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 1, "DATASETS__TEST": ()}
    uninterrupted = train(tiny_cfg(tmp_path / "uninterrupted", **overrides), resume=False)
    make_interrupted_run(uninterrupted, tmp_path / "parts", iteration=0)
    resumed = train(tiny_cfg(tmp_path / "parts", **overrides), resume=True)
    assert resumed.start_iter == 1
    one, two = (torch.load(tmp_path / name / "model_final.pth") for name in ("uninterrupted", "parts"))
    assert one["iteration"] == two["iteration"] == 0
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


def test_smoothed_metrics_after_a_resume_equal_those_of_an_uninterrupted_run(tmp_path):
    overrides = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 4, "DATASETS__TEST": ()}
    overrides |= {"TRAIN__LOG_PERIOD": 1, "TRAIN__WRITERS": ("json",)}
    uninterrupted = train(tiny_cfg(tmp_path / "uninterrupted", **overrides), resume=False)
    make_interrupted_run(uninterrupted, tmp_path / "parts", iteration=1)
    resumed = train(tiny_cfg(tmp_path / "parts", **overrides), resume=True)
    assert resumed.start_iter == 2
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("uninterrupted", "parts")
    ]
    assert [row["iteration"] for row in rows[1]] == [2, 3]
    for one, two in zip(rows[0][2:], rows[1], strict=True):
        losses = [name for name in one if "loss" in name or "/" in name]
        assert len(losses) > 5
        assert {name: one[name] for name in losses} == {name: two[name] for name in losses}
