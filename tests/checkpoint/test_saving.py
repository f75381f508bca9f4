"""Atomic saving, saving in the background, and removal of old files."""

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from detlib.checkpoint import Checkpointer, PeriodicCheckpointer
from detlib.checkpoint import checkpointer as checkpointer_module
from detlib.checkpoint.background import BackgroundWriter, copy_to_host
from detlib.checkpoint.formats import read_checkpoint


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_process_leaves_a_checkpoint_to_resume_from(tmp_path, mode, kills):
    script = Path(__file__).with_name("kill_while_saving.py")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path), str(kills), mode]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    reached = int(run.stdout.split("iteration ")[1].split(",")[0])
    assert run.stdout.startswith(f"{kills} kills") and reached > 0, run.stdout
    # The mark, two checkpoints, and one that was being added or removed.
    assert len(os.listdir(tmp_path)) <= 4


class SlowDisk:
    """A replacement of `write_checkpoint` that waits for `go` and raises `error` if it is set."""

    def __init__(self, monkeypatch):
        self.go, self.started, self.error, self.paths = threading.Event(), threading.Event(), None, []
        self.write = checkpointer_module.write_checkpoint
        monkeypatch.setattr(checkpointer_module, "write_checkpoint", self)

    def __call__(self, path, content):
        self.started.set()
        assert self.go.wait(20)
        self.paths.append(Path(path).name)
        if self.error:
            raise self.error
        self.write(path, content)


def test_background_save_has_the_state_at_the_time_of_the_call(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(model, str(tmp_path), async_save=True)
    with torch.no_grad():
        model.weight.fill_(1)
    checkpointer.save("a")
    with torch.no_grad():
        model.weight.fill_(2)
    assert disk.started.wait(20) and not (tmp_path / "last_checkpoint").exists()
    disk.go.set()
    checkpointer.wait()
    assert (read_checkpoint(str(tmp_path / "a.pth"))["model"]["weight"] == 1).all()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "a.pth")


def test_error_in_the_background_is_raised_and_removes_nothing(tmp_path, monkeypatch, caplog):
    disk = SlowDisk(monkeypatch)
    disk.go.set()
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path), async_save=True)
    saver = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=1)
    saver.step(0)
    checkpointer.wait()
    disk.error = OSError("No space left on device")
    saver.step(1)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
    # The valid file still exists and is still the last checkpoint.
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000000.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_0000000.pth")
    disk.error = None
    saver.step(2)
    assert checkpointer.get_checkpoint_file().endswith("model_0000002.pth")


def test_submit_blocks_if_the_queue_is_full():
    writer, go, done = BackgroundWriter(max_pending=1), threading.Event(), []
    writer.submit(lambda: go.wait(20))
    writer.submit(lambda: done.append(1))
    third = threading.Thread(target=lambda: writer.submit(lambda: done.append(2)))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "while one task runs and one waits, a third submit must block"
    go.set()
    third.join(20)
    writer.wait()
    assert done == [1, 2]
    with pytest.raises(ValueError, match="got 0"):
        BackgroundWriter(0)


def test_tasks_are_dropped_after_an_error_until_it_is_raised():
    writer, go, done = BackgroundWriter(max_pending=3), threading.Event(), []

    def fail():
        go.wait(20)
        raise OSError("full")

    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    go.set()
    with pytest.raises(OSError, match="full"):
        writer.wait()
    assert not done
    writer.submit(lambda: done.append(2))
    writer.wait()
    assert done == [2]


def test_copy_to_host_keeps_shared_memory_and_metadata():
    base = torch.arange(6.0)
    state = nn.BatchNorm2d(2).state_dict()
    tree = {"a": base, "b": [base[2:4], (base.view(2, 3).T,)], "state": state, "n": 3}
    copy = copy_to_host(tree)
    base.fill_(9)
    assert copy["a"].tolist() == [0, 1, 2, 3, 4, 5] and copy["b"][0].tolist() == [2, 3]
    assert copy["b"][1][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copy["a"].untyped_storage().data_ptr() == copy["b"][0].untyped_storage().data_ptr()
    assert copy["state"]._metadata == state._metadata and copy["n"] == 3


def test_program_finishes_saving_before_it_exits(tmp_path):
    code = (
        "import sys; from torch import nn; from detlib.checkpoint import Checkpointer; "
        "Checkpointer(nn.Linear(500, 500), sys.argv[1], async_save=True).save('a')"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "last_checkpoint"]


def test_resumed_training_run_continues_to_remove_old_files(tmp_path):
    def saver():
        checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
        periodic = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=2)
        checkpointer.add_checkpointable("periodic", periodic)
        return periodic

    first = saver()
    for iteration in range(3):
        first.step(iteration)
    second = saver()
    second.checkpointer.resume_or_load("", resume=True)
    second.step(3)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000002.pth", "model_0000003.pth"]


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path, caplog):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("a")
    (tmp_path / ".a.pth.x7.unfinished").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        checkpointer.resume_or_load("", resume=True)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "last_checkpoint"]


FULL_DISK = """
import resource, sys
import torch
from detlib.checkpoint import DetectionCheckpointer

limit, name, folder, in_background = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
checkpointer = DetectionCheckpointer(torch.nn.Linear(300, 300), folder, async_save=in_background)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
checkpointer.save(name)
checkpointer.wait()
"""


@pytest.mark.skipif(os.name != "posix", reason="only POSIX limits the size of files")
@pytest.mark.parametrize("limit", [100, 20_000])
@pytest.mark.parametrize(
    ("name", "in_background"), [("model", False), ("model", True), ("m.safetensors", False)]
)
def test_last_line_names_the_file_and_the_reason_if_it_cannot_grow(tmp_path, limit, name, in_background):
    command = [sys.executable, "-c", FULL_DISK, str(limit), name, str(tmp_path), str(in_background)]
    result = subprocess.run(command, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith(
        "OSError: [Errno 27] The file exceeds the size limit of the process or file system"
    )
    assert str(tmp_path / name) in last and os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_error_of_torch_after_a_failed_write_names_the_file_and_the_reason(tmp_path, monkeypatch, code):
    def save(content, file):
        try:
            raise OSError(code, os.strerror(code))
        finally:
            raise RuntimeError("unexpected pos 896 vs 790")

    monkeypatch.setattr(torch, "save", save)
    reason = "disk is full" if code == errno.ENOSPC else "disk quota is used up"
    with pytest.raises(OSError, match=f"{reason}: {os.strerror(code)}: '.*model.pth'") as error:
        Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model")
    assert error.value.errno == code and os.listdir(tmp_path) == []


def test_error_that_the_caller_handles_is_not_the_reason_of_a_failed_save(tmp_path, monkeypatch):
    def save(content, file):
        raise TypeError("wrong type")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TypeError, match="wrong type"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model")
