"""The training loop, the trainers, and losses that are infinite or NaN."""

import logging
import math

import pytest
import torch
from torch import nn

from detlib.checkpoint import Checkpointer
from detlib.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detlib.engine.divergence import find_non_finite_parameters
from detlib.utils.events import EventStorage, JSONWriter


class _Model(nn.Module):
    """Two losses of a linear map; one of them is NaN at call number `poison`."""

    def __init__(self, poison: int | None = None):
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.calls = 0
        self.poison = poison

    def forward(self, batch):
        x = torch.stack([d["x"] for d in batch])
        out = self.fc(x)
        losses = {"loss_a": out.square().mean(), "loss_b": out.abs().mean()}
        if self.calls == self.poison:
            losses["loss_b"] = losses["loss_b"] * float("nan")
        self.calls += 1
        return losses


def _batches(start: int = 0):
    """Endless batches, the k-th always the same."""
    k = start
    while True:
        generator = torch.Generator().manual_seed(k)
        yield [{"x": torch.rand(2, generator=generator), "file_name": f"image_{k}_{j}.jpg"} for j in range(2)]
        k += 1


def _trainer(model=None, cls=SimpleTrainer, start: int = 0, lr: float = 0.1, **kwargs):
    torch.manual_seed(0)
    model = model or _Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return cls(model, _batches(start), optimizer, **kwargs)


class _Log(HookBase):
    def __init__(self, calls):
        self.calls = calls

    def before_train(self):
        self.calls.append(("before_train", self.trainer.iter))

    def after_train(self):
        self.calls.append(("after_train", self.trainer.iter, self.trainer.storage.iter))

    def before_step(self):
        self.calls.append(("before_step", self.trainer.iter, self.trainer.storage.iter))

    def after_backward(self):
        assert self.trainer.model.fc.weight.grad is not None
        self.calls.append(("after_backward", self.trainer.iter))

    def after_step(self):
        self.calls.append(("after_step", self.trainer.iter))


def test_hooks_are_called_in_order_around_each_step():
    trainer, calls = _trainer(), []
    trainer.register_hooks([_Log(calls), None])
    trainer.train(3, 5)
    assert calls == [
        ("before_train", 3),
        ("before_step", 3, 3),
        ("after_backward", 3),
        ("after_step", 3),
        ("before_step", 4, 4),
        ("after_backward", 4),
        ("after_step", 4),
        ("after_train", 5, 5),
    ]
    with pytest.raises(TypeError, match="HookBase"):
        trainer.register_hooks([print])


def test_after_train_is_called_after_an_error():
    trainer, calls = _trainer(), []

    class Fails(HookBase):
        def after_step(self):
            raise KeyError("no")

    trainer.register_hooks([_Log(calls), Fails()])
    with pytest.raises(KeyError):
        trainer.train(0, 1)
    assert calls[-1] == ("after_train", 0, 0)  # below max_iter: the run failed


def test_a_run_with_no_steps_left_warns_and_calls_its_hooks(caplog):
    trainer, calls = _trainer(), []
    trainer.register_hooks([_Log(calls)])
    with caplog.at_level(logging.WARNING, logger="detlib"):
        trainer.train(7, 5)
    assert calls == [("before_train", 7), ("after_train", 7, 7)]
    assert "iteration 7 is not below" in caplog.text


@pytest.mark.parametrize("zero_grad_first", [False, True])
def test_steps_equal_those_of_a_plain_loop(zero_grad_first):
    trainer = _trainer(zero_grad_before_forward=zero_grad_first)
    reference = _trainer()
    trainer.train(0, 5)
    batches = _batches()
    for _ in range(5):
        reference.optimizer.zero_grad()
        sum(reference.model(next(batches)).values()).backward()
        reference.optimizer.step()
    for a, b in zip(trainer.model.parameters(), reference.model.parameters()):
        assert torch.equal(a, b)


def test_losses_and_data_time_are_stored():
    trainer = _trainer()
    trainer.train(0, 3)
    latest = trainer.storage.latest()
    assert latest["loss_a"][1] == latest["total_loss"][1] == latest["data_time"][1] == 2
    assert latest["total_loss"][0] == pytest.approx(latest["loss_a"][0] + latest["loss_b"][0])


def test_metrics_are_gathered_every_period():
    trainer = _trainer(gather_metric_period=3)
    trainer.train(0, 8)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [2, 5]


def test_a_scalar_loss_is_stored_as_the_total():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return (self.w * 2).sum()

    trainer = _trainer(One())
    trainer.train(0, 1)
    assert trainer.storage.latest()["total_loss"] == (2.0, 0)
    assert set(trainer.storage.latest()) == {"total_loss", "data_time"}


def test_nan_error_names_iteration_losses_learning_rate_and_images(tmp_path):
    model = _Model(poison=4)
    trainer = _trainer(model, lr=0.25)
    checkpointer = Checkpointer(model, str(tmp_path))
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 2)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 10)
    message = str(error.value)
    assert "iteration 4:" in message and "loss_b=nan" in message and "loss_a=0." in message
    assert "0.25" in message and "image_4_0.jpg, image_4_1.jpg" in message
    # The bad step changed neither the parameters nor a file.
    assert find_non_finite_parameters(model) == []
    assert checkpointer.get_checkpoint_file().endswith("model_0000003.pth")


