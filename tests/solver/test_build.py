"""Tests of parameter groups, SGD and gradient clipping."""

import pytest
import torch
from torch import nn

from detlib.config import get_cfg
from detlib.solver import (
    build_optimizer,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.bn = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(1))


def _settings(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Return the settings of each parameter by name; fail if a parameter is in two groups."""
    names = {param: name for name, param in model.named_parameters()}
    found = {}
    for group in groups:
        for param in group["params"]:
            assert names[param] not in found
            found[names[param]] = {k: v for k, v in group.items() if k != "params"}
    return found


def test_every_trainable_parameter_is_in_one_group():
    model = _Model()
    found = _settings(model, get_default_optimizer_params(model))
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(settings == {} for settings in found.values())


def test_settings_by_module_type_and_parameter_name():
    model = _Model()
    groups = get_default_optimizer_params(
        model,
        base_lr=1.0,
        weight_decay=0.1,
        weight_decay_norm=0.0,
        bias_lr_factor=2.0,
        weight_decay_bias=0.3,
        lr_factor_func=lambda name: {"conv": 0.5, "tied": 0.3}.get(name.split(".")[0], 1.0),
        overrides={"scale": {"lr": 7.0}},
    )
    found = _settings(model, groups)
    assert found["conv.weight"] == {"lr": 0.5, "weight_decay": 0.1}
    assert found["conv.bias"] == {"lr": 2.0, "weight_decay": 0.3}
    assert found["norm.weight"] == found["bn.weight"] == {"lr": 1.0, "weight_decay": 0.0}
    assert found["norm.bias"] == {"lr": 2.0, "weight_decay": 0.3}
    assert found["head.weight"] == {"lr": 1.0, "weight_decay": 0.1}
    assert found["scale"] == {"lr": 7.0, "weight_decay": 0.1}
    assert len(groups) == 5  # equal settings share a group


def test_lr_factor_func_gets_full_names_of_trainable_parameters():
    seen = []
    get_default_optimizer_params(_Model(), base_lr=1.0, lr_factor_func=lambda n: seen.append(n) or 1.0)
    assert "conv.weight" in seen and "scale" in seen and "frozen.weight" not in seen


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bias_lr_factor": 2.0}, "bias_lr_factor=2.0 requires base_lr"),
        ({"lr_factor_func": lambda name: 1.0}, "lr_factor_func requires base_lr"),
        ({"overrides": {"bias": {"lr": 1.0}}, "weight_decay_bias": 0.0}, "overrides"),
    ],
)
def test_conflicting_settings_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_default_optimizer_params(_Model(), **kwargs)


def test_reduce_param_groups_merges_equal_settings():
    a, b, c, d = (nn.Parameter(torch.zeros(i + 1)) for i in range(4))
    groups = reduce_param_groups(
        [
            {"params": [a], "lr": 1.0, "weight_decay": 0.1},
            {"params": [b, c], "lr": 2.0},
            {"params": d, "weight_decay": 0.1, "lr": 1.0},
            {"params": [c], "lr": 3.0},
        ]
    )
    assert groups == [
        {"params": [a, d], "lr": 1.0, "weight_decay": 0.1},
        {"params": [b], "lr": 2.0},
        {"params": [c], "lr": 3.0},
    ]


def test_sgd_step_equals_formula():
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 0.1, 0.9, 0.01
    cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0, 2.0, 0.0
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(cfg, model)
    settings = {"0.weight": (0.1, 0.01), "0.bias": (0.2, 0.0), "1.weight": (0.1, 0.0), "1.bias": (0.2, 0.0)}
    values = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    speed = {n: torch.zeros_like(v) for n, v in values.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 2)).square().sum().backward()
        for name, param in model.named_parameters():
            lr, decay = settings[name]
            speed[name] = 0.9 * speed[name] + param.grad.double() + decay * values[name]
            values[name] -= lr * speed[name]
        optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach().double(), values[name], rtol=1e-5, atol=1e-6)


def _clip(kind: str, limit: float, norm: float = 2.0, of_class: bool = False) -> list[torch.Tensor]:
    """Take one step of learning rate 1 with gradients (3, 4) and (6, 8); return the clipped gradients."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = limit
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    if of_class:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(params, lr=1.0)
    else:
        optimizer = torch.optim.SGD(params, lr=1.0)
        assert maybe_add_gradient_clipping(cfg, optimizer) is optimizer
    params[0].grad, params[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    optimizer.step()
    assert torch.equal(params[2].detach(), torch.zeros(2))  # has no gradient
    return [-p.detach() for p in params[:2]]


@pytest.mark.parametrize("of_class", [False, True])
def test_gradients_are_clipped_by_each_type(of_class):
    def check(actual, expected):
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, torch.tensor(e), rtol=1e-4, atol=1e-4)

    check(_clip("value", 3.5, of_class=of_class), [[3.0, 3.5], [3.5, 3.5]])
    check(_clip("norm", 6.0, of_class=of_class), [[3.0, 4.0], [3.6, 4.8]])
    check(_clip("norm", 4.0, float("inf"), of_class=of_class), [[3.0, 4.0], [3.0, 4.0]])
    full = 5.0 / 125**0.5
    check(_clip("full_model", 5.0, of_class=of_class), [[3 * full, 4 * full], [6 * full, 8 * full]])


def test_clipping_is_off_by_default_and_unknown_type_raises():
    cfg = get_cfg()
    assert maybe_add_gradient_clipping(cfg, torch.optim.SGD) is torch.optim.SGD
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "length"
    with pytest.raises(ValueError, match="SOLVER.CLIP_GRADIENTS.CLIP_TYPE.*'length'"):
        build_optimizer(cfg, _Model())


def test_other_step_hooks_still_run_with_clipping():
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    calls = []
    cls = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    optimizer = cls([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert isinstance(optimizer, torch.optim.SGD)
    optimizer.register_step_pre_hook(lambda *args: calls.append(1))
    optimizer.step()
    assert calls == [1]


def test_model_without_trainable_parameters_raises():
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(get_cfg(), model)
