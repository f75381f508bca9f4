"""The moving average of the weights, compared with the formula."""

import pytest
import torch
from torch import nn

from detlib.engine import DefaultPredictor, DefaultTrainer
from detlib.engine.ema import WeightAverage, load_for_inference
from tests.builders import tiny_cfg


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight  # one tensor under two names
        self.norm = nn.BatchNorm1d(2)


def _change(net: nn.Module, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
        net.norm.running_mean.copy_(torch.rand(2, generator=generator))
        net.norm.num_batches_tracked.fill_(k)


def test_average_equals_the_formula():
    net = _Net()
    average = WeightAverage(net, 0.5)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for k in range(12):
        _change(net, k + 1)
        average.update()
        decay = min(0.5, (1 + k) / (10 + k))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    state = average.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name])

    own = {name: value.clone() for name, value in net.state_dict().items()}
    with average.applied():
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


def test_state_is_restored_and_shapes_are_checked(caplog):
    net = _Net()
    average = WeightAverage(net, 0.9)
    saved = {name: torch.full_like(value, 3) for name, value in average.state_dict().items()}
    average.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in average.state_dict().items())
    del saved["a.bias"]
    average.load_state_dict(saved)
    assert "lacks 'a.bias'" in caplog.text
    with pytest.raises(
        ValueError, match=r"'a.weight' has shape \(1,\), but the model's parameter has \(2, 2\)"
    ):
        average.load_state_dict({"a.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 1"):
        WeightAverage(net, 1.0)


def test_evaluation_and_prediction_use_the_average(tmp_path):
    cfg = tiny_cfg(tmp_path, SOLVER__EMA__ENABLED=True, SOLVER__MAX_ITER=2)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    seen = []
    trainer.test = lambda cfg, model: seen.append(_copy(model)) or {}
    trainer.train()
    average = trainer.ema.state_dict()
    assert trainer.ema.updates == 2
    assert all(torch.equal(seen[0][name], average[name]) for name in average)
    own = trainer.model.state_dict()
    assert any(not torch.equal(own[name], average[name]) for name in average)

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    assert _all_equal(DefaultPredictor(cfg).model, average)
    cfg.SOLVER.EMA.ENABLED = False
    assert _all_equal(DefaultPredictor(cfg).model, own)


def test_a_file_without_an_average_loads_its_weights(tmp_path, caplog):
    net = nn.Linear(2, 2)
    torch.save({"model": net.state_dict()}, tmp_path / "plain.pth")
    other = nn.Linear(2, 2)
    with caplog.at_level("INFO", logger="detlib"):
        load_for_inference(other, str(tmp_path / "plain.pth"), use_average=True)
    assert torch.equal(other.weight, net.weight) and "has no weight average" in caplog.text


def _copy(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _all_equal(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
