"""Tests of learning rate schedules against explicit formulas."""

import math

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    MultiStepParamScheduler,
    StepWithFixedGammaParamScheduler,
)

from detlib.config import get_cfg
from detlib.solver import (
    LRMultiplier,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
    build_lr_scheduler,
)


def _optimizer(lr: float = 2.0) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (lr, lr / 10)]
    return torch.optim.SGD(groups, lr=lr)


def _rates(optimizer, scheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 10)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _cfg(name: str, **solver):
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    cfg.SOLVER.MAX_ITER = 30
    cfg.SOLVER.BASE_LR = 2.0
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def _built(cfg) -> list[float]:
    optimizer = _optimizer()
    return _rates(optimizer, build_lr_scheduler(cfg, optimizer), 30)


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_multi_step_schedule_equals_formula(method):
    cfg = _cfg(
        "WarmupMultiStepLR", STEPS=(10, 15, 20), WARMUP_ITERS=5, WARMUP_METHOD=method, WARMUP_FACTOR=0.1
    )
    expected = []
    for i in range(30):
        decay = 0.1 ** sum(i >= step for step in (10, 15, 20))
        warmup = 1.0 if i >= 5 else 0.1 if method == "constant" else 0.1 + 0.9 * i / 5
        expected.append(2.0 * decay * warmup)
    assert _built(cfg) == pytest.approx(expected, rel=1e-9)


def test_linear_warmup_across_a_step_ends_at_the_decayed_rate():
    cfg = _cfg("WarmupMultiStepLR", STEPS=(10,), WARMUP_ITERS=12, WARMUP_FACTOR=0.1)
    # The warmup goes from 0.1 * 1 to the value at iteration 12, which is after the step.
    expected = [0.1 if i >= 12 else 0.1 + (0.1 - 0.1) * i / 12 for i in range(30)]
    assert _built(cfg) == pytest.approx([2.0 * e for e in expected], rel=1e-9)


@pytest.mark.parametrize("warmup_iters", [30, 50])
def test_constant_warmup_over_all_iterations(warmup_iters):
    cfg = _cfg("WarmupMultiStepLR", WARMUP_ITERS=warmup_iters, WARMUP_METHOD="constant", WARMUP_FACTOR=0.1)
    assert _built(cfg) == pytest.approx([0.2] * 30, rel=1e-9)


@pytest.mark.parametrize("warmup_length", [0.0, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [ConstantParamScheduler(1.0), StepWithFixedGammaParamScheduler(1.0, 2, 1.0, 30)],
)
def test_schedule_undefined_at_the_end_is_clamped(schedule, warmup_length):
    optimizer = _optimizer()
    if warmup_length:
        schedule = WarmupParamScheduler(schedule, 1.0, warmup_length)
    scheduler = LRMultiplier(optimizer, schedule, max_iter=30)
    # PyTorch computes the next learning rate after the last step, too.
    assert _rates(optimizer, scheduler, 31) == pytest.approx([2.0] * 31, rel=1e-9)


def test_cosine_schedule_equals_formula():
    cfg = _cfg("WarmupCosineLR", WARMUP_ITERS=5, WARMUP_FACTOR=0.1, BASE_LR_END=0.5)

    def cosine(i):
        return 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * i / 30))

    # The warmup ends at the value of the cosine, not at the base learning rate.
    expected = [2.0 * (cosine(i) if i >= 5 else 0.1 + (cosine(5) - 0.1) * i / 5) for i in range(30)]
    assert _built(cfg) == pytest.approx(expected, rel=1e-9)


def test_rescale_interval_starts_the_schedule_after_the_warmup():
    cfg = _cfg("WarmupCosineLR", WARMUP_ITERS=6, WARMUP_FACTOR=0.1, RESCALE_INTERVAL=True)
    expected = []
    for i in range(30):
        if i < 6:
            expected.append(2.0 * (0.1 + 0.9 * i / 6))
        else:
            expected.append(2.0 * 0.5 * (1 + math.cos(math.pi * (i - 6) / 24)))
    assert _built(cfg) == pytest.approx(expected, rel=1e-9)


