"""Errors and warnings when a run is resumed with another model or optimizer."""

import logging

import pytest
import torch
from torch import nn

from detlib.engine import SimpleTrainer


class _Model(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.a = nn.Linear(2, width)
        self.b = nn.Linear(width, 1)

    def forward(self, batch):
        return {"loss": self.b(self.a(batch)).square().mean()}


def _sgd(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def _trainer(model: nn.Module, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    return SimpleTrainer(model, [torch.ones(4, 2)] * 2, optimizer)


@pytest.fixture
def state():
    model = _Model()
    trainer = _trainer(model, _sgd(model))
    trainer.train(0, 2)
    return trainer.state_dict()


def _adamw(model):
    return torch.optim.AdamW(model.parameters())


def _two_groups(model):
    groups = [{"params": part.parameters()} for part in (model.a, model.b)]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("width", "make", "message"),
    [
        (5, _sgd, r"'momentum_buffer' of a parameter has shape \(3, 2\), the model's parameter has \(5, 2\)"),
        (3, _adamw, r"\['dampening', .*'momentum', 'nesterov'\] and lacks .*'betas'.* of AdamW"),
        (3, _two_groups, r"groups of \[4\] parameters, the model has groups of \[2, 2\]"),
    ],
)
def test_state_of_another_model_or_optimizer_raises_an_error(state, width, make, message):
    model = _Model(width)
    trainer = _trainer(model, make(model))
    with pytest.raises(ValueError, match=f"{message}.*leave out --resume"):
        trainer.load_state_dict(state)


def test_optimizer_settings_kept_from_the_checkpoint_are_logged(state, caplog):
    model = _Model()
    trainer = _trainer(model, _sgd(model))
    with caplog.at_level(logging.WARNING, logger="detlib"):
        trainer.load_state_dict(state)
        assert caplog.text == ""
        _trainer(model, _sgd(model, momentum=0.5)).load_state_dict(state)
    assert "not those of the config: momentum 0.9 instead of 0.5" in caplog.text


def test_the_count_of_skipped_steps_is_restored(state):
    model = _Model()
    trainer = _trainer(model, _sgd(model))
    trainer.skipped = 2
    state = trainer.state_dict()
    trainer.skipped = 0
    trainer.load_state_dict(state)
    assert trainer.skipped == 2
