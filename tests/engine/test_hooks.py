"""The general hooks, with minimal trainers."""

import json
import logging

import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from detlib.checkpoint import Checkpointer
from detlib.engine import TrainerBase, hooks
from detlib.engine.ema import WeightAverage
from detlib.utils.events import EventWriter


class _Idle(TrainerBase):
    """Steps that store one metric with the given values."""

    def __init__(self, values=()):
        super().__init__()
        self.values = values
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    def run_step(self):
        self.optimizer.step()
        if self.values:
            self.storage.put_scalar("bbox/AP", self.values[self.iter], smoothing_hint=False)


def _train(trainer, hooks_, start=0, end=6):
    trainer.register_hooks(hooks_)
    trainer.train(start, end)
    return trainer


def test_callback_hook_calls_its_functions():
    calls = []
    hook = hooks.CallbackHook(
        before_train=lambda t: calls.append("before_train"),
        after_train=lambda t: calls.append("after_train"),
        before_step=lambda t: calls.append(t.iter),
        after_step=lambda t: calls.append(-t.iter),
    )
    _train(_Idle(), [hook, hooks.CallbackHook()], 1, 3)
    assert calls == ["before_train", 1, -1, 2, -2, "after_train"]


@pytest.mark.parametrize(("period", "steps"), [(2, [1, 3, "end"]), (0, ["end"]), (4, [3, "end"])])
def test_eval_hook_evaluates_every_period_and_at_the_end(period, steps):
    seen = []
    trainer = _Idle()

    def evaluate():
        seen.append("end" if trainer.iter >= trainer.max_iter else trainer.iter)
        return {"bbox": {"AP": 2.5, "AP50": torch.tensor(3.0)}}

    _train(trainer, [hooks.EvalHook(period, evaluate)])
    assert seen == steps
    assert trainer.storage.latest()["bbox/AP"] == (2.5, 6)
    assert trainer.storage.latest()["bbox/AP50"] == (3.0, 6)


def test_eval_hook_does_not_evaluate_after_an_error():
    class Fails(_Idle):
        def run_step(self):
            if self.iter == 5:
                raise RuntimeError("step failed")

    seen = []
    with pytest.raises(RuntimeError, match="step failed"):
        _train(Fails(), [hooks.EvalHook(0, lambda: seen.append(1))])
    assert seen == []
    _train(_Idle(), [hooks.EvalHook(0, lambda: seen.append(1), eval_after_train=False)])
    assert seen == []


@pytest.mark.parametrize(("result", "error"), [({"bbox": {"AP": "x"}}, ValueError), ([1], TypeError)])
def test_eval_hook_refuses_results_that_are_not_numbers(result, error):
    with pytest.raises(error, match="eval_function must return"):
        _train(_Idle(), [hooks.EvalHook(2, lambda: result)])


def _best(folder, values, mode="max", start=0, resume_from=None, period=2):
    model = nn.Linear(1, 1)
    trainer = _Idle(values)
    checkpointer = Checkpointer(model, str(folder), trainer=trainer)
    best = hooks.BestCheckpointer(period, checkpointer, "bbox/AP", mode)
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, period), best])
    if resume_from:
        checkpointer.load(str(folder / resume_from))
    with torch.no_grad():
        model.weight.fill_(7.0)
    trainer.train(start, len(values))
    return best, checkpointer


@pytest.mark.parametrize(
    ("values", "mode", "value", "iteration"),
    [
        ([1, 3, 9, 2, 0, 1], "max", 3, 1),
        ([1, 3, 9, 2, 0, 1], "min", 1, 5),
        ([9, float("nan"), 9, 2, 0, 1], "max", 2, 3),
    ],
)
def test_best_checkpointer_saves_the_best_iteration(tmp_path, values, mode, value, iteration):
    best, checkpointer = _best(tmp_path, [float(c) for c in values], mode)
    assert (best.best_metric, best.best_iter) == (value, iteration)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["iteration"] == iteration and saved["best"]["best_metric"] == value
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")


def test_best_checkpointer_remembers_the_best_after_a_resume(tmp_path):
    _best(tmp_path, [0.0, 8.0, 0.0, 5.0])
    before = (tmp_path / "model_best.pth").read_bytes()
    # The checkpoint of iteration 1 was saved before that iteration's metric was known to the hook.
    for checkpoint in ("model_0000001.pth", "model_0000003.pth"):
        best, _ = _best(tmp_path, [0.0, 0.0, 0.0, 0.0, 0.0, 6.0], start=4, resume_from=checkpoint)
        assert (best.best_metric, best.best_iter) == (8.0, 1)
        assert (tmp_path / "model_best.pth").read_bytes() == before
    best, _ = _best(tmp_path, [0.0] * 5 + [9.0], start=4, resume_from="model_0000003.pth")
    assert best.best_metric == 9.0 and (tmp_path / "model_best.pth").read_bytes() != before