def test_nan_error_names_the_first_bad_step_between_two_readings(tmp_path):
    model = _Model(poison=4)
    trainer = _trainer(model, gather_metric_period=10)
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 20)
    message = str(error.value)
    assert "at iteration 9" in message and "first one was at iteration 4" in message and "0 to 9" in message
    assert "image_4_0.jpg" in message and "image_5" not in message


def test_nan_found_by_the_model_gets_the_same_report():
    class Model(_Model):
        def forward(self, batch):
            if self.calls == 3:
                raise FloatingPointError("3 boxes are not finite")
            return super().forward(batch)

    with pytest.raises(FloatingPointError) as error:
        _trainer(Model(), lr=0.25).train(0, 10)
    message = str(error.value)
    assert "At iteration 3: 3 boxes are not finite" in message and "Learning rate: 0.25" in message
    assert "Losses at iteration 2:" in message and "loss_a=" in message and "image_3_0.jpg" in message


def test_a_diverged_model_is_not_saved(tmp_path):
    model = _Model(poison=4)
    trainer = _trainer(model, gather_metric_period=100)
    checkpointer = Checkpointer(model, str(tmp_path))
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 3)])
    with pytest.raises(FloatingPointError, match="iteration 5.*fc.weight.*model_0000002.pth"):
        trainer.train(0, 20)
    assert [p[-17:] for p in checkpointer.get_all_checkpoint_files()] == ["model_0000002.pth"]
    for value in torch.load(tmp_path / "model_0000002.pth", weights_only=True)["model"].values():
        assert torch.isfinite(value).all()


def test_metrics_written_in_another_thread_are_complete_and_raise():
    trainer = _trainer(async_write_metrics=True)
    for _ in range(2):
        trainer.train(0, 5)
        assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2, 3, 4]
    with pytest.raises(FloatingPointError, match="iteration 2.*(?s:.*)image_2_0"):
        _trainer(_Model(poison=2), async_write_metrics=True).train(0, 10)
    with pytest.raises(FloatingPointError, match="iteration 9"):
        _trainer(_Model(poison=9), async_write_metrics=True).train(0, 10)


def test_a_data_loader_that_ends_raises_an_error():
    trainer = _trainer()
    trainer.data_loader = [next(_batches())] * 2
    with pytest.raises(RuntimeError, match="ended at iteration 2"):
        trainer.train(0, 5)


def test_a_model_in_eval_mode_raises_an_error():
    trainer = _trainer()
    trainer.model.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        trainer.train(0, 1)


def test_reset_data_loader_reads_from_the_new_loader():
    trainer = _trainer()
    trainer.train(0, 2)
    trainer.reset_data_loader(lambda: _batches(50))
    with EventStorage():
        assert trainer._next_batch()[0]["file_name"] == "image_50_0.jpg"


@pytest.mark.parametrize("cls", [SimpleTrainer, AMPTrainer])
def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(tmp_path, cls):
    def make(start: int, folder: str):
        trainer = _trainer(cls=cls, start=start)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.8)
        checkpointer = Checkpointer(trainer.model, str(tmp_path / folder), trainer=trainer)
        trainer.register_hooks(
            [hooks.LRScheduler(scheduler=scheduler), hooks.PeriodicCheckpointer(checkpointer, 4)]
        )
        return trainer, checkpointer

    uninterrupted, _ = make(0, "uninterrupted")
    uninterrupted.train(0, 10)
    cut, _ = make(0, "cut")
    cut.train(0, 4)
    resumed, checkpointer = make(4, "cut")
    with torch.no_grad():
        resumed.model.fc.weight.fill_(9.0)
    (tmp_path / "cut" / "last_checkpoint").write_text("model_0000003.pth")
    checkpointer.resume_or_load("", resume=True)
    assert resumed.iter == 3
    resumed.train(resumed.iter + 1, 10)
    assert resumed.optimizer.param_groups[0]["lr"] == uninterrupted.optimizer.param_groups[0]["lr"]
    for a, b in zip(resumed.model.parameters(), uninterrupted.model.parameters()):
        assert torch.equal(a, b)


def test_amp_computes_in_bfloat16_and_keeps_float32_parameters():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, batch):
            out = self.fc(torch.ones(2, 4))
            self.dtype = out.dtype
            return {"loss": out.float().sum()}

    trainer = _trainer(Half(), AMPTrainer, log_grad_scaler=True)
    trainer.train(0, 2)
    assert trainer.model.dtype == torch.bfloat16 and trainer.model.fc.weight.dtype == torch.float32
    assert trainer.storage.latest()["[metric]grad_scaler"][0] == 1.0
    assert set(trainer.state_dict()) == {"iteration", "optimizer", "grad_scaler"}
    with pytest.raises(ValueError, match="precision"):
        _trainer(cls=AMPTrainer, precision=torch.float32)


