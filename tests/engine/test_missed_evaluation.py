"""Evaluations that were cut off are made when the training is resumed."""

import json
import logging

import pytest
import torch

from detlib.engine import DefaultTrainer, hooks
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from tests.engine.tiny import tiny_cfg


class _Killed(BaseException):
    pass


class _Judged(DefaultTrainer):
    """Its metric is a number of the weights; the evaluation with the number `fatal` does not come to its end."""

    evaluations, fatal = 0, None

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluations += 1
        if cls.evaluations == cls.fatal:
            raise _Killed
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
    trainer = type("Judged", (_Judged,), {"fatal": fatal})(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def _results(folder):
    """What evaluations have left: the metric by iteration, the best one, and all that was seen."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    measured = {row["iteration"]: row["bbox/AP"] for row in rows if "bbox/AP" in row}
    assert len(measured) == sum("bbox/AP" in row for row in rows)
    best = torch.load(folder / "model_best.pth", weights_only=True)["best"]
    return measured, best, json.loads((folder / "early_stop.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    _started(folder).train()
    assert (folder / "last_evaluation").read_text() == "6\n"
    results = _results(folder)
    assert list(results[0]) == [1, 3, 5, 7] and len(set(results[0].values())) == 4
    return results


@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_it_is_made_as_if_nothing_had_happened(tmp_path, whole, caplog, fatal):
    with pytest.raises(_Killed):
        _started(tmp_path, fatal).train()
    trainer = _started(tmp_path, resume=True)
    assert trainer.start_iter == 2 * fatal
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer.train()
    message = f"The evaluation after iteration {2 * fatal - 1} was cut off; it is made now"
    assert caplog.text.count(message) == 1
    assert type(trainer).evaluations == 5 - fatal
    assert _results(tmp_path) == whole


def _stopped(folder, at, **overrides):
    """A training that is stopped before the step `at`."""

    def stop(trainer):
        if trainer.iter == at:
            raise _Killed

    trainer = _started(folder, **overrides)
    trainer.register_hooks([hooks.CallbackHook(before_step=stop)])
    with pytest.raises(_Killed):
        trainer.train()


def test_it_is_not_made_again(tmp_path, whole):
    _stopped(tmp_path, 5)
    trainer = _started(tmp_path, resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert type(trainer).evaluations == 2 and _results(tmp_path) == whole


def test_an_earlier_training_in_the_folder_does_not_count(tmp_path, whole):
    _started(tmp_path).train()
    with pytest.raises(_Killed):
        _started(tmp_path, fatal=1).train()
    assert not (tmp_path / "last_evaluation").exists()
    trainer = _started(tmp_path, resume=True)
    trainer.train()
    assert type(trainer).evaluations == 4 and _results(tmp_path) == whole


def test_nothing_is_made_up_where_none_was_due(tmp_path):
    """Neither at another step, nor at the end, nor where the trainer has another way to evaluate."""
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


def test_the_main_process_knows_what_was_made(tmp_path, monkeypatch, caplog):
    """Another process, which may not see the folder, does as the main one does."""
    with pytest.raises(_Killed):
        _started(tmp_path, fatal=2).train()
    trainer = _started(tmp_path, resume=True)
    hook = next(h for h in trainer._hooks if isinstance(h, hooks.MissedEvaluation))
    gather = comm.all_gather
    monkeypatch.setattr(comm, "all_gather", lambda data: [4] if data == hook._read() else gather(data))
    with caplog.at_level(logging.INFO, logger="detlib"):
        trainer.train()
    assert hook._read() == 6 and "was cut off" not in caplog.text