def test_best_checkpointer_warns_about_a_missing_metric(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="detlib"):
        _train(_Idle(), [hooks.BestCheckpointer(2, Checkpointer(nn.Linear(1, 1), str(tmp_path)), "segm/AP")])
    assert "'segm/AP'" in caplog.text and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="'best'"):
        hooks.BestCheckpointer(2, None, "segm/AP", mode="best")


def test_learning_rate_hook_stores_and_steps_the_schedule():
    trainer = _train(_Idle(), [hooks.LRScheduler(scheduler=CosineParamScheduler(1.0, 0.0))], end=4)
    history = [value for value, _ in trainer.storage.history("lr").values()]
    assert history == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "rates", "best"),
    [([1, 3, 2], [1, 2, 3], 1), ([1, 1, 1], [1, 2, 2], 1), ([1], [5], 0)],
)
def test_the_reported_learning_rate_is_that_of_the_largest_group(sizes, rates, best):
    groups = [
        {"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": rate}
        for n, rate in zip(sizes, rates)
    ]
    assert hooks.LRScheduler.get_best_param_group_id(torch.optim.SGD(groups, lr=1.0)) == best


def test_periodic_writer_calls_and_closes_its_writers():
    class Writer(EventWriter):
        def __init__(self):
            self.calls = []

        def write(self):
            self.calls.append(trainer.iter)

        def close(self):
            self.calls.append("closed")

    trainer, writer = _Idle(), Writer()
    _train(trainer, [hooks.PeriodicWriter([writer], period=4)])
    assert writer.calls == [3, 5, 6, "closed"]
    with pytest.raises(TypeError, match="EventWriter"):
        hooks.PeriodicWriter([print])


def test_timer_skips_the_warmup_and_logs_the_totals(caplog):
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer = _train(_Idle(), [hooks.IterationTimer(warmup_iter=2)])
    assert [i for _, i in trainer.storage.history("time").values()] == [2, 3, 4, 5]
    assert "Overall training speed: 4 iterations" in caplog.text


def test_precise_bn_computes_population_statistics():
    torch.manual_seed(0)
    model = nn.BatchNorm1d(3)
    model.momentum = 0.01
    average = WeightAverage(model, 0.5)
    batches = [torch.randn(16, 3) * 4 + 2 for _ in range(4)]
    _train(_Idle(), [hooks.PreciseBN(0, model, batches, num_iter=4)], end=1)
    stacked = torch.cat(batches)
    torch.testing.assert_close(model.running_mean, stacked.mean(0))
    torch.testing.assert_close(model.running_var, stacked.var(0, unbiased=False), rtol=0.1, atol=0.1)
    # The weight average still refers to the statistics: the first update keeps 0.1 of the initial zeros.
    average.update()
    torch.testing.assert_close(average.state_dict()["running_mean"], 0.9 * stacked.mean(0))
    with average.applied():
        torch.testing.assert_close(model.running_mean, 0.9 * stacked.mean(0))
    _train(
        _Idle(), [hooks.PreciseBN(0, nn.Linear(1, 1), [], num_iter=4)], end=1
    )  # no BatchNorm layer, no effect


def test_precise_bn_computes_statistics_of_the_average_too():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.constant_(model[0].weight, 2.0)
    average = WeightAverage(model, 0.5)
    nn.init.constant_(model[0].weight, 5.0)
    batches = [torch.tensor([[1.0], [3.0]])] * 2
    _train(_Idle(), [hooks.PreciseBN(0, model, batches, num_iter=1, average=average)], end=1)
    assert (model[0].weight.item(), model[1].running_mean.item()) == (5.0, 10.0)
    with average.applied():
        assert (model[0].weight.item(), model[1].running_mean.item()) == (2.0, 4.0)


@pytest.mark.parametrize("kind", ["torch", "autograd"])
def test_profiler_hooks_write_a_trace(tmp_path, kind):
    def when(trainer):
        return trainer.iter == 1

    if kind == "torch":
        hook = hooks.TorchProfiler(when, str(tmp_path), save_tensorboard=False)
    else:
        hook = hooks.AutogradProfiler(when, str(tmp_path))
    _train(_Idle(), [hook, hooks.TorchMemoryStats()], end=3)
    assert [p.name for p in tmp_path.iterdir()] == ["profiler-trace-iter1.json"]
    assert json.loads((tmp_path / "profiler-trace-iter1.json").read_text())
