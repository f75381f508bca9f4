"""Failures around training: kills, full disks, removed folders, dead workers, growing memory."""

import errno
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detlib.checkpoint import checkpointer as checkpointer_module
from detlib.engine import DefaultTrainer, hooks
from tests.builders import tiny_cfg

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_like_uninterrupted_ones(number):
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    script = _ROOT / "tests/scripts/kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, script, str(number)], cwd=_ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"and resumed: {number} have the same results" in done.stdout


def _cfg(folder, **overrides):
    return tiny_cfg(
        folder, **{"DATASETS__TEST": (), "SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 1, **overrides}
    )


def _started(cfg, *more_hooks) -> DefaultTrainer:
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks(list(more_hooks))
    return trainer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_training_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, asynchronous):
    cfg = _cfg(tmp_path, SOLVER__CHECKPOINT_ASYNC=asynchronous)
    write, calls = checkpointer_module.write_checkpoint, []

    def full_at_the_second(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write(path, content)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", full_at_the_second)
    with pytest.raises(OSError, match="No space left on device") as error:
        _started(cfg).train()
    assert "model_0000001.pth" in str(error.value)
    monkeypatch.undo()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    resumed = _started(cfg)
    assert resumed.start_iter == 1
    resumed.train()
    assert (tmp_path / "model_final.pth").exists()


def test_a_removed_output_folder_is_created_again(tmp_path, caplog):
    folder = tmp_path / "out"

    def remove(trainer):
        if trainer.iter == 1:
            shutil.rmtree(folder)

    # After the checkpoint of its step, so that the next one finds no folder.
    _started(_cfg(folder), hooks.CallbackHook(after_step=remove)).train()
    assert (folder / "model_final.pth").exists()
    assert _started(_cfg(folder)).start_iter == 3


def test_a_killed_worker_ends_training(tmp_path):
    def kill_a_worker(trainer):
        if trainer.iter == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    cfg = _cfg(tmp_path, DATALOADER__NUM_WORKERS=1, SOLVER__MAX_ITER=200)
    with pytest.raises(
        RuntimeError, match=r"worker \(pid.* (is killed by signal: Killed|exited unexpectedly)"
    ):
        _started(cfg, hooks.CallbackHook(after_step=kill_a_worker)).train()
    assert multiprocessing.active_children() == []
    assert _started(_cfg(tmp_path)).start_iter >= 2


def test_a_worker_killed_while_sending_is_reported_as_the_cause(tmp_path):
    """Its data cannot be received; the kill is noticed only then."""
    trainer = _started(_cfg(tmp_path, DATALOADER__NUM_WORKERS=1))._trainer
    trainer._next_batch()

    class Broken:
        def __next__(self):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            raise ConnectionResetError("Connection reset by peer")

    loader, trainer._data_loader_iter_obj = trainer._data_loader_iter_obj, Broken()
    with pytest.raises(RuntimeError, match=r"worker \(pid.* is killed by signal: Killed"):
        trainer._next_batch()
    del loader


def test_an_error_in_the_loader_names_the_image(tmp_path):
    cfg = _cfg(tmp_path)
    trainer = _started(cfg)
    fetch, calls = trainer._trainer._next_batch, []

    def fail_at_the_third():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("shapes/7.png cannot be read")
        return fetch()

    trainer._trainer._next_batch = fail_at_the_third
    with pytest.raises(RuntimeError, match="shapes/7.png cannot be read"):
        trainer.train()
    assert _started(cfg).start_iter == 2


def _memory() -> int:
    """Return the proportional set size of this process and its children in KiB."""
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("steps", "first"), [(120, 60), pytest.param(3000, 300, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path, steps, first):
    seen = {}

    def measure(trainer):
        # The minimum over some steps: the number of prefetched batches varies.
        for end in (first, steps):
            if end - 20 < trainer.iter + 1 <= end:
                seen[end] = min(seen.get(end, math.inf), _memory())

    cfg = _cfg(
        tmp_path,
        SOLVER__MAX_ITER=steps,
        SOLVER__CHECKPOINT_PERIOD=steps // 3,
        SOLVER__BASE_LR=1e-4,
        DATALOADER__NUM_WORKERS=2,
        INPUT__MIN_SIZE_TRAIN=(32,),
        MODEL__BACKBONE__FREEZE_AT=5,
    )
    logging.getLogger("detlib").setLevel(logging.WARNING)
    _started(cfg, hooks.CallbackHook(after_step=measure)).train()
    print(f"{seen[first]} KiB after {first} iterations, {seen[steps]} after {steps}")
    assert seen[steps] < 1.02 * seen[first]


def test_new_iterators_leave_no_processes_behind(tmp_path):
    loader = DefaultTrainer.build_train_loader(_cfg(tmp_path, DATALOADER__NUM_WORKERS=1))
    for _ in range(20):
        assert len(next(iter(loader))) == 2
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == 1
