"""Training runs that are killed, stopped or requeued resume and end with the same weights."""

import os
import signal
import time

import psutil
import pytest
import torch

from detlib.checkpoint import Checkpointer
from detlib.engine import StopTraining, TrainerBase, launch
from detlib.engine.distributed import interrupt
from detlib.engine.distributed.environment import should_resume
from detlib.engine.hooks import StopOnSignal
from tests.engine import launching

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    launching.use_forkserver(monkeypatch)


def _assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} differ, such as {different[0]}"


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_saves_and_stops_after_the_step(tmp_path, log, signum):
    hook = launching.At(2, 0, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(StopTraining) as stop:
        launching.train(str(tmp_path / "out"), [hook])
    assert stop.value.code == 128 + signum and isinstance(stop.value, SystemExit)
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert "Stopped by" in log.text and "after iteration 2, which is saved in" in log.text
    assert "Training failed" not in log.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    launching.train(str(tmp_path / "out"), resume=True)
    launching.train(str(tmp_path / "uninterrupted"))
    _assert_equal(launching.read_model(tmp_path / "out"), launching.read_model(tmp_path / "uninterrupted"))


@pytest.mark.parametrize("saved", [True, False])
def test_the_first_process_decides_whether_all_save(tmp_path, monkeypatch, saved):
    """Other processes may not see yet what it saves in the background, and would wait for it forever."""
    took_part = []

    class Trainer(TrainerBase):
        def prepare_to_save(self):
            took_part.append(self.iter)

        def run_step(self):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer()
    trainer.register_hooks([StopOnSignal(Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)))])
    monkeypatch.setattr("detlib.utils.comm.all_gather", lambda data: [saved, data])
    with pytest.raises(StopTraining):
        trainer.train(0, 3)
    assert took_part == ([] if saved else [0])


def test_workers_survive_a_signal_to_all_processes(tmp_path):
    """The current step needs their batches."""
    hook = launching.At(1, 0, launching.terminate_this_process_and_its_workers)
    before, after = [], []
    earlier = launching.At(1, 0, lambda: before.extend(_workers()))
    later = launching.At(1, 0, lambda: after.extend(_workers()))
    with pytest.raises(StopTraining):
        launching.train(str(tmp_path), [earlier, hook, _Wait(), later], {"DATALOADER__NUM_WORKERS": 1})
    assert len(before) == 1 and after == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not launching.remaining_processes()


class _Wait(launching.HookBase):
    def after_step(self) -> None:
        time.sleep(0.2)


def _workers() -> list[int]:
    """Return the pids of data-loader workers, which are forks of this process."""
    own = psutil.Process().cmdline()
    children = psutil.Process().children()
    return [p.pid for p in children if p.status() != psutil.STATUS_ZOMBIE and p.cmdline() == own]


def test_second_ctrl_c_stops_immediately():
    # Shells make background processes ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupt.listen_for_stop():
        signal.raise_signal(signal.SIGINT)
        assert interrupt.stop_requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.stop_requested() == 0


def test_handlers_of_the_user_are_kept(monkeypatch):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with interrupt.listen_for_stop():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [1] and interrupt.stop_requested() == 0


def test_stop_hook_rejects_a_period_below_one():
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        StopOnSignal(None, period=0)


def test_signal_to_one_process_stops_all(tmp_path):
    with pytest.raises(StopTraining) as stop:
        launch(_train_and_terminate, 2, args=(str(tmp_path),), timeout=launching.TIMEOUT)
    assert stop.value.code == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not launching.remaining_processes()


def _train_and_terminate(folder: str) -> None:
    launching.train(folder, [launching.At(2, 1, launching.terminate_this_process)])


def test_killed_process_is_restarted_by_torchrun(tmp_path):
    folder, uninterrupted = str(tmp_path / "out"), str(tmp_path / "uninterrupted")
    config = launching.agent_config(2, max_restarts=2)
    launching.run_agent(config, launching.train_and_be_killed_once, folder, 1, 3)
    assert not launching.remaining_processes()
    launch(launching.train, 2, args=(uninterrupted,), timeout=launching.TIMEOUT)
    _assert_equal(launching.read_model(folder), launching.read_model(uninterrupted))


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_restart_implies_resume(tmp_path, monkeypatch, log, variable):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    os.utime(folder / "last_checkpoint", (1, 1))
    assert should_resume(True, str(folder))
    assert not should_resume(False, str(folder))  # a new run in the folder of an old one
    monkeypatch.setenv(variable, "1")
    assert not should_resume(False, str(folder))  # it was killed before it saved anything
    assert "starting from the beginning" in log.text
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    assert should_resume(False, str(folder))
    assert f"Restart 1 ({variable}): resuming as with --resume" in log.text


def test_restart_without_a_checkpoint_starts_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert not should_resume(False, str(tmp_path / "new"))
