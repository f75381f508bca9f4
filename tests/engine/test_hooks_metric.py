"""Early stopping, with the evaluations and checkpoints around it."""

import json
import logging

import pytest
import torch
from torch import nn

from detlib.checkpoint import Checkpointer
from detlib.engine import TrainerBase, hooks, launch
from detlib.utils import comm


class _ScriptedTrainer(TrainerBase):
    """A run whose k-th evaluation returns the k-th value."""

    def __init__(
        self,
        folder,
        values,
        *,
        patience,
        mode="max",
        metric="bbox/AP",
        start=0,
        end=100,
        resume=False,
        async_save=False,
    ):
        super().__init__()
        self.values = values
        self.evaluated = []
        self.checkpointer = Checkpointer(nn.Linear(1, 1), str(folder), async_save=async_save, trainer=self)
        self.register_hooks(
            [
                hooks.PeriodicCheckpointer(self.checkpointer, 1),
                hooks.EvalHook(2, self._evaluate),
                hooks.BestCheckpointer(2, self.checkpointer, "bbox/AP", mode, on_all_processes=True),
                hooks.EarlyStopping(2, metric, patience, mode, str(folder)),
            ]
        )
        if resume:
            self.checkpointer.resume_or_load("")
            start = self.iter + 1
        self.train(start, end)

    def _evaluate(self):
        done = self.iter if self._is_over else self.iter + 1
        self.evaluated.append(done)
        return {"bbox": {"AP": self.values[done // 2 - 1]}}

    def run_step(self):
        pass


@pytest.mark.parametrize(
    ("values", "mode", "patience", "steps"),
    [
        ([1, 3, 2, 3, 9], "max", 2, 8),  # an equal value is not an improvement
        ([3, 2, 1, 2, 2, 9], "min", 2, 10),
        ([1, 2, float("nan"), 3, 1], "max", 1, 6),
        ([float("nan")] * 9, "max", 3, 6),
        ([1, 2, 3, 4, 5, 6], "max", 1, 12),
    ],
)
def test_early_stopping_stops_after_patience_evaluations(tmp_path, caplog, values, mode, patience, steps):
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer = _ScriptedTrainer(tmp_path, values, patience=patience, mode=mode, end=2 * len(values))
    stops = steps < 2 * len(values)
    assert trainer.iter == steps and (trainer.stopped_reason is not None) == stops
    # The last evaluation is not repeated, and the final checkpoint is of the last step.
    assert trainer.evaluated == list(range(2, steps + 1, 2))
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == final["trainer"]["iteration"] == steps - 1
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_final.pth")
    assert caplog.text.count("Stopping training: no better bbox/AP in") == stops


def test_training_waits_until_the_best_checkpoint_is_on_disk(tmp_path, monkeypatch):
    def write(path, content):
        if path.endswith("model_best.pth"):
            raise OSError("the disk is full")

    monkeypatch.setattr("detlib.checkpoint.checkpointer.write_checkpoint", write)
    with pytest.raises(OSError, match="the disk is full"):
        _ScriptedTrainer(tmp_path, [1], patience=2, end=2, async_save=True)


def test_the_reason_for_stopping_names_the_best_value(tmp_path):
    trainer = _ScriptedTrainer(tmp_path, [1, 3.25, 2, 3, 9], patience=2)
    assert trainer.stopped_reason == "no better bbox/AP in 2 evaluations; the best was 3.25 at iteration 3"
    trainer = _ScriptedTrainer(tmp_path / "nan", [float("nan")] * 5, patience=2)
    assert trainer.stopped_reason.endswith("the best was never finite")


@pytest.mark.parametrize("cut", [3, 4, 5, 6, 7])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(tmp_path, cut):
    values = [1, 3, 2, 1, 9]

    class Killed(BaseException):
        pass

    class Cut(_ScriptedTrainer):
        def run_step(self):
            if self.iter == cut:
                raise Killed

    with pytest.raises(Killed):
        Cut(tmp_path, values, patience=2)
    resumed = _ScriptedTrainer(tmp_path, values, patience=2, resume=True)
    assert resumed.start_iter == cut and resumed.iter == 8
    assert resumed.stopped_reason == "no better bbox/AP in 2 evaluations; the best was 3 at iteration 3"
    seen = json.loads((tmp_path / "early_stop.json").read_text())
    assert seen == {"metric": "bbox/AP", "seen": [[2, 1], [4, 3], [6, 2], [8, 1]]}


def test_a_stopped_run_does_not_train_further_on_resume(tmp_path, caplog):
    values = [1, 3, 2, 1, 9, 8, 7, 6]
    _ScriptedTrainer(tmp_path, values, patience=2)
    before = (tmp_path / "model_final.pth").read_bytes()
    with caplog.at_level(logging.INFO, logger="detlib"):
        again = _ScriptedTrainer(tmp_path, values, patience=2, resume=True)
    assert again.iter == again.start_iter == 8 and again.evaluated == [8]
    assert "this run was already stopped early: no better bbox/AP in 2 evaluations" in caplog.text
    assert "SOLVER.EARLY_STOP.PATIENCE (train.early_stop.patience) above 2 or to 0" in caplog.text
    assert (tmp_path / "model_final.pth").read_bytes() == before
    # With more patience training continues: the 9 after ten steps is the best.
    further = _ScriptedTrainer(tmp_path, values, patience=3, resume=True)
    assert (further.start_iter, further.iter) == (8, 16) and "at iteration 9" in further.stopped_reason


def test_a_new_run_ignores_the_history_of_an_earlier_one_in_its_folder(tmp_path):
    _ScriptedTrainer(tmp_path, [9, 1, 1], patience=2, end=6)
    trainer = _ScriptedTrainer(tmp_path, [1, 2, 3], patience=1, end=6)
    assert trainer.iter == 6
    assert [d for d, _ in json.loads((tmp_path / "early_stop.json").read_text())["seen"]] == [2, 4, 6]


def test_an_unknown_metric_warns_with_similar_names_and_does_not_stop(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="detlib"):
        trainer = _ScriptedTrainer(tmp_path, [1, 1, 1], patience=1, metric="bbox/PA", end=6)
    assert trainer.iter == 6
    assert "The evaluation has no metric 'bbox/PA'. Similar names: bbox/AP." in caplog.text
    assert "Training cannot be stopped early (SOLVER.EARLY_STOP.METRIC" in caplog.text


def test_the_main_process_decides_when_to_stop(tmp_path, monkeypatch):
    """Another process has no metrics of its own; it gathers those of the main process."""
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    # The earlier history; best and metric after each evaluation; the best after training.
    known = iter([{}, (1.0, 1), 1.0, None, 0.5, None])
    monkeypatch.setattr(comm, "all_gather", lambda data: [next(known), data])
    monkeypatch.setattr(comm, "synchronize", lambda: None)

    class Other(_ScriptedTrainer):
        def _evaluate(self):
            return {}

    trainer = Other(tmp_path, [], patience=1, end=5)
    assert trainer.iter == 4 and trainer.stopped_reason.endswith("the best was 1 at iteration 1")
    best = next(h for h in trainer._hooks if isinstance(h, hooks.BestCheckpointer))
    assert (best.best_metric, best.best_iter) == (1.0, 1)


class _MainProcessMetricTrainer(_ScriptedTrainer):
    def _evaluate(self):
        results = super()._evaluate()
        return results if comm.is_main_process() else {}


def _stop_together(folder: str) -> None:
    trainer = _MainProcessMetricTrainer(folder, [1, 3, 2, 2, 9], patience=2)
    assert comm.all_gather((trainer.iter, trainer.is_finished)) == [(8, True)] * 2


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
    launch(_stop_together, 2, dist_url="auto", args=(str(tmp_path),))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 7
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 3


def test_repeat_after_stop_evaluates_again_at_the_end():
    calls = []

    class Stops(hooks.HookBase):
        def after_step(self):
            if self.trainer.iter == 1:
                self.trainer.stop("enough")

    class Idle(TrainerBase):
        def run_step(self):
            pass

    for repeat, expected in ((False, 1), (True, 2)):
        calls.clear()
        trainer = Idle()
        evaluation = hooks.EvalHook(2, lambda: calls.append(1), repeat_after_stop=repeat)
        trainer.register_hooks([evaluation, Stops()])
        trainer.train(0, 9)
        assert len(calls) == expected


def test_illegal_arguments_raise_an_error():
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', got 'best'"):
        hooks.EarlyStopping(2, "bbox/AP", 1, mode="best")
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        hooks.EarlyStopping(2, "bbox/AP", 0)
