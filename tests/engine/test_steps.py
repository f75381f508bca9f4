"""Accumulated, skipped and seeded steps, clipping, and the optimizers of a config, on a small model."""

import itertools
import logging
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from detlib.config import get_cfg
from detlib.engine import AMPTrainer, SimpleTrainer
from detlib.engine.base_trainer import seed_rng
from detlib.engine.divergence import learning_rate_advice, length_advice
from detlib.solver import build_optimizer


class _Model(nn.Module):
    """A loss that is a sum over the images of the batch; NaN in the calls in `poisoned`."""

    def __init__(self, poisoned=()):
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.head = nn.Linear(3, 1)
        self.poisoned = set(poisoned)
        self.calls = 0

    def forward(self, batch):
        out = self.head(self.backbone(torch.stack([d["x"] for d in batch])).tanh())
        self.calls += 1
        scale = float("nan") if self.calls - 1 in self.poisoned else 1.0
        return {"loss": out.square().mean() * scale}


def _batches(size: int):
    generator = torch.Generator().manual_seed(5)
    number = 0
    while True:
        yield [
            {"x": torch.rand(4, generator=generator), "file_name": f"{number + k}.jpg"} for k in range(size)
        ]
        number += size


def _trained(steps: int, size: int, cls=SimpleTrainer, optimizer="SGD", poisoned=(), **kwargs):
    torch.manual_seed(0)
    model = _Model(poisoned)
    if optimizer == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trainer = cls(model, _batches(size), optimizer, **kwargs)
    trainer.train(0, steps)
    return trainer


