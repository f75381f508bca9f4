"""After one process of a group fails, all end within seconds and report the cause."""

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from detlib.engine import ProcessFailedError, launch
from detlib.engine.distributed.failures import Failure, describe_failure, is_communication_error
from tests.engine import launching

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    launching.use_forkserver(monkeypatch)


def _fail(function, count: int, *args, timeout: float = 60) -> tuple[str, float]:
    """Return the message of a failed run, and the seconds that it took."""
    start = time.monotonic()
    with pytest.raises(ProcessFailedError) as error:
        launch(function, count, args=args, timeout=datetime.timedelta(seconds=timeout))
    return str(error.value), time.monotonic() - start


def test_error_in_one_process_ends_all_with_its_message():
    message, seconds = _fail(launching.one_fails, 3, 1)
    assert message.startswith("Process 1 of 3 failed with ValueError: the loss of this image is undefined\n")
    assert "in fail_in_the_loss" in message and "all_reduce" not in message
    assert seconds < 40  # less than the timeout of a minute, even on a busy machine
    assert not launching.remaining_processes()


def test_killed_process_is_named_with_a_hint():
    message, seconds = _fail(launching.one_is_killed, 2, 1, signal.SIGKILL)
    assert message.startswith("Process 1 of 2 was killed by signal 9 (SIGKILL; pid ")
    assert "memory" in message and "DATALOADER.NUM_WORKERS" in message
    assert seconds < 40
    assert not launching.remaining_processes()


@pytest.mark.parametrize("operation", ["barrier", pytest.param("all_reduce", marks=pytest.mark.slow)])
def test_timeout_names_the_missing_process_and_its_stack(operation):
    message, seconds = _fail(launching.one_oversleeps, 3, 1, operation, timeout=3)
    assert message.startswith("Processes 0, 2 of 3 timed out waiting for process 1 after 3 s")
    stack = message.partition("Process 1 was at:")[2]
    assert "in oversleep" in stack and "time.sleep(100)" in stack
    if operation == "barrier":
        assert "Ranks 1 failed to pass monitoredBarrier" in message
    assert seconds < 40
    assert not launching.remaining_processes()


@pytest.mark.parametrize("where", [pytest.param("loss", marks=pytest.mark.slow), "loader"])
def test_failed_training_run_leaves_no_data_loader_worker(tmp_path, where):
    message, _ = _fail(_train_and_fail, 2, str(tmp_path), where)
    assert message.startswith("Process 1 of 2 failed with ")
    assert {"loss": "the loss of this image is undefined", "loader": "no such image"}[where] in message
    assert not launching.remaining_processes()


def _train_and_fail(folder: str, where: str) -> None:
    if where == "loss":
        hooks = [launching.At(1, 1, launching.fail_in_the_loss)]
    else:
        hooks = [launching.At(0, 1, _break_the_mapper)]
    launching.train(folder, hooks, {"DATALOADER__NUM_WORKERS": 1})


def _break_the_mapper() -> None:
    raise FileNotFoundError("no such image")


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_STARTER.format(folder=str(tmp_path)))
    starter = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    starter.kill()
    starter.wait()
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=20)
    assert not alive


_STARTER = """
from detlib.engine import launch
from tests.engine.test_launch_failures import note_and_wait
if __name__ == "__main__":
    launch(note_and_wait, 2, args=({folder!r},))
"""


def note_and_wait(folder: str) -> None:
    Path(folder, f"pid{os.getpid()}").touch()
    launching.all_reduce_forever()


def test_cause_is_described_before_its_consequences():
    lost = Failure(0, "lost", "RuntimeError: Connection closed by peer", "trace 0", order=1)
    gone = Failure.from_exit(2, 77, -9)
    raised = Failure(1, "error", "ValueError: bad", "trace 1", order=3)
    message = describe_failure([lost, raised], 4, {}, 5)
    assert message == "Process 1 of 4 failed with ValueError: bad\n\ntrace 1"
    assert describe_failure([lost, raised, gone], 4, {}, 5).startswith(
        "Process 2 of 4 was killed by signal 9"
    )
    message = describe_failure([lost], 3, {1: "here", 2: "there"}, 5)
    assert message.startswith("Process 0 of 3 timed out waiting for processes 1, 2 after 5 s")
    assert message.endswith("Process 1 was at:\n\nhere\n\nProcess 2 was at:\n\nthere")
    both = [lost, Failure(1, "lost", "RuntimeError: gloo", order=2)]
    assert "Processes 0, 1 of 2 lost the connection to each other." in describe_failure(both, 2, {}, 5)


def test_exit_without_an_error_is_described_with_a_hint():
    assert "exited with code 3 without an error (pid 5 on " in Failure.from_exit(0, 5, 3).title
    assert "SIGBUS" in Failure.from_exit(0, 5, -7).title and "/dev/shm" in Failure.from_exit(0, 5, -7).title
    assert "NCCL" in Failure.from_exit(0, 5, -6).title
    assert "disappeared without an error" in Failure.from_exit(0, 5, None).title


def test_communication_errors_are_recognized():
    assert is_communication_error(dist.DistNetworkError("refused"))
    assert is_communication_error(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_communication_error(RuntimeError("CUDA out of memory"))
    assert not is_communication_error(ValueError("connection closed by peer"))