def test_optimizer_step_hooks_see_unscaled_gradients():
    """Clipping is such a hook; fused optimizers would unscale only inside their step."""
    norms = []
    for scale in (1.0, 1024.0):
        trainer = _trainer(
            cls=AMPTrainer, precision=torch.bfloat16, grad_scaler=torch.amp.GradScaler("cpu", scale)
        )
        torch.manual_seed(0)
        trainer.model.fc.reset_parameters()
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, fused=True)
        trainer.optimizer.register_step_pre_hook(
            lambda opt, *_: norms.append(opt.param_groups[0]["params"][0].grad.norm().item())
        )
        trainer.train(0, 1)
        norms.append(trainer.model.fc.weight.detach().clone())
    assert norms[0] == pytest.approx(norms[2], rel=1e-2)
    torch.testing.assert_close(norms[1], norms[3], rtol=1e-2, atol=1e-3)


def test_two_hooks_of_one_class_keep_separate_states():
    class Counter(HookBase):
        def __init__(self, n):
            self.n = n

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    trainer = TrainerBase()
    trainer.register_hooks([Counter(1), Counter(2)])
    state = trainer.state_dict()
    other = TrainerBase()
    other.register_hooks([Counter(0), Counter(0)])
    other.load_state_dict(state)
    assert [h.n for h in other._hooks] == [1, 2]
    with pytest.raises(NotImplementedError, match="TrainerBase must define run_step"):
        trainer.train(0, 1)


def test_metrics_are_written_every_period_and_at_the_end(tmp_path):
    trainer = _trainer()
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    trainer.register_hooks([hooks.IterationTimer(), hooks.PeriodicWriter([writer], period=2)])
    trainer.train(0, 5)
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert len(lines) == 3 and all('"total_loss"' in line for line in lines)
    assert math.isfinite(trainer.storage.latest()["time"][0])


class _StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration
        self.finished = None

    def after_step(self):
        if self.trainer.iter == self.iteration:
            self.trainer.stop("enough")

    def after_train(self):
        self.finished = self.trainer.is_finished, self.trainer.iter, self.trainer.state_dict()["iteration"]


def test_stop_ends_training_after_the_hooks_of_the_step(caplog):
    trainer, hook, calls = _trainer(), _StopAt(3), []
    trainer.register_hooks([hook, _Log(calls)])
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer.train(1, 9)
    # The hooks after the one that stops are still called, and the state is that of the last step.
    assert calls[-2:] == [("after_step", 3), ("after_train", 4, 4)]
    assert hook.finished == (True, 4, 3) and trainer.stopped_reason == "enough"
    assert "Stopping training: enough" in caplog.text
    hook.iteration = -1
    trainer.train(4, 6)  # a later run trains as usual
    assert hook.finished == (True, 6, 5) and trainer.stopped_reason is None
    assert trainer.state_dict()["iteration"] == 5
    trainer.load_state_dict(trainer.state_dict())
    assert trainer.state_dict()["iteration"] == trainer.iter == 5


def test_a_stopped_run_that_fails_is_not_finished():
    class FailsToo(HookBase):
        def after_step(self):
            if self.trainer.stopped_reason:
                raise KeyError("no")

    trainer, hook = _trainer(), _StopAt(1)
    trainer.register_hooks([hook, FailsToo()])
    with pytest.raises(KeyError, match="no"):
        trainer.train(0, 2)
    assert hook.finished == (False, 1, 0)


def test_the_first_error_is_raised_when_hooks_fail_at_the_end(caplog):
    class FailsAtTheEnd(HookBase):
        def __init__(self, word):
            self.word = word

        def after_train(self):
            raise OSError(self.word)

    class Fails(HookBase):
        def after_step(self):
            raise KeyError("in a step")

    calls = []
    ends = [FailsAtTheEnd("first"), FailsAtTheEnd("second"), _Log(calls)]
    trainer = _trainer()
    trainer.register_hooks(ends)
    with pytest.raises(OSError, match="first"):
        trainer.train(0, 1)
    assert calls[-1][0] == "after_train" and "second" in caplog.text
    trainer.register_hooks([Fails()])
    caplog.clear()
    with pytest.raises(KeyError, match="in a step"):
        trainer.train(0, 1)
    assert calls[-1] == ("after_train", 0, 0) and "OSError: first" in caplog.text


def test_batch_is_kept_only_for_hooks_that_request_it():
    seen = []

    class Asks(HookBase):
        def before_step(self):
            self.trainer.keep_batch = self.trainer.iter == 1

        def after_step(self):
            seen.append(self.trainer.batch)

    trainer = _trainer()
    trainer.register_hooks([Asks()])
    trainer.train(0, 3)
    batches = _batches()
    next(batches)
    assert seen[0] is None and seen[2] is None
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(seen[1], next(batches), strict=True))
    assert trainer.batch is None and not trainer.keep_batch
