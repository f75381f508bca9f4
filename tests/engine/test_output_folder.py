"""The output folder: two training runs do not mix, and a folder that cannot be written to is reported."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from detlib.config import get_cfg
from detlib.engine import DefaultTrainer, default_argument_parser, default_setup
from detlib.engine.output_folder import (
    OutputFolderInUseError,
    check_output_folder,
    lock_output_folder,
)
from tests.builders import tiny_cfg

_HOLD = """
import sys, time
from detlib.engine.output_folder import lock_output_folder
with lock_output_folder(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock of the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def _write_lock(folder, **values) -> None:
    holder = {"host": socket.gethostname(), "pid": 2**22 + 5, "processes": 1, "job": [], **values}
    (folder / ".training_lock").write_text(json.dumps(holder))


def test_second_run_is_refused_until_the_first_is_killed(tmp_path, other_run, caplog):
    name = re.escape(f"process {other_run.pid} on host {socket.gethostname()}")
    with pytest.raises(OutputFolderInUseError, match=name):
        check_output_folder(str(tmp_path))
    with pytest.raises(OutputFolderInUseError, match=name), lock_output_folder(str(tmp_path)):
        pass
    check_output_folder(str(tmp_path), is_for_training=False)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(OutputFolderInUseError, match=name):
        default_setup(cfg, default_argument_parser().parse_args([]))
    assert os.listdir(tmp_path) == [".training_lock"]

    other_run.send_signal(signal.SIGKILL)
    # Not waited for: the process is a zombie.
    os.waitid(os.P_PID, other_run.pid, os.WEXITED | os.WNOWAIT)
    with lock_output_folder(str(tmp_path)), lock_output_folder(str(tmp_path)):
        holder = json.loads((tmp_path / ".training_lock").read_text())
        assert holder["pid"] == os.getpid()
    assert f"from process {other_run.pid}" in caplog.text
    assert os.listdir(tmp_path) == []


def test_trainer_is_refused_in_the_folder_of_another_run(tmp_path, other_run):
    trainer = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=()))
    with pytest.raises(OutputFolderInUseError, match=str(other_run.pid)):
        trainer.train()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pid": os.getppid(), "process started": "1"},
        {"pid": os.getpid(), "process started": "1"},
        {"pid": "x"},
        {"pid": 10**30},
    ],
    ids=["ended", "pid reused", "own pid", "malformed", "huge pid"],
)
def test_lock_of_a_dead_process_is_taken_over(tmp_path, values):
    _write_lock(tmp_path, **values)
    with lock_output_folder(str(tmp_path)):
        assert json.loads((tmp_path / ".training_lock").read_text())["pid"] == os.getpid()


def test_empty_lock_is_taken_over(tmp_path):
    (tmp_path / ".training_lock").write_text("")
    check_output_folder(str(tmp_path))


def test_lock_of_another_host_names_it_and_the_file_to_delete(tmp_path, monkeypatch):
    _write_lock(tmp_path, host="node7", pid=12, job=["SLURM_JOB_ID", "3"])
    message = re.escape("process 12 on host node7") + ".*delete .*training_lock"
    with pytest.raises(OutputFolderInUseError, match=message):
        check_output_folder(str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    with pytest.raises(OutputFolderInUseError):
        check_output_folder(str(tmp_path))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued on this host
    check_output_folder(str(tmp_path))


def test_file_as_output_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match=r"OUTPUT_DIR \(train.output_dir\).*file"):
            check_output_folder(str(path))


def test_folder_that_cannot_be_written_to_is_reported(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(OSError, match="cannot write to the folder .*: Read-only file system"):
        check_output_folder(str(tmp_path))