def test_fixed_gamma_steps_are_evenly_spaced():
    cfg = _cfg("WarmupStepWithFixedGammaLR", WARMUP_ITERS=0, NUM_DECAYS=2, GAMMA=0.5)
    assert _built(cfg) == pytest.approx([2.0 * 0.5 ** (i // 10) for i in range(30)], rel=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
def test_warmup_longer_than_max_iter_takes_all_iterations(rescale):
    cfg = _cfg("WarmupMultiStepLR", STEPS=(), WARMUP_ITERS=99, WARMUP_FACTOR=0.1, RESCALE_INTERVAL=rescale)
    assert _built(cfg) == pytest.approx([2.0 * (0.1 + 0.9 * i / 30) for i in range(30)], rel=1e-9)


def test_steps_beyond_max_iter_are_ignored_with_a_warning(caplog):
    cfg = _cfg("WarmupMultiStepLR", STEPS=(10, 30, 40), WARMUP_ITERS=0)
    assert _built(cfg) == pytest.approx([2.0 * 0.1 ** (i >= 10) for i in range(30)], rel=1e-9)
    assert "SOLVER.STEPS" in caplog.text


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"LR_SCHEDULER_NAME": "Cosine"}, "SOLVER.LR_SCHEDULER_NAME.*'Cosine'"),
        (
            {"WARMUP_METHOD": "burnin"},
            "SOLVER.WARMUP_METHOD.*'linear', 'constant'.*'burnin'",
        ),
        ({"WARMUP_ITERS": -3}, "SOLVER.WARMUP_ITERS must be at least 0, got -3"),
        ({"STEPS": (20, 10)}, "SOLVER.STEPS.*increasing"),
        ({"MAX_ITER": 0}, "SOLVER.MAX_ITER"),
        ({"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 0}, "SOLVER.NUM_DECAYS.* got 0"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR": 0.0, "BASE_LR_END": 0.1}, "BASE_LR_END"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 3.0}, "SOLVER.BASE_LR_END"),
    ],
)
def test_errors_name_the_key(solver, message):
    cfg = _cfg("WarmupMultiStepLR", STEPS=())
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    with pytest.raises(ValueError, match=message):
        build_lr_scheduler(cfg, _optimizer())


def test_multiplier_resumes_from_state_dict():
    def make():
        optimizer = _optimizer()
        schedule = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.01, 0.2)
        return optimizer, LRMultiplier(optimizer, schedule, max_iter=20)

    optimizer, scheduler = make()
    uninterrupted = _rates(optimizer, scheduler, 20)
    optimizer, scheduler = make()
    first = _rates(optimizer, scheduler, 7)
    assert set(scheduler.state_dict()) == {"base_lrs", "last_epoch"}
    resumed_optimizer, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert first + _rates(resumed_optimizer, resumed, 13) == pytest.approx(uninterrupted, rel=1e-12)
    with pytest.raises(TypeError, match="ParamScheduler"):
        LRMultiplier(optimizer, lambda where: 1.0, max_iter=3)


def test_plain_schedulers_equal_formulas():
    optimizer = _optimizer()
    rates = _rates(optimizer, WarmupMultiStepLR(optimizer, [10, 20], 0.5, 0.1, 4), 30)
    expected = [
        2.0 * (min(1.0, 0.1 * (1 - i / 4) + i / 4)) * 0.5 ** ((i >= 10) + (i >= 20)) for i in range(30)
    ]
    assert rates == pytest.approx(expected, rel=1e-9)

    optimizer = _optimizer()
    rates = _rates(optimizer, WarmupCosineLR(optimizer, 30, 0.1, 4, "constant"), 30)
    expected = [2.0 * (0.1 if i < 4 else 1.0) * 0.5 * (1 + math.cos(math.pi * i / 30)) for i in range(30)]
    assert rates == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="increasing"):
        WarmupMultiStepLR(optimizer, [20, 10])


def test_warmup_before_the_first_step_equals_product():
    schedule = WarmupParamScheduler(
        MultiStepParamScheduler([1, 0.1], milestones=[60], num_updates=90), 0.5, 0.1
    )
    for i in range(90):
        expected = (0.1 if i >= 60 else 1.0) * (0.5 + 0.5 * i / 9 if i < 9 else 1.0)
        assert schedule(i / 90) == pytest.approx(expected, rel=1e-9)