def _values(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("before", [False, True])
def test_accumulated_passes_equal_one_batch(optimizer, before):
    full = _trained(3, 6, optimizer=optimizer, zero_grad_before_forward=before)
    parts = _trained(3, 2, optimizer=optimizer, zero_grad_before_forward=before, accum_steps=3)
    start = _trained(0, 2)
    assert (_values(full) - _values(start)).abs().max() > 1e-2
    torch.testing.assert_close(_values(parts), _values(full), rtol=0, atol=1e-6)
    assert parts.storage.latest()["total_loss"][0] == pytest.approx(full.storage.latest()["total_loss"][0])
    assert parts.model.calls == 9


def test_accumulated_passes_equal_one_batch_in_bfloat16():
    full = _trained(3, 6)
    parts = _trained(3, 2, cls=AMPTrainer, precision=torch.bfloat16, accum_steps=3)
    # bfloat16 has 8 bits of precision: the tolerance is 2**-8 of updates of a few hundredths.
    torch.testing.assert_close(_values(parts), _values(full), rtol=0, atol=2e-3)
    assert (_values(parts) - _values(full)).abs().max() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_first_step_that_overflows_leaves_no_nan_behind(fused, monkeypatch):
    """Applies even if the momentum buffers are allocated in memory that contains NaN."""

    def poisoned(tensor, **kwargs):
        return torch.full_like(tensor, float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    model = _Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    factors = itertools.chain([float("inf")], itertools.repeat(1.0))
    model.head.weight.register_hook(lambda grad: grad * next(factors))
    trainer = AMPTrainer(model, _batches(2), optimizer, precision=torch.bfloat16, grad_scaler=scaler)
    trainer.train(0, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    trainer.train(1, 3)
    assert scaler.get_scale() == 512.0
    assert all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accum_steps": 0}, "accum_steps must be at least 1, got 0"),
        ({"skip_non_finite": 2, "gather_metric_period": 5}, "skip_non_finite=2 needs gather_metric_period=1"),
    ],
)
def test_illegal_arguments_raise_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        _trained(1, 2, **arguments)


def test_steps_without_a_finite_loss_are_skipped(caplog):
    with caplog.at_level(logging.WARNING, logger="detlib"):
        trainer = _trained(4, 2, poisoned={1, 2}, skip_non_finite=2, advice="Lower the rate.")
    expected = SimpleTrainer(_Model(), iter(()), trainer.optimizer)  # the same steps without the skipped ones
    torch.manual_seed(0)
    model = _Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for k, batch in zip(range(4), _batches(2)):
        if k in (1, 2):
            continue
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    expected.model = model
    assert torch.equal(_values(trainer), _values(expected))
    text = caplog.text
    assert "Skipping the step (1 of at most 2 in a row)" in text and "(2 of at most 2 in a row)" in text
    assert "2.jpg, 3.jpg" in text and "Learning rate: 0.1" in text and "Lower the rate." in text


def test_too_many_skipped_steps_in_a_row_end_training():
    with pytest.raises(FloatingPointError, match="iteration 3") as error:
        _trained(6, 2, poisoned={1, 2, 3}, skip_non_finite=2)
    assert "6.jpg" in str(error.value)
    # A finite step in between resets the count.
    assert _trained(6, 2, poisoned={0, 1, 3, 4}, skip_non_finite=2).iter == 6


@pytest.mark.parametrize(
    ("cls", "rate", "images", "advice"),
    [
        (torch.optim.SGD, 0.02, 16, ""),
        (torch.optim.SGD, 0.0025, 2, ""),
        (torch.optim.SGD, 0.02, 2, "use 0.02 for 16, which scales to 0.0025 here"),
        (torch.optim.AdamW, 0.02, 2, ""),
        (torch.optim.SGD, 0.02, 0, ""),
    ],
)
def test_learning_rate_advice_follows_the_batch_size(cls, rate, images, advice):
    optimizer = cls([nn.Parameter(torch.zeros(1))], rate)
    actual = learning_rate_advice(optimizer, images, 0.02 / 16)
    assert actual == "" if advice == "" else advice in actual


def _draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank():
    seed_rng(3, 7, 0)
    first = _draws()
    _draws()
    seed_rng(3, 7, 0)
    assert _draws() == first
    for other in ((4, 7, 0), (3, 8, 0), (3, 7, 1)):
        seed_rng(*other)
        assert all(a != b for a, b in zip(_draws(), first))


def _cfg(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    return cfg


def test_adamw_uses_the_settings_of_the_config():
    model = _Model()
    optimizer = build_optimizer(
        _cfg(OPTIMIZER="AdamW", BETAS=(0.8, 0.9), BASE_LR=0.3, LR_FACTORS=[["backbone.*", 0.1]]), model
    )
    assert type(optimizer) is torch.optim.AdamW
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.backbone.weight)] == pytest.approx(0.03)
    assert rates[id(model.head.weight)] == pytest.approx(0.3)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"OPTIMIZER": "Adam"}, r"SOLVER.OPTIMIZER must be one of \('SGD', 'AdamW'\), got 'Adam'"),
        ({"LR_FACTORS": [["backbon.*", 0.1]]}, r"no trainable parameter's name matches 'backbon.\*'"),
        ({"LR_FACTORS": ["backbone"]}, "takes pairs"),
        ({"LR_FACTORS": [["backbone.*", "a"]]}, "takes pairs"),
        ({"BASE_LR": -1.0}, "SOLVER.BASE_LR must be at least 0, got -1.0"),
        ({"BETAS": (0.9,)}, r"SOLVER.BETAS must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"LAYER_DECAY": 0.7}, "SOLVER.LAYER_DECAY = 0.7 needs a plain ViT as backbone, got Linear"),
    ],
)
def test_illegal_solver_keys_raise_an_error_that_names_them(solver, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(_cfg(**solver), _Model())


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_each_gradient_is_clipped_to_the_norm(norm_type):
    model = _Model()
    cfg = _cfg(BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = True, "norm", 0.5, norm_type
    optimizer = build_optimizer(cfg, model)
    before = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(1)
    for param, size in zip(model.parameters(), (10.0, 1e-3, 5.0, 0.0)):
        param.grad = torch.rand(param.shape, generator=generator) * size
    expected = [
        p.grad * min(1.0, 0.5 / (float(torch.linalg.vector_norm(p.grad, norm_type)) + 1e-6))
        for p in model.parameters()
    ]
    optimizer.step()
    for param, old, gradient in zip(model.parameters(), before, expected):
        torch.testing.assert_close(old - param, gradient)


@pytest.mark.parametrize(
    ("max_iter", "images_per_step", "images", "advice"),
    [
        (270000, 1, 24, "11250 passes over the 24 training images.*MAX_ITER .* 2400.*MAX_EPOCHS 100"),
        (270000, 16, 24, "180000 passes .*MAX_ITER .* 1000,.*MAX_EPOCHS 667"),
        (270000, 16, 118000, ""),
        (1000, 16, 8, ""),
        (270000, 0, 24, ""),
        (270000, 16, None, ""),
    ],
)
def test_thousands_of_passes_over_few_images_are_reported_with_a_fitting_length(
    max_iter, images_per_step, images, advice
):
    actual = length_advice(max_iter, images_per_step, images)
    assert re.search(advice, actual) if advice else actual == ""
