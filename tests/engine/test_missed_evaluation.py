"""Interrupted evaluations are rerun when the run is resumed."""

import csv
import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detlib.engine import DefaultTrainer, hooks
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from tests.builders import tiny_cfg


class _Killed(BaseException):
    pass


class _MeasuredTrainer(DefaultTrainer):
    """Its metric is computed from the weights; the evaluation with the number `fatal` is interrupted."""

    evaluations, fatal, error = 0, None, _Killed

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluations += 1
        if cls.evaluations == cls.fatal:
            raise cls.error
        return {"bbox": {"AP": model.roi_heads.box_predictor.cls_score.weight[0, 0].item() * 1e5 % 7}}


def _started(folder, fatal=None, resume=False, **overrides):
    cfg = tiny_cfg(
        folder,
        **{
            "SOLVER__MAX_ITER": 7,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "SOLVER__BEST_CHECKPOINT__METRIC": "bbox/AP",
            "SOLVER__EARLY_STOP__PATIENCE": 9,
            "TEST__EVAL_PERIOD": 2,
            **overrides,
        },
    )
    seed_all_rng(1)
    trainer = type("MeasuredTrainer", (_MeasuredTrainer,), {"fatal": fatal})(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def _rows(folder):
    """Return the rows by iteration without times; check that both files have the same rows."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    with open(folder / "metrics.csv", newline="") as f:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(f)]
    assert rows == table
    by_iteration = {row["iteration"]: row for row in rows}
    assert [row["iteration"] for row in rows] == sorted(by_iteration)
    times = {"time", "data_time", "eta_seconds"}
    return {i: {n: v for n, v in row.items() if n not in times} for i, row in by_iteration.items()}


def _results(folder):
    """Return the metric by iteration, the entry of the best checkpoint, and the history of early stopping."""
    measured = {i: row["bbox/AP"] for i, row in _rows(folder).items() if "bbox/AP" in row}
    best = torch.load(folder / "model_best.pth", weights_only=True)["best"]
    return measured, best, json.loads((folder / "early_stop.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    _started(folder).train()
    assert (folder / "last_evaluation").read_text() == "7\n"
    return folder


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_folder):
    results = _results(uninterrupted_folder)
    assert list(results[0]) == [1, 3, 5, 7] and len(set(results[0].values())) == 4
    return results


@pytest.fixture(scope="module")
def uninterrupted_rows(uninterrupted_folder):
    rows = _rows(uninterrupted_folder)
    assert list(rows) == [1, 3, 5, 6, 7] and {"bbox/AP", "total_loss", "lr"} < set(rows[3])
    return rows


@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_a_missed_evaluation_is_rerun_with_the_same_results(
    tmp_path, uninterrupted, uninterrupted_rows, caplog, fatal
):
    with pytest.raises(_Killed):
        _started(tmp_path, fatal).train()
    trainer = _started(tmp_path, resume=True)
    assert trainer.start_iter == 2 * fatal
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer.train()
    message = f"The evaluation after iteration {2 * fatal - 1} was interrupted; running it now"
    assert caplog.text.count(message) == 1
    # The console has lines for steps only.
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("iter: ")]
    assert [line.split()[1] for line in lines] == [f"{i}/7" for i in (2, 4, 6, 7) if i > 2 * fatal]
    assert type(trainer).evaluations == 5 - fatal
    assert _results(tmp_path) == uninterrupted
    # The losses of its step were written when training failed; the results are added to their row.
    rows = _rows(tmp_path)
    assert list(rows) == list(uninterrupted_rows)
    assert all(rows[i] == uninterrupted_rows[i] for i in rows if i < 2 * fatal)


def _killed(trainer, **functions):
    """Train until a function, called after all other hooks, kills the run; no hook runs after that."""
    trainer.register_hooks([hooks.CallbackHook(**functions)])
    trainer.after_train = lambda: None
    with pytest.raises(_Killed):
        trainer.train()


def _kill(trainer):
    if trainer.iter >= 3:
        raise _Killed


def test_a_kill_after_the_writers_leaves_one_row(tmp_path, uninterrupted, uninterrupted_rows):
    """Losses and results are written, but the evaluation is not recorded as done."""
    _killed(_started(tmp_path), after_step=_kill)
    assert _rows(tmp_path) == {1: uninterrupted_rows[1], 3: uninterrupted_rows[3]}
    assert (tmp_path / "last_evaluation").read_text() == "2\n"
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert trainer.start_iter == 4 and type(trainer).evaluations == 3
    assert _results(tmp_path) == uninterrupted
    rows = _rows(tmp_path)
    assert list(rows) == list(uninterrupted_rows) and rows[3] == uninterrupted_rows[3]
    # TensorBoard could hide the duplicate results only together with the losses of their step.
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert {(e.step, round(e.value, 5)) for e in events.Scalars("bbox/AP")} == {
        (i, round(row["bbox/AP"], 5)) for i, row in rows.items() if "bbox/AP" in row
    }
    assert [e.step for e in events.Scalars("total_loss")] == [1, 3, 5, 6]


def test_kills_during_the_rerun_leave_one_row(tmp_path, uninterrupted, uninterrupted_rows):
    """Once in the evaluation, once in the rerun, once after the results of the rerun are written."""
    _killed(_started(tmp_path, fatal=2))
    _killed(_started(tmp_path, fatal=1, resume=True))
    assert list(_rows(tmp_path)) == [1]
    _killed(_started(tmp_path, resume=True), before_train=_kill)
    results = {"iteration": 3, "bbox/AP": uninterrupted_rows[3]["bbox/AP"]}
    assert _rows(tmp_path) == {1: uninterrupted_rows[1], 3: results}
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert trainer.start_iter == 4 and type(trainer).evaluations == 3
    assert _results(tmp_path) == uninterrupted
    rows = _rows(tmp_path)
    assert list(rows) == list(uninterrupted_rows) and rows[3] == results


@pytest.mark.parametrize("checkpoints", [2, 3])
def test_evaluations_after_the_checkpoint_are_ignored(tmp_path, checkpoints):
    """If steps are repeated because their checkpoint was lost, their evaluation may be interrupted too."""
    settings = {"SOLVER__CHECKPOINT_PERIOD": checkpoints, "SOLVER__MAX_ITER": 9, "TEST__EVAL_PERIOD": 6}
    _killed(_started(tmp_path, **settings), before_step=lambda trainer: trainer.iter == 6 and _kill(trainer))
    assert (tmp_path / "last_evaluation").read_text() == "6\n"
    measured = _rows(tmp_path)[5]["bbox/AP"]
    (tmp_path / "model_0000005.pth").unlink()
    (tmp_path / "last_checkpoint").write_text(f"model_{5 - checkpoints:07d}.pth")
    _killed(_started(tmp_path, fatal=1, resume=True, **settings))
    assert (tmp_path / "last_evaluation").read_text() == f"{6 - checkpoints}\n"
    trainer = _started(tmp_path, resume=True, **settings)
    trainer.train()
    assert trainer.start_iter == 6 and type(trainer).evaluations == 2
    results = _results(tmp_path)[0]
    assert list(results) == [5, 9] and results[5] == measured


def test_a_finished_run_that_is_extended_is_not_evaluated_again(tmp_path):
    """The results of the last evaluation are the only ones of that step."""
    _started(tmp_path, SOLVER__MAX_ITER=4).train()
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert trainer.start_iter == 4 and type(trainer).evaluations == 2
    assert list(_results(tmp_path)[0]) == [1, 4, 5, 7]


def test_a_finished_run_whose_last_evaluation_failed_is_evaluated_again(tmp_path):
    trainer = _started(tmp_path, fatal=2, SOLVER__MAX_ITER=4)
    type(trainer).error = ValueError  # unlike _Killed: the other hooks are called afterwards
    with pytest.raises(ValueError):
        trainer.train()
    assert (tmp_path / "last_evaluation").read_text() == "2\n"
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert trainer.start_iter == 4 and type(trainer).evaluations == 3
    assert list(_results(tmp_path)[0]) == [1, 3, 5, 7]


def _stopped(folder, at, **overrides):
    """Run until it is killed before step `at`."""

    def stop(trainer):
        if trainer.iter == at:
            raise _Killed

    trainer = _started(folder, **overrides)
    trainer.register_hooks([hooks.CallbackHook(before_step=stop)])
    with pytest.raises(_Killed):
        trainer.train()


def test_a_completed_evaluation_is_not_rerun(tmp_path, uninterrupted):
    _stopped(tmp_path, 5)
    trainer = _started(tmp_path, resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert type(trainer).evaluations == 2 and _results(tmp_path) == uninterrupted


def test_an_earlier_run_in_the_folder_is_ignored(tmp_path, uninterrupted):
    _started(tmp_path).train()
    with pytest.raises(_Killed):
        _started(tmp_path, fatal=1).train()
    assert not (tmp_path / "last_evaluation").exists()
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert type(trainer).evaluations == 4 and _results(tmp_path) == uninterrupted


def test_no_evaluation_is_rerun_where_none_was_due(tmp_path):
    """At another step, at the end, and for a trainer without an `EvalHook`."""
    _stopped(tmp_path / "odd", 4, SOLVER__CHECKPOINT_PERIOD=3)
    trainer = _started(tmp_path / "odd", resume=True)
    trainer.train()
    assert trainer.start_iter == 3 and type(trainer).evaluations == 3

    with pytest.raises(_Killed):
        _started(tmp_path / "end", fatal=3, SOLVER__MAX_ITER=6).train()
    trainer = _started(tmp_path / "end", resume=True, SOLVER__MAX_ITER=6)
    trainer.train()
    assert trainer.start_iter == 6 and type(trainer).evaluations == 1

    with pytest.raises(_Killed):
        _started(tmp_path / "own", fatal=2).train()
    trainer = _started(tmp_path / "own", resume=True)
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, hooks.EvalHook)]
    trainer.train()
    assert trainer.start_iter == 4 and type(trainer).evaluations == 0


def test_the_main_process_decides_whether_to_rerun(tmp_path, monkeypatch, caplog):
    """Another process, which may not see the folder, follows the main one."""
    with pytest.raises(_Killed):
        _started(tmp_path, fatal=2).train()
    trainer = _started(tmp_path, resume=True)
    hook = next(h for h in trainer._hooks if isinstance(h, hooks.MissedEvaluation))
    gather = comm.all_gather
    monkeypatch.setattr(comm, "all_gather", lambda data: [4] if data == hook._read() else gather(data))
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer.train()
    assert hook._read() == 7 and "was interrupted" not in caplog.text
